"""Two values of one sequence under the same numerics that differ by more than rounding: at most one can be right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefcache.pipeline.identity import coarsest_dtype
from prefcache.pipeline.stored import shards
from prefcache.pipeline.stored.records import ShardRecord

# The largest deviation of a token's log-prob that is still rounding: see pipeline/scoring/scorer.py.
TOKEN_TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.75}


def tolerance(numerics: Mapping[str, str], n_tokens: Any) -> Any:
    """How far two scorings of an answer of `n_tokens` may differ where only the batches differ.

    A token may deviate as far as when an engine is checked, and such deviations add up as noise does.
    """
    of_token = TOKEN_TOLERANCE.get(coarsest_dtype(numerics), max(TOKEN_TOLERANCE.values()))
    return of_token * np.sqrt(np.maximum(n_tokens, 1))


class Contradictions:
    """Collects rows of shards of one numerics_id, and finds the shards that contradict each other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._records = folder, list[ShardRecord]()
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, record: ShardRecord, keys: np.ndarray, rows: np.ndarray, sums: np.ndarray) -> None:
        """Add rows of a shard: numbers that stand for their keys, their places in the shard, and their values."""
        has_value = ~np.isnan(sums)
        if has_value.any():
            shard = np.full(int(has_value.sum()), len(self._records))
            self._records.append(record)
            self._parts.append((keys[has_value], rows[has_value], sums[has_value], shard))

    def find(self) -> list[tuple[ShardRecord, str]]:
        """Return each shard that differs from another by more than rounding, with a sentence that says where."""
        if not self._parts:
            return []
        key, row, value, shard = (np.concatenate(each) for each in zip(*self._parts, strict=True))
        order = np.lexsort((value, key))
        begins = np.diff(key[order], prepend=-1) != 0
        group, begin = np.cumsum(begins) - 1, np.flatnonzero(begins)
        low, high = order[begin], order[np.append(begin[1:], len(order)) - 1]
        numerics = self._records[0].numerics
        gap = value[high] - value[low]
        suspects = np.flatnonzero(gap > tolerance(numerics, 1))
        allowed = np.full(len(gap), np.inf)
        for i in np.unique(shard[low[suspects]]):
            of_shard = suspects[shard[low[suspects]] == i]
            rows = shards.read_rows(self._folder, self._records[i], ["n_completion"])
            allowed[of_shard] = tolerance(numerics, rows["n_completion"].to_numpy()[row[low[of_shard]]])
        is_bad = (gap > allowed)[group]
        # All shards that hold such a key: nothing tells which of them is right.
        bad_shards, first = np.unique(shard[order][is_bad], return_index=True)
        contradicting = []
        for bad, i in zip(bad_shards, group[is_bad][first], strict=True):
            one, other = self._records[shard[low[i]]], self._records[shard[high[i]]]
            holders = f"{self._folder / one.file} and {other.file} hold different log-probs of one sequence"
            if one is other:
                holders = f"{self._folder / one.file} holds two different log-probs for one sequence"
            values = f"{value[low[i]]:.6g} and {value[high[i]]:.6g}"
            reason = f"{holders}, {values}, where rounding explains {allowed[i]:.2g}"
            contradicting.append((self._records[bad], reason))
        return contradicting
