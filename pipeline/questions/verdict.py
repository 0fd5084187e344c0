"""What a verdict is, and the phrases that verdicts share.

A verdict is about all the data, not about the rows that are listed. It says what was found and what to do about it, with the
project's own settings and commands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefcache.pipeline import intervals
from prefcache.pipeline.intervals import Estimate
from prefcache.pipeline.visible_text import count

Numbers = dict[str, Any]
# A wider interval has room for both "no effect" and a strong one.
_WIDEST = 0.2


@dataclass(frozen=True)
class Verdict:
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)  # what the sentence says, and the intervals of shares


Values = Mapping[str, Any]  # of the question's parameters
Judge = Callable[[Numbers, Values], Verdict]
JUDGES: dict[str, Judge] = {}


def judge(function: Judge) -> Judge:
    """Register the verdict of the question that the function is called after: the query's numbers and the parameters in."""
    JUDGES[function.__name__.replace("_", "-")] = function
    return function


# -- shares ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """`n_right` of `n`, with its interval."""

    n_right: int
    n: int
    comparisons: int = 1

    @property
    def estimate(self) -> Estimate:
        return intervals.share(self.n_right, self.n, self.comparisons)

    @property
    def is_too_few(self) -> bool:
        return self.n == 0 or self.estimate.high - self.estimate.low > _WIDEST

    @property
    def percent(self) -> str:
        return _percent(self.estimate.value, self._decimals)

    @property
    def interval(self) -> str:
        low, high = (_percent(end, self._decimals) for end in (self.estimate.low, self.estimate.high))
        return f"95% interval {low} to {high}"

    @property
    def _decimals(self) -> int:
        # Whole percents, unless the interval would begin and end at the same one.
        return 0 if self.estimate.high - self.estimate.low >= 0.02 else 1

    def excludes(self, value: float) -> bool:
        return not self.estimate.low <= value <= self.estimate.high

    def of(self, what: str) -> str:
        """`71% of 5,904 pairs (95% interval 70% to 72%)`."""
        return f"{self.percent} of {count(self.n, what)} ({self.interval})"

    def count_of(self, what: str) -> str:
        """`12 of 5,904 pairs (0.2%, 95% interval 0.1% to 0.4%)`."""
        return f"{self.n_right:,} of {count(self.n, what)} ({self.percent}, {self.interval})"

    def numbers(self, name: str) -> dict[str, Any]:
        estimate = self.estimate
        return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _percent(value: float, decimals: int) -> str:
    return f"{value:.{decimals}%}"


def find_worst(
    groups: Sequence[Numbers], share: Callable[[Numbers, int], Share], whole: Share, *, high_is_worse: bool = True
) -> tuple[Numbers, Share] | None:
    """Return the group whose share is worse than the whole's beyond its interval, the worst of these; None if there is none.

    Intervals are widened by the number of groups, because among twenty sources one differs by chance.
    """
    if len(groups) < 2:
        return None
    value, sign = whole.estimate.value, 1 if high_is_worse else -1
    shares = [(group, share(group, len(groups))) for group in groups]
    worse = [
        (group, each)
        for group, each in shares
        if each.n and each.excludes(value) and sign * (each.estimate.value - value) > 0
    ]
    return max(worse, key=lambda found: sign * found[1].estimate.value) if worse else None


# -- phrases ---------------------------------------------------------------------------------------------------------


def conclude(numbers: Numbers, *parts: str, **more: Any) -> Verdict:
    """Make a verdict of sentences, without those that are empty, and of the numbers, without the lists."""
    plain = {name: value for name, value in numbers.items() if not isinstance(value, list)}
    return Verdict(" ".join(filter(None, parts)), plain | more)


def without_pairs(numbers: Numbers) -> Verdict | None:
    """Say that there are no pairs to ask about, by the number `labels` and perhaps `pairs`; None if there may be some."""
    if labels := numbers["labels"]:
        return conclude(
            numbers,
            f"This data has no pairs but {count(labels, 'label')}: one answer each, good or bad. The question compares the two "
            "answers of a pair.",
        )
    if not numbers.get("pairs", True):
        return conclude(numbers, "No pairs are prepared.")
    return None


def without_scores(numbers: Numbers, n_scored: int) -> Verdict | None:
    if n_scored:
        return None
    return conclude(numbers, "No reference has scored these pairs yet: prefcache score CONFIG.")


def without_runs(numbers: Numbers) -> Verdict | None:
    """Say that no run can be asked about, by the number `runs`; None if there is one."""
    if numbers["runs"]:
        return None
    return conclude(numbers, "No such run has been trained on this data yet: prefcache train CONFIG.")


def list_names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""
