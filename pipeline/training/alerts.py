"""Alerts: what a run's metrics show is going wrong, why it matters and what to try.

A Watch is fed the rows of the metrics table in order and depends on nothing else, so a resumed run feeds it the rows on disk and
raises the same alerts as one that was never interrupted.

Apart from a loss or gradient that is not finite, no single step raises an alert. Indicators compare windows: means over at least
10 steps and 128 examples. A difference counts only if it exceeds several standard errors, so noise does not trigger alerts. What is
normal for a loss is declared by the loss itself (`Healthy` in losses/registry.py).
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import AlertError
from prefcache.pipeline.schema import BATCH_METRICS
from prefcache.pipeline.training.losses.registry import Healthy

NOTE, WARNING, ERROR = "note", "warning", "error"  # a note does not end a strict run
_MIN_STEPS, _MIN_EXAMPLES = 10, 128  # of a window
_CLEAR = 5.0  # standard errors that make a change certain
_PLAUSIBLE = 2.0  # standard errors of a change that is enough to withhold an alert
_FAR = 5.0  # nats per token between policy and reference
_COLLAPSED = 1.0  # nats per token lost by the chosen answers: each token is e times less likely
_FLAT = 0.02  # share of its start by which a loss that learns falls, or a metric that should rise does
_MOVED = 0.05  # nats per token, or this share of a log-prob
_SMALL_GRADIENT, _LARGE_GRADIENT, _HUGE_GRADIENT = 0.01, 10.0, 100.0
_USUAL_LOSS = math.log(2)  # where sigmoid starts; the gradient thresholds hold for this scale


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
        """The alert as a row of schema.EVENTS."""
        return {**{name: value for name, value in vars(self).items() if name != "remedy"}, "try": self.remedy}

    @property
    def line(self) -> str:
        """One line for the terminal, with the first remedy only."""
        return f"step {self.step}: {self.seen}. Try {re.split('[,;] ', self.remedy)[0]}"


def not_finite(step: int, metric: str, value: float, file: str) -> Alert:
    """The alert for a step that was not taken; `file` holds its batch."""
    return Alert(
        step,
        "not_finite",
        ERROR,
        metric,
        value,
        f"{metric} is {value}; the step was not taken, its batch is in {file}",
        "the update would have set every weight to NaN",
        "a lower train.learning_rate; then look at the examples in that file",
    )


def ends_run(config: Config, event: Mapping[str, Any]) -> bool:
    return config.train.alerts == "strict" and event["severity"] != NOTE


def stop_if_strict(config: Config, events: Iterable[Mapping[str, Any]]) -> None:
    """Raise the first of a run's events that ends it, if train.alerts is strict."""
    if event := next((event for event in events if ends_run(config, event)), None):
        raise AlertError(
            f"{config.run} raised an alert at step {event['step']}, {event['kind']}: {event['seen']}. Try: {event['try']}. "
            "train.alerts is strict, so the run ends here; what it computed is kept. Set train.alerts=warn to continue it."
        )


@dataclass(frozen=True)
class Window:
    """The mean over some steps and its standard error."""

    mean: float
    error: float

    @classmethod
    def over(cls, values: Iterable[float]) -> "Window":
        values = list(values)
        n, mean = len(values), math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else 0.0)

    def is_above(self, other: "Window | float", errors: float) -> bool:
        """Whether the mean exceeds the other by more than this many standard errors."""
        if not isinstance(other, Window):
            return self.mean - other > errors * self.error
        return self.mean - other.mean > errors * self.error_of_difference(other)

    def error_of_difference(self, other: "Window") -> float:
        """The standard error of the difference. Few steps estimate a spread badly, so the larger one stands for both."""
        return math.sqrt(2) * max(self.error, other.error)


@dataclass(frozen=True)
class Trend:
    """A metric's first window, its latest one, and the lowest of those in between."""

    start: Window
    now: Window
    lowest: Window
    recent: tuple[float, ...]  # the values of the latest window


class _Series:
    """The values of one metric."""

    def __init__(self, size: int) -> None:
        self._size, self._n = size, 0
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=size)
        self.trend: Trend | None = None  # until the latest window is full and shares no step with the first

    def add(self, value: float, *, is_warm: bool) -> None:
        self._n += 1
        if len(self._first) < self._size:
            self._first.append(value)
        if is_warm:
            self._recent.append(value)
        if len(self._recent) == self._size and self._n >= 2 * self._size:
            start, now = Window.over(self._first), Window.over(self._recent)
            lowest = min(self.trend.lowest, now, key=lambda window: window.mean) if self.trend else now
            self.trend = Trend(start, now, lowest, tuple(self._recent))


class Watch:
    """The state of all indicators of one run.

    `healthy` is what its losses declare. `reference_moves_every` is the number of steps between two references, if the reference
    moves: rewards and log-ratios are compared only within one of these spans.
    """

    def __init__(
        self,
        healthy: Iterable[Healthy],
        *,
        n_steps: int,
        batch_size: int,
        warmup: int,
        reference_moves_every: int | None = None,
    ) -> None:
        self.healthy = tuple(healthy)
        self.size = max(_MIN_STEPS, math.ceil(_MIN_EXAMPLES / batch_size))
        self.step = 0
        self._n_steps, self._warmup, self._moves_every = n_steps, warmup, reference_moves_every
        # A trouble that lasts is repeated a few times in a run.
        self._cooldown = max(5 * self.size, n_steps // 5)
        self._series: dict[str, _Series] = {}
        self._last_raised: dict[str, int] = {}
        bounded = (sign.metric for sign in self.healthy if sign.low is not None or sign.high is not None)
        self._metrics = tuple(dict.fromkeys([*_METRICS, *bounded]))

    def feed(self, row: Mapping[str, Any]) -> list[Alert]:
        """Return the alerts that a step's row raises, given the rows before it. Step 0, which learns nothing, raises none."""
        self.step = row["step"]
        if self.step < 1:
            return []
        if self._moves_every and self.step % self._moves_every == 1 % self._moves_every:
            self._series = {name: series for name, series in self._series.items() if name in _OF_POLICY_ALONE}
        for metric in self._metrics:
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                series = self._series.setdefault(metric, _Series(self.size))
                series.add(value, is_warm=self.step > self._warmup)
        raised = []
        for alert in (alert for indicator in _INDICATORS for alert in indicator(self)):
            if self.step - self._last_raised.get(alert.kind, -self._cooldown) >= self._cooldown:
                self._last_raised[alert.kind] = self.step
                raised.append(alert)
        return raised

    def alert(
        self, kind: str, metric: str, value: float, seen: str, why: str, remedy: str, severity: str = WARNING
    ) -> Alert:
        return Alert(self.step, kind, severity, metric, value, seen, why, remedy)

    def trend(self, metric: str) -> Trend | None:
        series = self._series.get(metric)
        return series.trend if series else None

    def direction(self, metric: str) -> str | None:
        """What the losses declare for a metric; a loss that constrains it takes precedence over one that lets it fall."""
        declared = [sign.direction for sign in self.healthy if sign.metric == metric]
        return next((each for each in declared if each != "may fall"), declared[0] if declared else None)

    def rises(self, metric: str, share: float = 0.0) -> bool:
        """Whether a metric plausibly rises, by more than this share of its start (or of 1, if that is larger)."""
        if (trend := self.trend(metric)) is None:
            return False
        start, now = trend.start, trend.now
        return now.is_above(start, _PLAUSIBLE) and now.mean - start.mean > share * max(1.0, abs(start.mean))

    @property
    def is_mature(self) -> bool:
        """Whether enough of the run is over for a bad start to have improved."""
        return self.step - self._warmup >= 3 * self.size and self.step >= self._n_steps / 4

    @property
    def is_improving(self) -> bool:
        return self.rises("rewards/margins") or self.rises("rewards/accuracies")

    @property
    def is_loss_rising(self) -> bool:
        if (trend := self.trend("loss")) is None:
            return False
        rise = trend.now.mean - trend.lowest.mean
        least = 0.1 * max(abs(trend.start.mean), abs(trend.lowest.mean))
        return trend.now.is_above(trend.lowest, _CLEAR) and rise > least

    @property
    def identical_reward(self) -> float | None:
        """The reward shared by all answers of the latest window; None if they differ."""
        chosen, rejected = self.trend("rewards/chosen"), self.trend("rewards/rejected")
        if chosen is None or rejected is None:
            return None
        values = [*chosen.recent, *rejected.recent]
        return values[0] if max(values) - min(values) <= 1e-6 * max(1.0, abs(values[0])) else None

    @property
    def span(self) -> str:
        return f"over {self.size} steps"


# -- indicators: each inspects the watch after a step and yields what is wrong ----------------------------------------

Indicator = Callable[[Watch], Iterator[Alert]]
_OF_POLICY_ALONE = ("logps/chosen", "logps/rejected", "grad_norm")
_METRICS = (*BATCH_METRICS, "log_ratios/chosen", "log_ratios/rejected", "grad_norm")
_INDICATORS: list[Indicator] = []


def _indicator(function: Indicator) -> Indicator:
    _INDICATORS.append(function)
    return function


@_indicator
def _loss_rising(watch: Watch) -> Iterator[Alert]:
    if watch.is_loss_rising and (trend := watch.trend("loss")):
        yield watch.alert(
            "loss_rising",
            "loss",
            trend.now.mean,
            f"the loss is {trend.now.mean:.4g} {watch.span}, up from its lowest, {trend.lowest.mean:.4g}",
            "the policy is losing what it learned: steps are too large, or the data changes along the run",
            "a lower train.learning_rate, a longer warm-up (train.warmup_ratio), or an earlier checkpoint",
        )


@_indicator
def _loss_flat(watch: Watch) -> Iterator[Alert]:
    trend = watch.trend("loss")
    if trend is None or not watch.is_mature or watch.is_loss_rising or watch.identical_reward is not None:
        return
    # The reward accuracy is left out: the smallest margins decide it.
    should_rise = {sign.metric for sign in watch.healthy if sign.direction == "rises"} - {"rewards/accuracies"}
    rises = any(watch.rises(metric, _FLAT) for metric in should_rise)
    accuracy, margins = watch.trend("rewards/accuracies"), watch.trend("rewards/margins")
    is_won = accuracy and margins and accuracy.now.mean > 0.95 and margins.now.mean > _FLAT
    largest_fall = trend.start.mean - trend.now.mean + _PLAUSIBLE * trend.now.error_of_difference(trend.start)
    if largest_fall < _FLAT * abs(trend.start.mean) and not (rises or is_won):
        yield watch.alert(
            "loss_flat",
            "loss",
            trend.now.mean,
            f"the loss is {trend.now.mean:.4g} {watch.span}, as at the start ({trend.start.mean:.4g})",
            "the policy learns nothing from these pairs",
            "a higher train.learning_rate, for DPO 5e-7 to 5e-6 and ten times that for small models; or check that chosen and "
            "rejected really differ",
        )


@_indicator
def _rewards_identical(watch: Watch) -> Iterator[Alert]:
    if (reward := watch.identical_reward) is not None:
        yield watch.alert(
            "rewards_identical",
            "rewards/chosen",
            reward,
            f"all rewards are {reward:.4g} {watch.span}",
            "policy and reference give every answer the same log-prob: the weights do not change",
            "a higher train.learning_rate; check that any parameter is trained at all",
        )


@_indicator
def _margins_negative(watch: Watch) -> Iterator[Alert]:
    if (trend := watch.trend("rewards/margins")) is None or watch.direction("rewards/margins") == "may fall":
        return
    # Without a reference, margins may start below 0.
    is_early = trend.start.mean < -_PLAUSIBLE * trend.start.error and not watch.is_mature
    if Window(-trend.now.mean, trend.now.error).is_above(1e-4, _CLEAR) and not (is_early or watch.is_improving):
        yield watch.alert(
            "margins_negative",
            "rewards/margins",
            trend.now.mean,
            f"the reward margin is {trend.now.mean:.4g} {watch.span}",
            "the policy favors the rejected answers more than its reference does",
            "checking whether chosen and rejected are swapped in the data (prefcache preview); else a lower train.learning_rate",
        )


@_indicator
def _accuracy_low(watch: Watch) -> Iterator[Alert]:
    # Where margins may fall, so may the accuracy; where all rewards are equal, none is higher.
    if watch.direction("rewards/margins") == "may fall" or watch.identical_reward is not None:
        return
    if (trend := watch.trend("rewards/accuracies")) is None:
        return
    is_early = trend.start.mean < 0.5 - _PLAUSIBLE * trend.start.error and not watch.is_mature
    # The mean margin alone may rise because a few pairs win much while the others lose.
    is_improving = watch.is_improving and not trend.start.is_above(trend.now, _PLAUSIBLE)
    if Window(-trend.now.mean, trend.now.error).is_above(-0.48, _CLEAR) and not (is_early or is_improving):
        yield watch.alert(
            "accuracy_low",
            "rewards/accuracies",
            trend.now.mean,
            f"the reward accuracy is {trend.now.mean:.4g} {watch.span}, below 0.5 and not rising",
            "worse than a coin toss: the pairs are learned the wrong way round, or not at all",
            "checking whether chosen and rejected are swapped in the data (prefcache preview), or a lower train.learning_rate",
        )


@_indicator
def _rejected_rising(watch: Watch) -> Iterator[Alert]:
    if (found := _answer_trend(watch, "rejected")) is None:
        return
    metric, trend, unit = found
    # Similar answers rise together; what matters is that the chosen ones rise more.
    if watch.direction("logps/rejected") != "falls" and watch.rises("rewards/margins"):
        return
    rise = trend.now.mean - trend.start.mean
    if trend.now.is_above(trend.start, _CLEAR) and rise > _least_change(metric, trend.start):
        yield watch.alert(
            "rejected_rising",
            metric,
            trend.now.mean,
            f"rejected answers become more likely: {trend.now.mean:.4g} {unit} {watch.span}, {trend.start.mean:.4g} at the start",
            "the policy learns the answers it should avoid, along with the chosen ones or in their place",
            "less weight on sft, a lower train.learning_rate, or pairs whose answers differ more",
        )


@_indicator
def _chosen_collapsing(watch: Watch) -> Iterator[Alert]:
    if (found := _answer_trend(watch, "chosen")) is None:
        return
    metric, trend, unit = found
    is_held_up = watch.direction("logps/chosen") in ("rises", "holds")
    least = _least_change(metric, trend.start)
    if not is_held_up:  # a fall is normal; twice as far from 0 as at the start is a collapse
        least = _COLLAPSED if metric.startswith("log_ratios") else max(20.0, abs(trend.start.mean))
    if trend.start.is_above(trend.now, _CLEAR) and trend.start.mean - trend.now.mean > least:
        yield watch.alert(
            "chosen_collapsing",
            metric,
            trend.now.mean,
            f"chosen answers become less likely: {trend.now.mean:.4g} {unit} {watch.span}, {trend.start.mean:.4g} at the start",
            "this loss should hold them up"
            if is_held_up
            else "some fall is normal; this much moves probability to answers that nobody has seen",
            "a lower train.learning_rate, a larger train.beta, a weight on sft (train.loss: {sigmoid: 1, sft: 0.2}), or dpop",
        )


def _answer_trend(watch: Watch, answer: str) -> tuple[str, Trend, str] | None:
    """The metric, trend and unit of an answer: its log-ratio, which has no noise from answer lengths, else its log-prob."""
    for metric, unit in (
        (f"log_ratios/{answer}", "nats per token relative to the reference"),
        (f"logps/{answer}", "nats"),
    ):
        if trend := watch.trend(metric):
            return metric, trend, unit
    return None


def _least_change(metric: str, start: Window) -> float:
    return _MOVED if metric.startswith("log_ratios") else max(1.0, _MOVED * abs(start.mean))


@_indicator
def _gradient(watch: Watch) -> Iterator[Alert]:
    if (trend := watch.trend("grad_norm")) is None or (loss := watch.trend("loss")) is None:
        return
    usual = median(trend.recent)
    # Losses on a larger scale, such as squared distances, have larger gradients.
    scale = max(1.0, abs(loss.start.mean) / _USUAL_LOSS)
    if usual > _LARGE_GRADIENT * scale:
        is_huge = usual > _HUGE_GRADIENT * scale
        usual_limit = (_HUGE_GRADIENT if is_huge else _LARGE_GRADIENT) * scale
        yield watch.alert(
            "gradient_huge" if is_huge else "gradient_large",
            "grad_norm",
            usual,
            f"the gradient norm is {usual:.4g} {watch.span} (median); up to {usual_limit:.3g} is usual for this loss",
            "train.max_grad_norm, if set, clips almost every step, which leaves only the gradient's direction",
            "a lower train.learning_rate or train.beta, or a longer warm-up (train.warmup_ratio)",
            WARNING if is_huge else NOTE,
        )
    # A loss that has been learned has no gradient left, which is fine.
    is_learned = loss.start.is_above(loss.now, _PLAUSIBLE) or loss.now.mean < loss.start.mean / 2
    if usual < _SMALL_GRADIENT and not is_learned:
        yield watch.alert(
            "gradient_small",
            "grad_norm",
            usual,
            f"the gradient norm is {usual:.4g} {watch.span} (median), and the loss has not fallen",
            "the loss hardly depends on the weights, so nothing can be learned",
            "a larger train.beta, or another loss; pairs with equal answers have no gradient",
            NOTE,
        )


@_indicator
def _far_from_reference(watch: Watch) -> Iterator[Alert]:
    for answer in ("chosen", "rejected"):
        metric = f"log_ratios/{answer}"
        if (trend := watch.trend(metric)) and abs(trend.now.mean) > _FAR:
            yield watch.alert(
                "kl",
                metric,
                trend.now.mean,
                f"the policy is {trend.now.mean:.4g} nats per token from its reference {watch.span} (the mean log-ratio of the "
                f"{answer} answers, an estimate of the divergence)",
                "the policy has left the region that the reference's log-probs describe, and answers may degrade",
                "a lower train.learning_rate, a larger train.beta, a shorter run (train.epochs)",
            )


@_indicator
def _out_of_range(watch: Watch) -> Iterator[Alert]:
    for sign in watch.healthy:
        if (trend := watch.trend(sign.metric)) is None:
            continue
        low = -math.inf if sign.low is None else sign.low
        high = math.inf if sign.high is None else sign.high
        if not low <= trend.now.mean <= high:
            yield watch.alert(
                "kl" if sign.metric == "kl" else "range",
                sign.metric,
                trend.now.mean,
                f"{sign.metric} is {trend.now.mean:.4g} {watch.span}, outside [{low:g}, {high:g}]",
                sign.note,
                "a lower train.learning_rate, a larger train.beta, a shorter run (train.epochs)",
            )
