"""Round numbers at which an axis is marked."""

import math


def choose_ticks(start: float, end: float, n: int = 4) -> list[float]:
    """Return up to about `n` round numbers between two values."""
    if not end > start:
        return [start]
    rough = (end - start) / n
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first = math.ceil(start / step - 1e-9)
    values = (round((first + i) * step, 12) for i in range(2 * n))
    return [value for value in values if value <= end + step * 1e-9]


def format_tick(value: float) -> str:
    return f"{round(value, 10):g}"
