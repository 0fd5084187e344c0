"""Which figures the report has, and their contents. svg.py draws them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefcache.pipeline.report import svg
from prefcache.pipeline.report.data_section import Data
from prefcache.pipeline.report.reference_section import TOKEN_EDGES, Reference
from prefcache.pipeline.report.runs_section import Alert, Run
from prefcache.pipeline.report.svg import CHOSEN, REJECTED, RUNS, Bars, Figure, Line
from prefcache.pipeline.schema import EVALUATION, HELD_OUT, metric_prefix

_BINS = 40
_ROLES = {
    **{"chosen": CHOSEN, "desirable": CHOSEN, "completion": CHOSEN},
    **{"rejected": REJECTED, "undesirable": REJECTED, "prompt": RUNS[0]},
}


@dataclass(frozen=True)
class _Panel:
    """A figure of a run's metrics: one line per run, or one for its chosen and one for its rejected answers."""

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None  # drawn as a line of its own
    exact: bool = False  # its values are settings, which a mean would falsify
    at_start: bool = True  # False: skip step 0, where all rewards are 0

    @property
    def two(self) -> bool:
        return len(self.metrics) == 2


_PANELS = (
    _Panel("loss", "Loss", "mean per step", ("loss",)),
    _Panel("margins", "Reward margin", "chosen minus rejected", ("rewards/margins",), 0.0),
    _Panel("accuracy", "Reward accuracy", "share per step", ("rewards/accuracies",), 0.5, at_start=False),
    _Panel("rewards", "Rewards", "mean reward", ("rewards/chosen", "rewards/rejected"), 0.0),
    _Panel("logps", "Log-probs of answers", "nats per answer", ("logps/chosen", "logps/rejected")),
    _Panel(
        "ratios",
        "KL estimate, from the data's answers",
        "nats per token",
        ("log_ratios/chosen", "log_ratios/rejected"),
        0.0,
    ),
    _Panel("kl", "KL estimate, from mismatched answers", "nats per answer", ("kl",)),
    _Panel("gradient", "Gradient norm, before clipping", "norm", ("grad_norm",)),
    _Panel("rate", "Learning rate", "rate", ("learning_rate",), exact=True),
    _Panel("throughput", "Throughput", "tokens per second", ("tokens_per_second",)),
)


def draw_runs(runs: Sequence[Run], alerts: Sequence[tuple[int, Alert]]) -> Iterator[Figure]:
    """Draw the metrics. Each alert is marked once by its number, in the panel of its metric."""
    marks: dict[str, list[tuple[int, int]]] = {}
    for number, alert in alerts:
        key = next((panel.key for panel in _PANELS if alert.metric in panel.metrics), "loss")
        marks.setdefault(key, []).append((alert.step, number))
    for panel in _PANELS:
        lines = [
            line for run, colour in zip(runs, RUNS, strict=False) for line in _lines(panel, run, colour, len(runs) == 1)
        ]
        if lines:
            yield svg.draw_curves(panel.key, panel.title, lines, panel.unit, marks.get(panel.key, []), panel.level)


def _lines(panel: _Panel, run: Run, colour: str, is_alone: bool) -> Iterator[Line]:
    """Yield the lines of steps and the dots of held-out evaluations. For a single run, colours tell chosen from rejected."""
    for metric in panel.metrics:
        name = metric.rpartition("/")[2] if panel.two else ""
        split = run.shown.split
        for prefix, dots in (("", False), (f"{EVALUATION}{metric_prefix(split)}", True)):
            if f"{prefix}{metric}" in run.series:
                steps, values = run.series[f"{prefix}{metric}"]
                shown = steps >= (0 if panel.at_start else 1)
                yield Line(
                    label=name if is_alone and not dots else "",
                    description=", ".join(
                        filter(None, (run.name, name, split.replace(HELD_OUT, "held out") if dots else ""))
                    ),
                    x=steps[shown],
                    y=values[shown],
                    colour=_ROLES[name] if panel.two and is_alone else colour,
                    dashed=name == "rejected" and not is_alone,
                    dots=dots,
                    exact=panel.exact,
                )


def draw_reference(reference: Reference) -> Iterator[Figure]:
    if len(reference.margins):
        title = "Margin: chosen minus rejected log-prob"
        yield _draw_histogram("ref-margins", title, {"": reference.margins}, "nats per answer", "pairs", level=0.0)
    if reference.answers:
        title = "Log-prob per token of whole answers"
        yield _draw_histogram("ref-answers", title, reference.answers, "nats per token", "answers")
    if reference.tokens:
        first = int(np.flatnonzero(np.sum(list(reference.tokens.values()), axis=0))[0])
        bars = [Bars(name, counts[first:], _ROLES[name]) for name, counts in reference.tokens.items()]
        edges, counted = TOKEN_EDGES[first:], "tokens, logarithmic"
        yield svg.draw_histogram("ref-tokens", "Log-probs of single tokens", bars, edges, "nats", counted, log=True)


def draw_data(data: Data) -> Iterator[Figure]:
    yield _draw_histogram("lengths", "Lengths", data.lengths, "tokens", data.kind, whole=True)
    if data.bias:
        groups = {"": data.bias.difference}
        yield _draw_histogram("bias", "Length: chosen minus rejected", groups, "tokens", "pairs", level=0.0, whole=True)


def _draw_histogram(
    key: str,
    title: str,
    groups: dict[str, np.ndarray],
    unit: str,
    counted: str,
    *,
    level: float | None = None,
    whole: bool = False,
) -> Figure:
    edges = _edges(list(groups.values()), whole)
    bars = [Bars(name, _counts(values, edges), _ROLES.get(name, RUNS[0])) for name, values in groups.items()]
    return svg.draw_histogram(key, title, bars, edges, unit, counted, level)


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values per bin. The outermost bins include everything beyond them."""
    counts: np.ndarray = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return counts


def _edges(groups: Sequence[np.ndarray], whole: bool) -> np.ndarray:
    """Return common bins over the middle 99.8% of the values. Whole numbers get bins of whole widths around them."""
    values = np.concatenate(groups)
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    if whole:
        width = max(1, int(np.ceil((high - low + 1) / _BINS)))
        return np.arange(np.floor(low), np.ceil(high) + width + 1, width) - 0.5
    return np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
