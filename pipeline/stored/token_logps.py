"""The reference's log-prob of every answer token, read from the cache only if something needs single tokens.

Shapes: K distinct keys.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.records import ShardRecord

T = TypeVar("T")

_LIST_COLUMNS = ("n_completion", "logps")
# Times that reading starts over because shards were merged meanwhile.
_TRIES = 5


class SumsOnlyError(UsageError):
    """Rows of `file` have sums alone, and log-probs of single tokens are asked for."""

    def __init__(self, file: str) -> None:
        self.file = file
        super().__init__(
            f"{file} has no values of single tokens: it was scored with score.logps: false, or imported as sums, and single ones "
            "are asked for (train.tokens, or show). Leave that out, or score again into another cache (--set cache=FOLDER --set "
            "score.logps=true), and pass both settings from then on."
        )


class TokenLogps:
    """The log-probs of the answer tokens for each row of a column of keys; empty for a row without any."""

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

    def to_arrow(self, is_null: np.ndarray) -> pa.Array:
        """One list for each row, null where `is_null` says so."""
        lengths = np.where(is_null, 0, self.lengths)
        values = self._values[ranges(self._starts[self._rank], lengths)]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(is_null))


def token_logps(
    cache: Cache, columns: Sequence[pa.ChunkedArray], sums: Sequence[np.ma.MaskedArray], accepted: Sequence[str]
) -> list[TokenLogps]:
    """Read the tokens' log-probs for columns of keys, from the rows whose `sums` the cache served."""
    index = KeyIndex(read_keys(columns))
    sum_K = served_sums(index, sums)

    def read(cache: Cache) -> list[TokenLogps]:
        lists, n_K = list(served_lists(cache, index, sum_K, accepted)), np.zeros(len(index), np.int64)
        for each in lists:
            n_K[each.ranks] = each.lengths
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_K)])
        values = np.empty(starts[-1], np.float32)
        for each in lists:
            values[ranges(starts[each.ranks], each.lengths)] = each.values
        ends = np.cumsum([0, *map(len, columns)])
        return [TokenLogps(index.rank[a:b], starts, values) for a, b in itertools.pairwise(ends)]

    return retry_if_merged(cache, read)


def served_sums(index: KeyIndex, sums: Sequence[np.ma.MaskedArray]) -> np.ndarray:
    """The sum that the cache served for each key, nan where there is none. Shape: [K]."""
    sum_K = np.full(len(index), np.nan)
    # A null's placeholder may be the key of another row, which has a value.
    np.fmax.at(sum_K, index.rank, np.concatenate([np.ma.filled(values, np.nan) for values in sums]))
    return sum_K


class ServedLists(NamedTuple):
    """The log-probs of some keys, one list after another."""

    ranks: np.ndarray
    lengths: np.ndarray
    values: np.ndarray


def served_lists(cache: Cache, index: KeyIndex, sum_K: np.ndarray, accepted: Sequence[str]) -> Iterator[ServedLists]:
    """Yield, shard by shard, the list of each key that has a sum; at the end SumsOnlyError, if rows have sums alone."""
    is_read_K, file_without = np.isnan(sum_K), ""
    # The numerics named first win, as they do for the sums.
    records = [record for id_ in accepted for record in cache.records if record.numerics_id == id_]
    served = [each for record in records if (each := _find_served(cache, record, index, sum_K)) is not None]
    cache.prefetch_rows([(each.record, each.rows) for each in served])
    with counting(f"read tokens of {cache.place}", sum(each.record.rows for each in served), "rows") as counter:
        for record, rows, ranks in served:
            counter.add(record.rows)
            # If a sequence was scored twice: only once.
            rows, ranks = rows[~is_read_K[ranks]], ranks[~is_read_K[ranks]]
            if not len(rows):
                continue
            table = cache.take(record, rows, _LIST_COLUMNS)
            has_tokens = table["logps"].is_valid().to_numpy()
            file_without = file_without or ("" if has_tokens.all() else record.file)
            lists = table["logps"].filter(pa.array(has_tokens)).combine_chunks()
            lengths = lists.value_lengths().to_numpy()
            if (lengths != table["n_completion"].to_numpy()[has_tokens]).any():
                raise IntegrityError(
                    f"{cache.place}/{record.file} has a row with another number of log-probs than its answer has tokens. "
                    f"Remove {cache.place}/{record.name} and score again (prefcache score CONFIG): only what it held is computed."
                )
            is_read_K[ranks[has_tokens]] = True
            yield ServedLists(ranks[has_tokens], lengths, lists.flatten().to_numpy())
    if not is_read_K.all():
        if file_without:
            raise SumsOnlyError(str(cache.folder / file_without))
        raise IntegrityError(f"{cache.place} has lost rows since it was opened. Score again (prefcache score CONFIG).")


class _ServedRows(NamedTuple):
    """The rows of a shard whose sums the cache serves: their places, ascending, and the ranks of their keys."""

    record: ShardRecord
    rows: np.ndarray
    ranks: np.ndarray


def _find_served(cache: Cache, record: ShardRecord, index: KeyIndex, sum_K: np.ndarray) -> _ServedRows | None:
    table = cache.read(record, ["key", "logp_sum"])
    rows, ranks = index.find(read_keys([table["key"]]))
    is_served = table["logp_sum"].to_numpy()[rows] == sum_K[ranks]
    rows, ranks = rows[is_served], ranks[is_served]
    order = np.argsort(rows)
    return _ServedRows(record, rows[order], ranks[order]) if len(rows) else None


def retry_if_merged(cache: Cache, read: Callable[[Cache], T]) -> T:
    """Return what `read` returns; start over where a shard was merged into a larger one since it was listed."""
    for _ in range(_TRIES):
        try:
            return read(cache)
        except FileNotFoundError:
            cache = cache.reopen()
    raise IntegrityError(f"{cache.place} kept changing while it was read. Run the same command again.")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one range after another."""
    offsets = starts - (np.cumsum(lengths) - lengths)
    positions: np.ndarray = np.repeat(offsets, lengths) + np.arange(lengths.sum())
    return positions
