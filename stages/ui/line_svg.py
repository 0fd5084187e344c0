"""Draw lines over the steps of runs as SVG whose looks are classes: the pages allow no styles but those of their style sheet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefcache.pipeline.report.line_points import NOISY, average_points, smooth
from prefcache.ui.axis_ticks import choose_ticks, format_tick

WIDTH, HEIGHT = 360, 190  # of the whole figure, in the units of its viewBox
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 352, 8, 168  # of the plot
_N_COLOURS = 8


@dataclass(frozen=True)
class Line:
    run: str
    colour: str  # classes, as choose_colour gives them
    points: Sequence[tuple[float, float]]  # step and value, in the order of the steps


@dataclass(frozen=True)
class Path:
    colour: str  # classes
    shape: str  # the d of a path
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    description: str  # in words, for those who cannot see it
    paths: Sequence[Path]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    zero: float | None  # where 0 is, if it lies within


def choose_colour(number: int) -> str:
    """Return the classes of the n-th run of an experiment: a colour, and dashes where colours repeat."""
    return f"run-{number % _N_COLOURS + 1}" + (" dashed" if number >= _N_COLOURS else "")


def draw(title: str, lines: Sequence[Line]) -> Chart:
    """Draw lines, of which at least one has a point."""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x = _Axis(*_widen(min(steps), max(steps), 0.02), _LEFT, _RIGHT)
    y = _Axis(*_widen(min(values), max(values), 0.06), _BOTTOM, _TOP)
    return Chart(
        title=title,
        description=" ".join(_describe(line) for line in lines if line.points),
        paths=[path for line in lines if line.points for path in _make_paths(line, x, y)],
        x_ticks=[Tick(x.place(each), format_tick(each)) for each in _choose_steps(min(steps), max(steps))],
        y_ticks=[Tick(y.place(each), format_tick(each)) for each in choose_ticks(y.start, y.end)],
        zero=y.place(0) if y.start < 0 < y.end else None,
    )


@dataclass(frozen=True)
class _Axis:
    start: float
    end: float
    first: float  # where the start is drawn
    last: float

    def place(self, value: float) -> float:
        return round(self.first + (value - self.start) / (self.end - self.start) * (self.last - self.first), 2)


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or max(abs(high), 1.0) * share
    return low - room, high + room


def _choose_steps(first: float, last: float) -> list[float]:
    """Mark whole numbers only."""
    return [first] if first == last else [each for each in choose_ticks(first, last, 6) if each == round(each)]


def _make_paths(line: Line, x: _Axis, y: _Axis) -> Iterator[Path]:
    """Draw a line; a noisy one faintly, under its running mean."""
    steps, values = (np.array(each, np.float64) for each in zip(*line.points, strict=True))
    steps, values = average_points(steps, values)
    is_noisy = len(values) >= NOISY
    dots = [(x.place(step), y.place(value)) for step, value in zip(steps, values, strict=True)]
    if is_noisy:
        yield Path(f"{line.colour} faint", _shape(dots), [])
        dots = [(a, y.place(value)) for (a, _), value in zip(dots, smooth(values), strict=True)]
    yield Path(line.colour, _shape(dots), [] if is_noisy else dots)


def _shape(dots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g},{b:g}" for a, b in dots)


def _describe(line: Line) -> str:
    (first, before), (last, after) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.run}: {after:.4g} at step {last:,.0f}."
    return f"{line.run}: from {before:.4g} at step {first:,.0f} to {after:.4g} at step {last:,.0f}."
