"""Draw figures as inline SVG: matplotlib draws them, the page's style sheet colours them.

A figure is drawn in placeholder colours, one per role, which are then replaced by CSS variables, so that one drawing works on a
light page, on a dark one and on paper. Text stays text, in the page's font. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, NullLocator

from prefcache.pipeline.report.line_points import NOISY, average_points, pick_points, smooth
from prefcache.pipeline.visible_text import visible

RUNS = tuple(f"run-{n}" for n in range(1, 9))  # the colours of compared runs
CHOSEN, REJECTED, ALERT, INK, _FAINT = "chosen", "rejected", "alert", "ink", "faint"
_ROLES = (INK, _FAINT, CHOSEN, REJECTED, ALERT, *RUNS)
# Placeholders that occur nowhere else.
_COLOURS = {role: f"#0f0f{n:02x}" for n, role in enumerate(_ROLES, 16)}

_SIZE = 5.0, 3.0  # inches; 360 by 216 points, as wide as a phone's column

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _COLOURS[_FAINT],
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _COLOURS[INK],
    "axes.labelsize": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": _COLOURS[_FAINT],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.labelcolor": _COLOURS[INK],
    "svg.fonttype": "none",
    "svg.hashsalt": "prefcache",
    "text.color": _COLOURS[INK],
    "text.parse_math": False,
    "xtick.color": _COLOURS[_FAINT],
    "ytick.color": _COLOURS[_FAINT],
    "xtick.labelcolor": _COLOURS[INK],
    "ytick.labelcolor": _COLOURS[INK],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Line:
    label: str  # in the figure's legend; empty if the page has a common one
    description: str  # in words
    x: np.ndarray
    y: np.ndarray
    colour: str  # one of the roles
    dashed: bool = False
    dots: bool = False  # draw unconnected points
    exact: bool = False  # draw values as they are, without means


@dataclass(frozen=True)
class Bars:
    label: str
    counts: np.ndarray
    colour: str


@dataclass(frozen=True)
class Figure:
    key: str
    title: str
    description: str  # in words, for those who cannot see it
    svg: Markup


def draw_curves(
    key: str,
    title: str,
    lines: Sequence[Line],
    unit: str,
    marks: Sequence[tuple[int, int]] = (),
    level: float | None = None,
) -> Figure:
    """Draw lines over the steps of runs. `marks` are steps with the numbers of the alerts raised there."""
    drawing, axes = _axes()
    with matplotlib.rc_context(_settings()):
        if level is not None:
            axes.axhline(level, color=_COLOURS[INK], linewidth=0.8, linestyle=(0, (1, 2)))
        for line in lines:
            _draw_line(axes, line)
        for step, number in marks:
            axes.axvline(step, color=_COLOURS[ALERT], linewidth=1, linestyle=(0, (3, 2)))
            axes.annotate(
                str(number),
                (step, 1),
                xycoords=("data", "axes fraction"),
                color=_COLOURS[ALERT],
                ha="center",
                va="bottom",
                size=11,
                weight="bold",
            )
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _legend(axes, [line.label for line in lines])
        values = [
            f"{line.description} goes from {line.y[0]:.4g} at step {line.x[0]:.0f} to {line.y[-1]:.4g} at step {line.x[-1]:.0f}"
            for line in lines
            if len(line.x)
        ]
        description = "; ".join(values) + "."
        return Figure(key, title, description, _to_svg(drawing, key, title, description))


def draw_histogram(
    key: str,
    title: str,
    bars: Sequence[Bars],
    edges: np.ndarray,
    unit: str,
    counted: str,
    level: float | None = None,
    *,
    log: bool = False,
) -> Figure:
    """Draw counts of `counted` over common bins of `unit`; with `log`, on a logarithmic scale."""
    drawing, axes = _axes()
    with matplotlib.rc_context(_settings()):
        if level is not None:
            axes.axvline(level, color=_COLOURS[INK], linewidth=0.8, linestyle=(0, (1, 2)))
        for each in bars:
            colour = _COLOURS[each.colour]
            axes.stairs(each.counts, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
            axes.stairs(each.counts, edges, color=colour, linewidth=1.5, label=each.label or None)
        axes.set_xlabel(unit)
        axes.set_ylabel(counted)
        if log:
            axes.set_yscale("log", nonpositive="clip")
            axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _legend(axes, [each.label for each in bars])
        description = "; ".join(_describe_bars(each, edges, unit) for each in bars) + "."
        return Figure(key, title, description, _to_svg(drawing, key, title, description))


def _axes() -> tuple[Drawing, Axes]:
    with matplotlib.rc_context(_settings()):
        drawing = Drawing(figsize=_SIZE, layout="constrained")
        return drawing, drawing.subplots()


def _settings() -> Any:
    """Return fixed settings, so that a matplotlibrc on this machine changes no figure."""
    default = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    return default | _STYLE


def _draw_line(axes: Axes, line: Line) -> None:
    x, y = (pick_points if line.exact else average_points)(line.x, line.y)
    style: dict[str, Any] = {"color": _COLOURS[line.colour], "linestyle": (0, (4, 2)) if line.dashed else "solid"}
    if line.dots:
        axes.plot(x, y, color=style["color"], linestyle="none", marker="o", markersize=4.5, label=line.label or None)
    elif line.exact or len(x) < NOISY:
        axes.plot(x, y, **style, linewidth=1.6, label=line.label or None)
    else:
        axes.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.35)
        axes.plot(x, smooth(y), **style, linewidth=1.8, label=line.label or None)


def _legend(axes: Axes, labels: Sequence[str]) -> None:
    if any(labels):
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0, handlelength=1.6, columnspacing=1.2
        )


# -- in words --------------------------------------------------------------------------------------------------------


def _describe_bars(bars: Bars, edges: np.ndarray, unit: str) -> str:
    total = bars.counts.sum()
    if not total:
        return f"{bars.label or 'all'}: no values"
    middle = int(np.searchsorted(np.cumsum(bars.counts), total / 2))
    return f"{bars.label or 'all'}: {total:,.0f}, median about {(edges[middle] + edges[middle + 1]) / 2:.3g} {unit}"


# -- SVG for a page --------------------------------------------------------------------------------------------------


def _to_svg(drawing: Drawing, key: str, title: str, description: str) -> Markup:
    sink = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    drawing.savefig(sink, format="svg", metadata=no_metadata, transparent=True)
    root = _strip_namespaces(ElementTree.fromstring(sink.getvalue()))
    _prefix_ids(root, key)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-description"}
    for place, (tag, name, text) in enumerate((("title", "title", title), ("desc", "description", description))):
        element = ElementTree.Element(tag, {"id": f"{key}-{name}"})
        element.text = visible(text)  # it contains names of runs
        root.insert(place, element)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    for role, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{role})")
    return Markup(text)


def _strip_namespaces(root: ElementTree.Element) -> ElementTree.Element:
    """Remove namespaces, which HTML does not need, and the fonts and style sheet of the drawing."""
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if "style" in element.attrib:
            style = re.sub(r"font-family: [^;]*(; )?|font: ", "", element.attrib["style"])
            element.set("style", style.strip("; "))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
    return root


def _prefix_ids(root: ElementTree.Element, key: str) -> None:
    """Make ids unique on the page, and remove those that nothing refers to."""
    referred = set(re.findall(r"#([\w.-]+)", " ".join(value for each in root.iter() for value in each.attrib.values())))
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in referred:
            element.set("id", f"{key}-{name}")
        for attribute in {"href", "clip-path"} & element.attrib.keys():
            element.set(attribute, element.attrib[attribute].replace("#", f"#{key}-"))
