"""The reference's log-probs of the tokens that count, for answers of which only some do (spans.py).

Training and the views read sums here, so both see the same. An answer whose tokens all count has the sum that is cached, and no
list of it is read. Lists are read shard by shard, and only sums are kept. Shapes: K distinct keys, R rows, S spans of some rows.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.prepared import CountedTokens
from prefcache.pipeline.stored.token_logps import (
    SumsOnlyError,
    TokenLogps,
    ranges,
    retry_if_merged,
    served_lists,
    served_sums,
)


class CountedLogps:
    """The log-probs of the tokens that count, of each row."""

    def __init__(self, logps: TokenLogps, counted: CountedTokens) -> None:
        self._logps, self._counted = logps, counted

    def __getitem__(self, row: int) -> np.ndarray:
        logps, positions = self._logps[row], self._counted.positions(row)
        return logps[positions] if positions is not None and len(logps) else logps


def counted_sums(
    cache: Cache,
    keys: Sequence[pa.ChunkedArray],
    counted: Sequence[CountedTokens],
    sums: Sequence[np.ma.MaskedArray],
    accepted: Sequence[str],
) -> list[np.ma.MaskedArray]:
    """Sum the tokens that count, for columns of keys whose whole `sums` the cache served.

    UsageError where only sums are cached and some tokens of an answer do not count.
    """
    found, error = find_counted_sums(cache, keys, counted, sums, accepted)
    if error is not None:
        n_partial = sum(int(each.is_partial.sum()) for each in counted)
        raise UsageError(
            f"{n_partial:,} answers have tokens that do not count (prepare.train_on), and {error.file} has no log-probs of single "
            "tokens: it was scored with score.logps: false, or imported as sums. Set prepare.train_on to all, which counts every "
            "token and needs sums only, and prepare again; or score again into another cache (--set cache=FOLDER --set "
            "score.logps=true), and pass both settings from then on."
        )
    return found


def find_counted_sums(
    cache: Cache,
    keys: Sequence[pa.ChunkedArray],
    counted: Sequence[CountedTokens],
    sums: Sequence[np.ma.MaskedArray],
    accepted: Sequence[str],
) -> tuple[list[np.ma.MaskedArray], SumsOnlyError | None]:
    """Sum the tokens that count; mask sums of which only the whole is cached, and return which file is to blame."""
    partial = [
        np.flatnonzero(each.is_partial & ~np.ma.getmaskarray(values))
        for each, values in zip(counted, sums, strict=True)
    ]
    if not any(map(len, partial)):
        return list(sums), None
    rows = [pa.array(rows) for rows in partial]
    taken = [column.take(at) for column, at in zip(keys, rows, strict=True)]
    spans = _Spans([each.spans.take(at) for each, at in zip(counted, rows, strict=True)])
    n_tokens = np.concatenate([each.n_all[at] for each, at in zip(counted, partial, strict=True)])
    whole = [values[at] for values, at in zip(sums, partial, strict=True)]
    sums_R, error = retry_if_merged(cache, lambda cache: _sum_lists(cache, taken, whole, spans, n_tokens, accepted))
    found = []
    for values, at, sums_of_column in zip(
        sums, partial, np.split(sums_R, np.cumsum([*map(len, partial)])[:-1]), strict=True
    ):
        filled = np.ma.filled(values, np.nan).copy()
        filled[at] = sums_of_column
        found.append(np.ma.MaskedArray(filled, np.isnan(filled)))
    return found, error


def _sum_lists(
    cache: Cache,
    keys: Sequence[pa.ChunkedArray],
    whole: Sequence[np.ma.MaskedArray],
    spans: "_Spans",
    n_tokens: np.ndarray,
    accepted: Sequence[str],
) -> tuple[np.ndarray, SumsOnlyError | None]:
    index, sums_R = KeyIndex(read_keys(keys)), np.full(len(n_tokens), np.nan)
    # The rows of each key, for answers that several examples share.
    order = np.argsort(index.rank, kind="stable")
    first_K = np.searchsorted(index.rank[order], np.arange(len(index) + 1))
    try:
        for lists in served_lists(cache, index, served_sums(index, whole), accepted):
            n_rows = np.diff(first_K)[lists.ranks]
            rows = order[ranges(first_K[lists.ranks], n_rows)]
            if (np.repeat(lists.lengths, n_rows) != n_tokens[rows]).any():
                raise wrong_length(cache)
            starts = np.repeat(np.cumsum(lists.lengths) - lists.lengths, n_rows)
            sums_R[rows] = spans.sums(rows, starts, lists.values)
    except SumsOnlyError as error:
        return sums_R, error
    return sums_R, None


def wrong_length(cache: Cache) -> IntegrityError:
    return IntegrityError(
        f"{cache.place} has another number of log-probs for an answer than the answer has tokens: no scorer wrote that. Score "
        "again into another cache (--set cache=FOLDER)."
    )


class _Spans:
    """The spans of rows, flat."""

    def __init__(self, columns: Sequence[pa.ChunkedArray]) -> None:
        lists = [part for column in columns for part in column.chunks]
        flat = np.concatenate([np.empty(0, np.int64), *(part.flatten().to_numpy() for part in lists)])
        self._bounds_S2 = flat.reshape(-1, 2)
        self._n_R = np.concatenate([part.value_lengths().fill_null(0).to_numpy() for part in lists]) // 2
        self._first_R = np.cumsum(self._n_R) - self._n_R

    def sums(self, rows: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sum the spans of some rows, whose lists begin at `starts` in `values`. In float64, as the whole sums are."""
        n = self._n_R[rows]
        bounds_S2 = self._bounds_S2[ranges(self._first_R[rows], n)] + np.repeat(starts, n)[:, None]
        # Every second segment lies between two spans. A last one may begin where the values end.
        segments = (
            np.add.reduceat(np.append(values.astype(np.float64), 0.0), bounds_S2.ravel())
            if len(bounds_S2)
            else np.empty(0)
        )
        of_row = np.repeat(np.arange(len(rows)), n)
        sums: np.ndarray = np.bincount(of_row, segments[::2], minlength=len(rows))
        return sums
