"""An estimate with its 95% interval, and Wilson's interval for a share."""

import math
from dataclasses import dataclass
from statistics import NormalDist

Z = 1.959963984540054  # the normal distribution's 97.5% point


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def share(n_right: int, n: int, comparisons: int = 1) -> Estimate:
    """Estimate a share. Wilson 1927: the interval stays within 0 and 1, and has a width even at 100%.

    Of several shares that are compared, all intervals hold together in 95% of cases (Bonferroni).
    """
    z = Z if comparisons == 1 else NormalDist().inv_cdf(1 - 0.025 / comparisons)
    p = n_right / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - reach), min(1.0, middle + reach))
