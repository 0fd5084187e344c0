"""How sure a figure is: 95% intervals, Wilson's for shares, Newcombe's for how often one is higher, and the bootstrap's for all else.

The bootstrap draws examples anew, always the same draws, so a report says the same each time. Of before and after, which are
of the same examples, it is the differences that are drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5% point
_DRAWS, _SEED = 1000, 0


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def share(right: np.ndarray) -> Estimate:
    """Wilson 1927: it stays within 0 and 1, and is not empty where all are right."""
    n, p = len(right), float(right.mean())
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - reach), min(1.0, middle + reach))


def how_often_higher(good: np.ndarray, bad: np.ndarray) -> Estimate:
    """Of all good values beside all bad ones, how often the first is higher. The interval is method 5 of Newcombe 2006 for the
    Mann-Whitney statistic; as Wilson's, it stays within 0 and 1 and is not empty where all are higher. A tie counts as none, where
    that statistic counts half."""
    found = float(np.searchsorted(np.sort(bad), good, side="left").mean() / len(bad))
    n = (len(good) + len(bad)) / 2 - 1

    def is_within(p: float) -> bool:
        variance = p * (1 - p) * (1 + n * ((1 - p) / (2 - p) + p / (1 + p))) / (len(good) * len(bad))
        return abs(found - p) <= _Z * math.sqrt(variance)

    return Estimate(found, _edge(is_within, found, 0.0), _edge(is_within, found, 1.0))


def _edge(is_within: Callable[[float], bool], inside: float, outside: float) -> float:
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
    return inside


def mean(values: np.ndarray) -> Estimate:
    return bootstrap(lambda drawn: float(drawn.mean()), values)


def bootstrap(statistic: Callable[..., float], *groups: np.ndarray) -> Estimate:
    """The statistic of these groups, each of which is drawn from by itself, and its middle 95% over the draws."""
    chance = np.random.default_rng(_SEED)
    drawn = [statistic(*(group[chance.integers(0, len(group), len(group))] for group in groups)) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(statistic(*groups), float(low), float(high))
