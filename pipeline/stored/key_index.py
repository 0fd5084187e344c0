"""Keys as arrays: 16 bytes as two numbers, sorted, and looked up by the million without a Python object for each.

Keys are hashes, so their first eight bytes almost always decide their order; where they do not, the rest does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash


@dataclass(frozen=True)
class Keys:
    """The first and the last eight bytes of each key, as numbers that sort as the bytes do."""

    high: np.ndarray
    low: np.ndarray

    def __len__(self) -> int:
        return len(self.high)

    def take(self, chosen: np.ndarray) -> "Keys":
        """Select by places or by a mask."""
        return Keys(self.high[chosen], self.low[chosen])

    def is_ascending(self) -> bool:
        """Whether every key comes after the one before it."""
        is_later = self.high[1:] > self.high[:-1]
        is_later |= (self.high[1:] == self.high[:-1]) & (self.low[1:] > self.low[:-1])
        return bool(is_later.all())

    def checksum(self) -> str:
        return xxhash.xxh3_128_hexdigest(np.stack((self.high, self.low), axis=1).astype(">u8").data)


def concat(parts: Sequence[Keys]) -> Keys:
    nothing = np.empty(0, np.uint64)
    return Keys(
        np.concatenate([nothing, *(part.high for part in parts)]),
        np.concatenate([nothing, *(part.low for part in parts)]),
    )


def read_keys(columns: Sequence[pa.ChunkedArray]) -> Keys:
    """The keys of several columns, one after the other. A null becomes an arbitrary key."""
    n = sum(len(column) for column in columns)
    keys, at = Keys(np.empty(n, np.uint64), np.empty(n, np.uint64)), 0
    for chunk in (chunk for column in columns for chunk in column.chunks if len(chunk)):
        halves = np.frombuffer(chunk.buffers()[1], ">u8", 2 * len(chunk), 16 * chunk.offset)
        keys.high[at : at + len(chunk)] = halves[0::2]
        keys.low[at : at + len(chunk)] = halves[1::2]
        at += len(chunk)
    return keys


class KeyIndex:
    """The distinct keys among many, each with a number: its rank."""

    def __init__(self, keys: Keys) -> None:
        order = np.argsort(keys.high)
        high, low = keys.high[order], keys.low[order]
        has_same_high = high[1:] == high[:-1]
        if (has_same_high & (low[1:] < low[:-1])).any():
            order = np.lexsort((keys.low, keys.high))
            low = keys.low[order]
        is_new = np.ones(len(order), bool)
        is_new[1:] = ~has_same_high | (low[1:] != low[:-1])
        self.keys = Keys(high, low) if is_new.all() else Keys(high[is_new], low[is_new])
        self._is_ambiguous = bool((self.keys.high[1:] == self.keys.high[:-1]).any())
        rank = np.cumsum(is_new, dtype=np.int32 if len(order) < 2**31 else np.int64) - 1
        self.rank = np.empty_like(rank)  # of each key that was given
        self.rank[order] = rank

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """Find which of `keys` are in the index: their places in `keys`, and their ranks."""
        if not len(self):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        # Looked up in order, neighbours share what is in the processor's cache: fifteen times faster.
        order = np.argsort(keys.high) if (keys.high[1:] < keys.high[:-1]).any() else np.arange(len(keys))
        wanted, last = keys.take(order), len(self) - 1
        rank = np.minimum(np.searchsorted(self.keys.high, wanted.high), last)
        while self._is_ambiguous:
            after = np.minimum(rank + 1, last)
            same_high = self.keys.high[rank] == wanted.high
            is_further = same_high & (self.keys.low[rank] < wanted.low) & (self.keys.high[after] == wanted.high)
            is_further &= after > rank
            if not is_further.any():
                break
            rank[is_further] += 1
        is_found = (self.keys.high[rank] == wanted.high) & (self.keys.low[rank] == wanted.low)
        return order[is_found], rank[is_found]
