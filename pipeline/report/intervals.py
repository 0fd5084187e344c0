"""How sure a figure is: 95% intervals, Wilson's for shares and the bootstrap's for everything else.

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


def mean(values: np.ndarray) -> Estimate:
    return bootstrap(lambda drawn: float(drawn.mean()), values)


def bootstrap(statistic: Callable[..., float], *groups: np.ndarray) -> Estimate:
    """The statistic of these groups, each of which is drawn from by itself, and its middle 95% over the draws."""
    chance = np.random.default_rng(_SEED)
    drawn = [statistic(*(group[chance.integers(0, len(group), len(group))] for group in groups)) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(statistic(*groups), float(low), float(high))
