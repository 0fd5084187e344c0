"""Which tokens of an answer count: spans of its ids, stored flat as begin, end, begin, end, ... in ascending order.

A loss, a statistic or a length sees only the tokens that count. Scoring sees all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def whole_span(n: int) -> list[int]:
    """Return the spans of an answer of `n` tokens, all of which count."""
    return [0, n] if n else []


def clip_spans(spans: Sequence[int], n: int) -> list[int]:
    """Return the spans of an answer that is cut to its first `n` tokens."""
    clipped: list[int] = []
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        if begin < n:
            clipped += [begin, min(end, n)]
    return clipped


def count_tokens(spans: Sequence[int]) -> int:
    """Return how many tokens count."""
    return sum(spans[1::2]) - sum(spans[::2])


def count_common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def counted_positions(spans: np.ndarray) -> np.ndarray:
    """Return the positions of the tokens that count, in the answer."""
    pieces = [np.arange(begin, end) for begin, end in spans.reshape(-1, 2)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
