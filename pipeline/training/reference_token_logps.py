"""The reference's log-prob of every answer token, for settings that weigh tokens one by one (train.tokens).

They are read from the cache into one flat array, only if something needs them. Shapes: K distinct keys.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys

# Times that reading starts over because shards were merged meanwhile.
_TRIES = 5


class TokenLogps:
    """The log-probs of the answer tokens of each row of a column of keys; empty if there are none."""

    def __init__(self, rank: np.ndarray, starts: np.ndarray, values: np.ndarray) -> None:
        self._rank, self._starts, self._values = rank, starts, values

    def __getitem__(self, row: int) -> np.ndarray:
        rank = self._rank[row]
        logps: np.ndarray = self._values[self._starts[rank] : self._starts[rank + 1]]
        return logps

    @property
    def lengths(self) -> np.ndarray:
        lengths: np.ndarray = np.diff(self._starts)[self._rank]
        return lengths


def token_logps(
    cache: Cache, columns: Sequence[pa.ChunkedArray], sums: Sequence[np.ma.MaskedArray], accepted: Sequence[str]
) -> list[TokenLogps]:
    """Read the tokens' log-probs for columns of keys, from the rows whose `sums` the cache served."""
    for _ in range(_TRIES):
        try:
            return _read(cache, columns, sums, accepted)
        except FileNotFoundError:  # merged into a larger shard since it was listed
            cache = cache.reopen()
    raise IntegrityError(f"{cache.folder} kept changing while it was read. Run the same command again.")


def _read(
    cache: Cache, columns: Sequence[pa.ChunkedArray], sums: Sequence[np.ma.MaskedArray], accepted: Sequence[str]
) -> list[TokenLogps]:
    index = KeyIndex(read_keys(columns))
    sum_K = np.full(len(index), np.nan)
    # A null's placeholder may be the key of another row, which has a value.
    np.fmax.at(sum_K, index.rank, np.concatenate([np.ma.filled(values, np.nan) for values in sums]))
    parts, n_K, file_without = [], np.zeros(len(index), np.int64), ""
    # The numerics named first win, as they do for the sums.
    records = (record for id_ in accepted for record in cache.records if record.numerics_id == id_)
    for record in records:
        table = cache.read(record, ["key", "n_completion", "logp_sum", "logps"])
        rows, ranks = index.find(read_keys([table["key"]]))
        # If a sequence was scored twice: only the row whose sum is served, and only once.
        is_served = (table["logp_sum"].to_numpy()[rows] == sum_K[ranks]) & (n_K[ranks] == 0)
        has_tokens = is_served & table["logps"].is_valid().to_numpy()[rows]
        file_without = file_without or (record.file if (is_served & ~has_tokens).any() else "")
        lists = table["logps"].take(pa.array(rows[has_tokens])).combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        if (lengths != table["n_completion"].to_numpy()[rows[has_tokens]]).any():
            raise IntegrityError(
                f"{cache.folder / record.file} has a row with another number of log-probs than its answer has tokens. "
                f"Remove {cache.record_path(record)} and score again (prefcache score CONFIG): only what it held is computed."
            )
        n_K[ranks[has_tokens]] = lengths
        parts.append((ranks[has_tokens], lists.flatten().to_numpy()))
    if (~np.isnan(sum_K) & (n_K == 0)).any():
        if not file_without:
            raise IntegrityError(
                f"{cache.folder} has lost rows since it was opened. Score again (prefcache score CONFIG)."
            )
        raise UsageError(
            f"{cache.folder / file_without} has no values of single tokens: it was scored with score.logps: false, or imported as "
            "sums, and single ones are asked for (train.tokens, or show). Leave that out, or score again into another cache (--set "
            "cache=FOLDER --set score.logps=true), and pass both settings from then on."
        )
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_K)])
    values = np.empty(starts[-1], np.float32)
    for ranks, flat in parts:
        # The positions of each list: start, start + 1, ..., one list after another.
        lengths = n_K[ranks]
        offsets = starts[ranks] - (np.cumsum(lengths) - lengths)
        values[np.repeat(offsets, lengths) + np.arange(len(flat))] = flat
    ends = np.cumsum([0, *map(len, columns)])
    return [TokenLogps(index.rank[a:b], starts, values) for a, b in itertools.pairwise(ends)]
