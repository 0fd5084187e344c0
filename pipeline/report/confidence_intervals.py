"""95% intervals: Wilson's for shares, Newcombe's for how often one value is higher than another, the bootstrap's for the rest.

The bootstrap resamples examples with a fixed seed, so a report is reproducible. Changes are resampled as differences, because
before and after are measured on the same examples.
"""

import math
from collections.abc import Callable

import numpy as np

from prefcache.pipeline import intervals
from prefcache.pipeline.intervals import Estimate, Z

_DRAWS, _SEED = 1000, 0


def share(right: np.ndarray) -> Estimate:
    """The share of true values."""
    return intervals.share(int(right.sum()), len(right))


def how_often_higher(good: np.ndarray, bad: np.ndarray) -> Estimate:
    """The share of all pairs of a good and a bad value in which the good one is higher.

    Newcombe 2006, method 5 for the Mann-Whitney statistic: like Wilson's, the interval stays within 0 and 1 and has a width
    even at 100%. A tie does not count as higher; in that statistic it counts half.
    """
    p_higher = float(np.searchsorted(np.sort(bad), good, side="left").mean() / len(bad))
    n = (len(good) + len(bad)) / 2 - 1

    def is_within(p: float) -> bool:
        variance = p * (1 - p) * (1 + n * ((1 - p) / (2 - p) + p / (1 + p))) / (len(good) * len(bad))
        return abs(p_higher - p) <= Z * math.sqrt(variance)

    def bisect(inside: float, outside: float) -> float:
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
        return inside

    return Estimate(p_higher, bisect(p_higher, 0.0), bisect(p_higher, 1.0))


def mean(values: np.ndarray) -> Estimate:
    return bootstrap(lambda drawn: float(drawn.mean()), values)


def bootstrap(statistic: Callable[..., float], *groups: np.ndarray) -> Estimate:
    """The statistic of these groups, and its middle 95% when each group is resampled by itself."""
    random = np.random.default_rng(_SEED)
    drawn = [statistic(*(group[random.integers(0, len(group), len(group))] for group in groups)) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(statistic(*groups), float(low), float(high))
