"""Draw a histogram as SVG whose looks are classes: the pages allow no styles but those of their style sheet."""

import bisect
import itertools
from dataclasses import dataclass

from prefcache.pipeline.browsing.filters import Range
from prefcache.ui.axis_ticks import choose_ticks, format_tick
from prefcache.ui.reader import Histogram

WIDTH, HEIGHT = 320, 88  # of the plot, in the units of its viewBox


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    y_all: float  # top of the bar of all rows
    y: float  # of those under the filter


@dataclass(frozen=True)
class Tick:
    x: float
    label: str


@dataclass(frozen=True)
class Drawing:
    key: str
    title: str
    description: str
    start: float
    end: float
    bars: list[Bar]
    ticks: list[Tick]
    selected: tuple[float, float] | None  # x and width of the range that is filtered by


def draw(histogram: Histogram, selected: Range | None) -> Drawing:
    bins = histogram.bins
    most = max([1, *histogram.all_counts])
    width = WIDTH / bins.n

    def top(n: int) -> float:
        # A bin with a single row among millions can still be seen.
        return HEIGHT - (max(n / most * HEIGHT, 1.0) if n else 0.0)

    bars = [
        Bar(round(i * width, 2), round(width, 2), round(top(n_all), 2), round(top(n), 2))
        for i, (n_all, n) in enumerate(zip(histogram.all_counts, histogram.counts, strict=True))
        if n_all
    ]
    return Drawing(
        key=bins.column.key,
        title=bins.column.title,
        description=_describe(histogram),
        start=bins.start,
        end=bins.end,
        bars=bars,
        ticks=_make_ticks(bins.start, bins.end),
        selected=_place(selected, bins.start, bins.end) if selected else None,
    )


def _place(selected: Range, start: float, end: float) -> tuple[float, float]:
    ends = (start if selected.least is None else selected.least, end if selected.most is None else selected.most)
    left, right = (min(max((each - start) / (end - start), 0.0), 1.0) * WIDTH for each in ends)
    return round(left, 2), round(max(right - left, 1.0), 2)


def _make_ticks(start: float, end: float) -> list[Tick]:
    return [
        Tick(round((value - start) / (end - start) * WIDTH, 2), format_tick(value))
        for value in choose_ticks(start, end)
    ]


def _describe(histogram: Histogram) -> str:
    """Say in words what the histogram shows, for those who cannot see it."""
    total = sum(histogram.counts)
    if not total:
        return "no values under this filter"
    middle = bisect.bisect_left(list(itertools.accumulate(histogram.counts)), total / 2)
    value = histogram.bins.start + (middle + 0.5) * histogram.bins.width
    return f"{total:,} values, median about {value:.3g}"
