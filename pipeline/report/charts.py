"""Which figures the report has, and of what. How they are drawn is in figures.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report import figures
from pipeline.report.data import Data
from pipeline.report.figures import CHOSEN, REJECTED, RUNS, Bars, Figure, Line
from pipeline.report.reference import TOKEN_EDGES, Reference
from pipeline.report.runs import Run

_BINS = 40
_ROLES = {
    **{"chosen": CHOSEN, "desirable": CHOSEN, "completion": CHOSEN},
    **{"rejected": REJECTED, "undesirable": REJECTED, "prompt": RUNS[0]},
}


@dataclass(frozen=True)
class _Panel:
    """One figure of a run's metrics: a line of each run, or one of its chosen and one of its rejected answers."""

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None  # worth a line of its own
    at_start: bool = True  # False: where all rewards are 0, as before the first step, there is nothing to show

    @property
    def two(self) -> bool:
        return len(self.metrics) == 2


_PANELS = (
    _Panel("loss", "Loss", "mean of a step", ("loss",)),
    _Panel("margins", "Reward margin", "chosen less rejected", ("rewards/margins",), 0.0),
    _Panel("accuracy", "Reward accuracy", "share of a step", ("rewards/accuracies",), 0.5, at_start=False),
    _Panel("rewards", "Rewards", "mean reward", ("rewards/chosen", "rewards/rejected"), 0.0),
    _Panel("logps", "Log-probs of answers", "nats an answer", ("logps/chosen", "logps/rejected")),
    _Panel(
        "ratios",
        "KL estimate, from the data's answers",
        "nats a token",
        ("log_ratios/chosen", "log_ratios/rejected"),
        0.0,
    ),
    _Panel("kl", "KL estimate, from mismatched answers", "nats an answer", ("kl",)),
    _Panel("gradient", "Gradient norm, before clipping", "norm", ("grad_norm",)),
    _Panel("rate", "Learning rate", "rate", ("learning_rate",)),
    _Panel("throughput", "Throughput", "tokens a second", ("tokens_per_second",)),
)


def of_runs(runs: Sequence[Run], alerts: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """`alerts` have the numbers under which they are listed; each is marked once, where its metric is drawn."""
    marked = _marked(alerts)
    for panel in _PANELS:
        lines = [line for n, run in enumerate(runs) for line in _lines(panel, run, RUNS[n], alone=len(runs) == 1)]
        if lines:
            yield figures.curves(panel.key, panel.title, lines, panel.unit, marked.get(panel.key, []), panel.level)


def _marked(alerts: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """Steps and numbers, by panel."""
    found: dict[str, list[tuple[int, int]]] = {}
    for alert in alerts:
        panel = next((each.key for each in _PANELS if alert["metric"] in each.metrics), "loss")
        found.setdefault(panel, []).append((alert["step"], alert["number"]))
    return found


def _lines(panel: _Panel, run: Run, colour: str, *, alone: bool) -> Iterator[Line]:
    """Of steps, and with dots of held-out evaluations. Alone, a run's colours tell chosen from rejected answers."""
    for metric in panel.metrics:
        name = metric.rpartition("/")[2] if panel.two else ""
        own = _ROLES[name] if panel.two and alone else colour
        dashed = name == "rejected" and not alone
        for prefix, dots in (("", False), ("eval_", True)):
            if f"{prefix}{metric}" in run.series:
                steps, values = run.series[f"{prefix}{metric}"]
                shown = steps >= (0 if panel.at_start else 1)
                label = name if alone and not dots else ""
                told = ", ".join(filter(None, (run.name, name, "held out" if dots else "")))
                yield Line(label, told, steps[shown], values[shown], own, dashed, dots)


def of_reference(reference: Reference) -> Iterator[Figure]:
    if len(reference.margins):
        edges = _edges([reference.margins])
        bars = [Bars("", _counts(reference.margins, edges), RUNS[0])]
        yield figures.histogram(
            "ref-margins", "Margin: chosen less rejected log-prob", bars, edges, "nats an answer", "pairs", 0.0
        )
    if reference.answers:
        edges = _edges(list(reference.answers.values()))
        bars = [Bars(name, _counts(values, edges), _ROLES[name]) for name, values in reference.answers.items()]
        yield figures.histogram(
            "ref-answers", "Log-prob per token of whole answers", bars, edges, "nats a token", "answers"
        )
    if reference.tokens:
        first = int(np.flatnonzero(np.sum(list(reference.tokens.values()), axis=0))[0])
        bars = [Bars(name, counts[first:], _ROLES[name]) for name, counts in reference.tokens.items()]
        edges = TOKEN_EDGES[first:]
        yield figures.histogram(
            "ref-tokens", "Log-probs of single tokens", bars, edges, "nats", "tokens, logarithmic", log=True
        )


def of_data(data: Data) -> Iterator[Figure]:
    edges = _edges(list(data.lengths.values()), whole=True)
    bars = [Bars(name, _counts(values, edges), _ROLES[name]) for name, values in data.lengths.items()]
    yield figures.histogram("lengths", "Lengths", bars, edges, "tokens", data.kind)
    if data.bias:
        difference = data.bias.difference
        edges = _edges([difference], whole=True)
        bars = [Bars("", _counts(difference, edges), RUNS[0])]
        yield figures.histogram("bias", "Length: chosen less rejected", bars, edges, "tokens", "pairs", 0.0)


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The outermost bins have what lies beyond them too."""
    counts: np.ndarray = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return counts


def _edges(groups: Sequence[np.ndarray], *, whole: bool = False) -> np.ndarray:
    """Of bins for all the groups, over the middle 99.8% of the values. Whole numbers have bins of whole widths around them."""
    values = np.concatenate(groups)
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    if whole:
        width = max(1, int(np.ceil((high - low + 1) / _BINS)))
        return np.arange(np.floor(low), np.ceil(high) + width + 1, width) - 0.5
    return np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
