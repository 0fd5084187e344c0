"""Alerts: what the metrics of a run say is going wrong, why it matters and what to try.

A Watch is fed the rows of the metrics table in their order, and what it says depends on these rows alone. A resumed run feeds it
the rows that are on disk and goes on as if nothing had happened.

No single step raises an alert but one whose loss or gradient is not finite. Compared are windows: means over steps, at least 10 and
as many as hold 128 examples, and only differences that stand out from the noise within the windows count. What is normal for
a loss is what the loss itself declares (losses/registry.py, Healthy).
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.schema import BATCH_METRICS
from pipeline.training.losses.registry import Healthy

NOTE, WARNING, ERROR = "note", "warning", "error"  # a note does not end a strict run
_STEPS, _EXAMPLES = 10, 128  # a window has at least these
_CLEAR = 5.0  # standard errors, of a change that is called one
_PLAUSIBLE = 2.0  # standard errors, of a change that keeps an alert from being raised
_FAR = 5.0  # nats per token from the reference
_COLLAPSED = 1.0  # nats per token that the chosen answers have lost: each token is e times less likely
_FLAT = 0.02  # share of a loss that it must have lost at most, noise allowed for; and of what it shall raise
_MOVED = 0.05  # nats per token, or this share of a log-prob
_SMALL_GRADIENT, _LARGE_GRADIENT, _HUGE_GRADIENT = 0.01, 10.0, 100.0
_USUAL_LOSS = math.log(2)  # sigmoid's at its start, for which these are known


@dataclass(frozen=True)
class Alert:
    step: int
    kind: str
    severity: str
    metric: str
    value: float
    seen: str
    why: str
    remedy: str

    @property
    def row(self) -> dict[str, Any]:
        """As schema.EVENTS has it."""
        return {**{name: value for name, value in vars(self).items() if name != "remedy"}, "try": self.remedy}

    @property
    def line(self) -> str:
        """What is said of it along the run: the first thing to try alone."""
        return f"step {self.step}: {self.seen}. Try {re.split('[,;] ', self.remedy)[0]}"


@dataclass(frozen=True)
class Window:
    """The mean of some steps, and how far chance alone moves it."""

    mean: float
    error: float

    def above(self, other: "Window | float", errors: float) -> bool:
        if not isinstance(other, Window):
            return self.mean - other > errors * self.error
        return self.mean - other.mean > errors * self.apart(other)

    def apart(self, other: "Window") -> float:
        """The standard error of their difference. Of few steps the spread is known badly: the larger one counts for both."""
        return math.sqrt(2) * max(self.error, other.error)


class Series:
    """One metric: its first window, its latest one after the warm-up, and the lowest that there was."""

    def __init__(self, size: int) -> None:
        self._size, self._n = size, 0
        self._first: list[float] = []
        self.recent: deque[float] = deque(maxlen=size)
        self.start = Window(math.nan, math.nan)
        self.now: Window | None = None  # before the latest window is full and shares no step with the first
        self.lowest: Window | None = None

    def add(self, value: float, *, settled: bool) -> None:
        self._n += 1
        if len(self._first) < self._size:
            self._first.append(value)
            self.start = _window(self._first)
        if settled:
            self.recent.append(value)
        if len(self.recent) == self._size and self._n >= 2 * self._size:
            self.now = _window(self.recent)
            if self.lowest is None or self.now.mean < self.lowest.mean:
                self.lowest = self.now


def _window(values: Iterable[float]) -> Window:
    listed = list(values)
    n, mean = len(listed), math.fsum(listed) / len(listed)
    squares = math.fsum((value - mean) ** 2 for value in listed)
    return Window(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else 0.0)


class Watch:
    """The state of all indicators of one run. `healthy`: what each of its losses declares. `moves`: the steps between two
    references, if it changes; what is measured from it is compared under one and the same."""

    def __init__(
        self, healthy: Iterable[Healthy], *, n_steps: int, batch_size: int, warmup: int, moves: int | None = None
    ) -> None:
        self.healthy = tuple(healthy)
        self.size = max(_STEPS, math.ceil(_EXAMPLES / batch_size))
        self.n_steps, self.warmup, self._moves = n_steps, warmup, moves
        # A trouble that stays is said again, a few times in a run.
        self._cooldown = max(5 * self.size, n_steps // 5)
        self._series: dict[str, Series] = {}
        self._last: dict[str, int] = {}
        ranged = (sign.metric for sign in self.healthy if sign.low is not None or sign.high is not None)
        self._watched = tuple(dict.fromkeys([*_METRICS, *ranged]))

    def feed(self, row: Mapping[str, Any]) -> list[Alert]:
        """What the row of a step says, given those before it. Step 0, which learns nothing, is none."""
        step = row["step"]
        if step < 1:
            return []
        if self._moves and step % self._moves == 1 % self._moves:
            self._series = {metric: series for metric, series in self._series.items() if metric in _OF_POLICY_ALONE}
        for metric in self._watched:
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                self._series.setdefault(metric, Series(self.size)).add(value, settled=step > self.warmup)
        found = [alert for indicator in _INDICATORS for alert in indicator(self, step)]
        return [alert for alert in found if self._due(alert)]

    def _due(self, alert: Alert) -> bool:
        due = alert.step - self._last.get(alert.kind, -self._cooldown) >= self._cooldown
        if due:
            self._last[alert.kind] = alert.step
        return due

    def now(self, metric: str) -> tuple[Series, Window] | None:
        series = self._series.get(metric)
        return (series, series.now) if series and series.now else None

    def direction(self, metric: str) -> str | None:
        """What the losses say of a metric. One that says where it has to go counts over one that lets it fall."""
        said = [sign.direction for sign in self.healthy if sign.metric == metric]
        return next((each for each in said if each != "may fall"), said[0] if said else None)

    def rises(self, metric: str, share: float = 0.0) -> bool:
        """Whether it plausibly does, and by more than this share of where it started, or of 1."""
        if (found := self.now(metric)) is None:
            return False
        start, now = found[0].start, found[1]
        return now.above(start, _PLAUSIBLE) and now.mean - start.mean > share * max(1.0, abs(start.mean))

    def has_had_time(self, step: int) -> bool:
        """Whether what starts badly should be better by now."""
        return step - self.warmup >= 3 * self.size and step >= self.n_steps / 4

    @property
    def improves(self) -> bool:
        return self.rises("rewards/margins") or self.rises("rewards/accuracies")

    @property
    def over(self) -> str:
        return f"over {self.size} steps"

    @property
    def identical(self) -> float | None:
        """The reward that all answers of the latest window have; None where they differ."""
        both = [found[0].recent for name in ("chosen", "rejected") if (found := self.now(f"rewards/{name}"))]
        if len(both) < 2:
            return None
        values = [value for recent in both for value in recent]
        return values[0] if max(values) - min(values) <= 1e-6 * max(1.0, abs(values[0])) else None

    @property
    def loss_rises(self) -> bool:
        if (found := self.now("loss")) is None:
            return False
        series, now = found
        assert series.lowest is not None
        rise = now.mean - series.lowest.mean
        return now.above(series.lowest, _CLEAR) and rise > 0.1 * max(abs(series.start.mean), abs(series.lowest.mean))


# -- indicators: each looks at a watch after a step and says what is wrong --------------------------------------------

Indicator = Callable[[Watch, int], Iterator[Alert]]
_OF_POLICY_ALONE = ("logps/chosen", "logps/rejected", "grad_norm")
_METRICS = (*BATCH_METRICS, "log_ratios/chosen", "log_ratios/rejected", "grad_norm")
_INDICATORS: list[Indicator] = []


def _indicator(function: Indicator) -> Indicator:
    _INDICATORS.append(function)
    return function


@_indicator
def _loss_rising(watch: Watch, step: int) -> Iterator[Alert]:
    if watch.loss_rises and (found := watch.now("loss")) and found[0].lowest:
        yield Alert(
            step,
            "loss_rising",
            WARNING,
            "loss",
            found[1].mean,
            f"the loss is {found[1].mean:.4g} {watch.over}, after {found[0].lowest.mean:.4g} at its lowest",
            "steps are too large for it, or the data changes along the run; what was learned is being lost",
            "a lower train.learning_rate, a longer train.warmup_ratio, or a checkpoint from before",
        )


@_indicator
def _loss_flat(watch: Watch, step: int) -> Iterator[Alert]:
    if not watch.has_had_time(step):
        return
    if (found := watch.now("loss")) is None or watch.loss_rises or watch.identical is not None:
        return
    series, now = found
    # Accuracy says little here: the smallest margins decide it.
    raised = {s.metric for s in watch.healthy if s.direction == "rises"} - {"rewards/accuracies"}
    moves = any(watch.rises(metric, _FLAT) for metric in raised)
    accuracy, margins = watch.now("rewards/accuracies"), watch.now("rewards/margins")
    won = accuracy and margins and accuracy[1].mean > 0.95 and margins[1].mean > _FLAT
    most = series.start.mean - now.mean + _PLAUSIBLE * now.apart(series.start)
    if most < _FLAT * abs(series.start.mean) and not (moves or won):
        yield Alert(
            step,
            "loss_flat",
            WARNING,
            "loss",
            now.mean,
            f"the loss is {now.mean:.4g} {watch.over}, as at the start ({series.start.mean:.4g})",
            "nothing is being learned from these pairs",
            "a higher train.learning_rate, for DPO 5e-7 to 5e-6 and ten times that for small models; or look whether "
            "chosen and rejected really differ",
        )


@_indicator
def _rewards_identical(watch: Watch, step: int) -> Iterator[Alert]:
    if (reward := watch.identical) is not None:
        yield Alert(
            step,
            "rewards_identical",
            WARNING,
            "rewards/chosen",
            reward,
            f"all rewards are {reward:.4g} {watch.over}",
            "the policy gives every answer what the reference gives it: its weights do not change",
            "a higher train.learning_rate; look whether anything of the model is trained at all",
        )


@_indicator
def _margins_negative(watch: Watch, step: int) -> Iterator[Alert]:
    if (found := watch.now("rewards/margins")) is None or watch.direction("rewards/margins") == "may fall":
        return
    series, now = found
    # Without a reference they may start there.
    soon = series.start.mean < -_PLAUSIBLE * series.start.error and not watch.has_had_time(step)
    if Window(-now.mean, now.error).above(1e-4, _CLEAR) and not (soon or watch.improves):
        yield Alert(
            step,
            "margins_negative",
            WARNING,
            "rewards/margins",
            now.mean,
            f"the reward margin is {now.mean:.4g} {watch.over}",
            "the policy prefers the rejected answers more than its reference does",
            "look whether chosen and rejected are exchanged in the data (prefcache preview); else a lower "
            "train.learning_rate",
        )


@_indicator
def _accuracy_low(watch: Watch, step: int) -> Iterator[Alert]:
    # Where margins may fall, so may what they decide; where all rewards are one, none is higher.
    if watch.direction("rewards/margins") == "may fall" or watch.identical is not None:
        return
    if (found := watch.now("rewards/accuracies")) is None:
        return
    series, now = found
    soon = series.start.mean < 0.5 - _PLAUSIBLE * series.start.error and not watch.has_had_time(step)
    # Where a few pairs win much and the others lose, margins rise alone.
    improves = watch.improves and not series.start.above(now, _PLAUSIBLE)
    if Window(-now.mean, now.error).above(-0.48, _CLEAR) and not (soon or improves):
        yield Alert(
            step,
            "accuracy_low",
            WARNING,
            "rewards/accuracies",
            now.mean,
            f"the reward accuracy is {now.mean:.4g} {watch.over}, below 0.5 and not rising",
            "a coin would do better; the pairs are learned the wrong way round, or not at all",
            "look whether chosen and rejected are exchanged in the data (prefcache preview), or a lower "
            "train.learning_rate",
        )


@_indicator
def _rejected_rising(watch: Watch, step: int) -> Iterator[Alert]:
    if (found := _moved(watch, "rejected")) is None:
        return
    metric, series, now, unit = found
    # Of a good answer's kin some gets likelier with it; what counts is that the good ones do so more.
    if watch.direction("logps/rejected") != "falls" and watch.rises("rewards/margins"):
        return
    if now.above(series.start, _CLEAR) and now.mean - series.start.mean > _least(metric, series.start):
        yield Alert(
            step,
            "rejected_rising",
            WARNING,
            metric,
            now.mean,
            f"rejected answers get likelier: {now.mean:.4g} {unit} {watch.over}, {series.start.mean:.4g} at the start",
            "the policy is taught to give the answers that it should avoid, together with the chosen ones or in their place",
            "less weight on sft, a lower train.learning_rate, or pairs whose answers differ more",
        )


@_indicator
def _chosen_collapsing(watch: Watch, step: int) -> Iterator[Alert]:
    if (found := _moved(watch, "chosen")) is None:
        return
    metric, series, now, unit = found
    strict = watch.direction("logps/chosen") in ("rises", "holds")
    least = _least(metric, series.start)
    if not strict:  # a fall is normal; twice as far from 0 as at the start is a collapse
        least = _COLLAPSED if metric.startswith("log_ratios") else max(20.0, abs(series.start.mean))
    if series.start.above(now, _CLEAR) and series.start.mean - now.mean > least:
        yield Alert(
            step,
            "chosen_collapsing",
            WARNING,
            metric,
            now.mean,
            f"chosen answers get less likely: {now.mean:.4g} {unit} {watch.over}, {series.start.mean:.4g} at the start",
            "this loss is to hold them up"
            if strict
            else "some fall is normal; this much makes room for answers that nobody has seen",
            "a lower train.learning_rate, a larger train.beta, a weight on sft (train.loss: {sigmoid: 1, sft: 0.2}), or dpop",
        )


def _moved(watch: Watch, answer: str) -> tuple[str, Series, Window, str] | None:
    """Of log-ratio and log-prob what there is: the first has no noise from answers of different lengths."""
    for metric, unit in ((f"log_ratios/{answer}", "nats per token beside the reference"), (f"logps/{answer}", "nats")):
        if found := watch.now(metric):
            return metric, *found, unit
    return None


def _least(metric: str, start: Window) -> float:
    return _MOVED if metric.startswith("log_ratios") else max(1.0, _MOVED * abs(start.mean))


@_indicator
def _gradient(watch: Watch, step: int) -> Iterator[Alert]:
    if (found := watch.now("grad_norm")) is None or (loss := watch.now("loss")) is None:
        return
    usual = median(found[0].recent)
    # Losses on larger scales, such as squared distances, have larger gradients.
    scale = max(1.0, abs(loss[0].start.mean) / _USUAL_LOSS)
    if usual > _LARGE_GRADIENT * scale:
        huge = usual > _HUGE_GRADIENT * scale
        yield Alert(
            step,
            "gradient_huge" if huge else "gradient_large",
            WARNING if huge else NOTE,
            "grad_norm",
            usual,
            f"the gradient's norm is {usual:.4g} {watch.over} (median); "
            f"up to {(_HUGE_GRADIENT if huge else _LARGE_GRADIENT) * scale:.3g} is usual for this loss",
            "train.max_grad_norm cuts almost every step, so that only its direction is left",
            "a lower train.learning_rate or train.beta, or a longer train.warmup_ratio",
        )
    # A loss that has been learned has no gradient left, which is no trouble.
    start, now = loss[0].start, loss[1]
    learned = start.above(now, _PLAUSIBLE) or now.mean < start.mean / 2
    if usual < _SMALL_GRADIENT and not learned:
        yield Alert(
            step,
            "gradient_small",
            NOTE,
            "grad_norm",
            usual,
            f"the gradient's norm is {usual:.4g} {watch.over} (median), and the loss has not fallen",
            "the loss hardly depends on the weights; nothing can be learned",
            "a larger train.beta, or another loss; pairs with equal answers have no gradient",
        )


@_indicator
def _far_from_reference(watch: Watch, step: int) -> Iterator[Alert]:
    for answer in ("chosen", "rejected"):
        metric = f"log_ratios/{answer}"
        if (found := watch.now(metric)) and abs(found[1].mean) > _FAR:
            yield Alert(
                step,
                "kl",
                WARNING,
                metric,
                found[1].mean,
                f"the policy is {found[1].mean:.4g} nats per token from its reference {watch.over} (an estimate of the "
                f"divergence: the mean log-ratio of the {answer} answers)",
                "it is no longer the model that the reference's log-probs describe, and answers may fall apart",
                "a lower train.learning_rate, a larger train.beta, fewer train.epochs",
            )


@_indicator
def _out_of_range(watch: Watch, step: int) -> Iterator[Alert]:
    """Where a loss declares between what a metric stays."""
    for sign in watch.healthy:
        if (found := watch.now(sign.metric)) is None:
            continue
        low, high, now = sign.low, sign.high, found[1]
        if (low is not None and now.mean < low) or (high is not None and now.mean > high):
            yield Alert(
                step,
                "kl" if sign.metric == "kl" else "range",
                WARNING,
                sign.metric,
                now.mean,
                f"{sign.metric} is {now.mean:.4g} {watch.over}, out of "
                f"[{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}]",
                sign.note,
                "a lower train.learning_rate, a larger train.beta, fewer train.epochs",
            )


def not_finite(step: int, metric: str, value: float, where: str) -> Alert:
    """Of a step that was not taken. `where`: what has been kept of it."""
    return Alert(
        step,
        "not_finite",
        ERROR,
        metric,
        value,
        f"{metric} is {value}; the step was not taken, its batch is in {where}",
        "one step with it would make every weight not a number",
        "a lower train.learning_rate; then look at the examples in that file",
    )
