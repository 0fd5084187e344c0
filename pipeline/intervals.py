"""An estimate with its 95% interval: of a share (Wilson's) and of a correlation (Fisher's)."""

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


def correlation(r: float, n: int) -> Estimate:
    """Estimate a correlation. Fisher 1921: its inverse hyperbolic tangent is about normal, with a variance of 1 / (n - 3)."""
    if n <= 3 or abs(r) >= 1:
        return Estimate(r, -1.0 if n <= 3 else r, 1.0 if n <= 3 else r)
    reach = Z / math.sqrt(n - 3)
    return Estimate(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))
