"""An estimate with its 95% interval, and Wilson's interval for a share."""

import math
from dataclasses import dataclass

Z = 1.959963984540054  # the normal distribution's 97.5% point


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def share(n_right: int, n: int) -> Estimate:
    """Estimate a share. Wilson 1927: the interval stays within 0 and 1, and has a width even at 100%."""
    p = n_right / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - reach), min(1.0, middle + reach))
