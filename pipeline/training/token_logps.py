"""The reference's log-prob of every answer token, for what weighs tokens one by one.

Only what asks for them, which is train.tokens, pays for these: they are read from the cache into one flat array.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError, UsageError
from pipeline.stored.cache import Cache
from pipeline.stored.keys import KeyIndex, keys_of

# Times that reading starts over because shards were merged meanwhile.
_TRIES = 5


class TokenLogps:
    """Per row of a column of keys, the log-probs of that sequence's answer tokens. Empty where there are none."""

    def __init__(self, rank: np.ndarray, starts: np.ndarray, values: np.ndarray) -> None:
        self._rank, self._starts, self._values = rank, starts, values

    def __getitem__(self, row: int) -> np.ndarray:
        rank = self._rank[row]
        found: np.ndarray = self._values[self._starts[rank] : self._starts[rank + 1]]
        return found


def token_logps(
    cache: Cache, columns: Sequence[pa.ChunkedArray], sums: Sequence[np.ma.MaskedArray], accepted: Sequence[str]
) -> list[TokenLogps]:
    """Of each of several columns of keys. `sums` are what the cache served for them: the tokens are those of the same rows."""
    for _ in range(_TRIES):
        try:
            return _read(cache, columns, sums, accepted)
        except FileNotFoundError:  # merged into a larger shard since it was listed
            cache = cache.reopened()
    raise IntegrityError(f"{cache.folder} kept changing while it was read. Run the same command again.")


def _read(
    cache: Cache, columns: Sequence[pa.ChunkedArray], sums: Sequence[np.ma.MaskedArray], accepted: Sequence[str]
) -> list[TokenLogps]:
    index = KeyIndex(keys_of(columns))
    wanted_K = np.full(len(index), np.nan)
    # What stands for a null may be the key of another row, which has a value.
    np.fmax.at(wanted_K, index.rank, np.concatenate([np.ma.filled(each, np.nan) for each in sums]))
    parts, n_K, without = [], np.zeros(len(index), np.int64), ""
    # The numerics named first win, as they do for the sums.
    for numerics_id in accepted:
        for record in (each for each in cache.records if each["numerics_id"] == numerics_id):
            table = cache.read(record, ["key", "logp_sum", "logps"])
            at, ranks = index.find(keys_of([table["key"]]))
            # Of a sequence scored twice, the row whose sum is served; once.
            is_it = (table["logp_sum"].to_numpy()[at] == wanted_K[ranks]) & (n_K[ranks] == 0)
            has = is_it & table["logps"].is_valid().to_numpy()[at]
            without = without or (record["file"] if (is_it & ~has).any() else "")
            lists = table["logps"].take(pa.array(at[has])).combine_chunks()
            n_K[ranks[has]] = lists.value_lengths().to_numpy()
            parts.append((ranks[has], lists.flatten().to_numpy()))
    if (~np.isnan(wanted_K) & (n_K == 0)).any():
        if not without:
            raise IntegrityError(f"{cache.folder} has lost rows since it was opened. Score again (make score).")
        raise UsageError(
            f"{cache.folder / without} has no values of single tokens: it was scored with score.logps: false, or imported as "
            "sums, and single ones are asked for (train.tokens, or show). Leave that out, or score again into another cache (--set "
            "cache=FOLDER --set score.logps=true), and go on with the same settings."
        )
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_K)])
    values = np.empty(starts[-1], np.float32)
    for ranks, flat in parts:
        values[_places(starts[ranks], n_K[ranks])] = flat
    ends = np.cumsum([0, *map(len, columns)])
    return [TokenLogps(index.rank[a:b], starts, values) for a, b in itertools.pairwise(ends)]


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
