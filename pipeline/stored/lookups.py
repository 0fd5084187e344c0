"""What the cache holds for sequences of any order, with the missing ones said row by row.

Shapes: N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.token_logps import token_logps


@dataclass(frozen=True)
class Logps:
    """The cached log-probs of N sequences, in the order in which they were asked for."""

    sums: np.ndarray  # [N] float64: the log-prob of each completion; nan where there is none
    missing: np.ndarray  # [N] bool: the cache lacks the sequence; score it
    failed: np.ndarray  # [N] bool: it was scored, and has no finite log-prob
    tokens: pa.Array | None = (
        None  # a list per sequence: the log-prob of each completion token; null where there is none
    )

    def __len__(self) -> int:
        return len(self.sums)


def look_up(cache: Cache, keys: pa.ChunkedArray, accepted: Sequence[str], *, per_token: bool) -> Logps:
    """Look up the rows of `keys` under the accepted numerics."""
    (sums,) = cache.logps([keys], accepted)
    has_none_N = np.ma.getmaskarray(sums)
    failed_N = np.zeros(len(sums), bool)
    if has_none_N.any():
        index = KeyIndex(read_keys([keys]))
        has_row, _, _ = cache.find_rows(index, accepted)
        failed_N = has_none_N & has_row[index.rank]
    tokens = token_logps(cache, [keys], [sums], accepted)[0].to_arrow(has_none_N) if per_token else None
    return Logps(np.ma.filled(sums, np.nan), has_none_N & ~failed_N, failed_N, tokens)
