"""Fewer and calmer points for a line, as many as can be told apart."""

import numpy as np

_MOST_POINTS = 240  # of a line; longer ones are averaged
NOISY = 24  # points from which a line is drawn faintly, under its running mean


def average_points(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a line to as many points as can be told apart, each the mean of its neighbours."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def pick_points(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a line to evenly spaced points of its own, including the first and the last."""
    if len(x) <= _MOST_POINTS:
        return x, y
    at = np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int)
    return x[at], y[at]


def smooth(y: np.ndarray) -> np.ndarray:
    """Replace each value by the mean over a window of about a twelfth of the line."""
    reach = len(y) // 24
    return np.array([y[max(0, i - reach) : i + reach + 1].mean() for i in range(len(y))])
