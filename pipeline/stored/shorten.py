"""Shorter answers out of longer ones: what a length that was cut needs is often in the cache already.

A model that reads from left to right gives an answer's tokens the same log-probs whatever follows them. So where
prepare.too_long: keep_start has cut an answer, and the cache holds it whole or cut farther on, its row is the beginning
of that one's list. The longer row is found by its own key, made of the prompt, what was kept and what was cut off: what
is served was scored from exactly these tokens, under exactly these numerics.

Of several longer rows it is the longest. That one is nearly always the whole answer or the last scoring's length, so it
is looked for first; only for answers that do not have it are all other lengths tried that the cache has.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import IntegrityError
from pipeline.schema import CACHE, KEY, keys_of_prefixes
from pipeline.stored.cache import Cache
from pipeline.stored.keys import KeyIndex, Keys, concat, keys_of
from pipeline.stored.prepared import IdLists, answers_of

# What is in memory at once: keys that are tried, and log-probs of a table.
_KEYS_AT_ONCE = 1 << 22
_TOKENS_AT_ONCE = 1 << 20
_LENGTH = 32  # bits of an answer's length, below those of its prompt's


def rows(examples: pa.Table, missing_slots: np.ndarray, cache: Cache, accepted: Sequence[str]) -> Iterator[pa.Table]:
    """Rows for those of the missing sequences that the cache has a longer one of: tables of one numerics_id each.

    Slots are those of prepared.Sequences. The numerics named first win. A shard that turns out to be damaged serves
    nothing and is noted in cache.damaged.
    """
    cut = _CutAnswers(examples, np.asarray(missing_slots, np.int64))
    waiting = np.arange(len(cut))
    for numerics_id in accepted:
        shards = [record for record in cache.records if record["numerics_id"] == numerics_id]
        if not len(waiting) or not shards:
            continue
        found = _longest(cut, waiting, cache, shards)
        yield from _tables(cut, found, cache, shards)
        waiting = waiting[~np.isin(cut.rank[waiting], cut.rank[found.answer])]


def any_cut(examples: pa.Table) -> bool:
    """Whether there is anything here for `rows` to find."""
    names = [f"{name}_cut_ids" for name in answers_of(examples)]
    return any(
        len(chunk.flatten()) for name in names if name in examples.column_names for chunk in examples[name].chunks
    )


class _CutAnswers:
    """The missing sequences that were cut. Those of one key may have lost different ends: each is an answer here."""

    def __init__(self, examples: pa.Table, missing_slots: np.ndarray) -> None:
        # What was prepared before ends were kept has no such columns.
        names = [name for name in answers_of(examples) if f"{name}_cut_ids" in examples.column_names]
        keys = [keys_of([examples[f"{name}_key"]]) for name in names]
        cut = [_where_cut(examples, name, side) for side, name in enumerate(names)]
        by_side = [missing_slots[missing_slots % 2 == side] // 2 for side in range(len(names))]
        index = KeyIndex(concat([of_side.take(rows) for of_side, rows in zip(keys, by_side, strict=True)]))
        columns = np.concatenate([np.empty((4, 0), np.int64), *cut], axis=1)
        # By keys, not by slots: of sequences that are equal, one is missing for all.
        at, rank = index.find(concat([of_side.take(rows[0] // 2) for of_side, rows in zip(keys, cut, strict=True)]))
        in_place = np.argsort(columns[0, at])  # so that ids are read one after the other
        self.slot, self.n_prompt, self.n_kept, self.n_cut = columns[:, at[in_place]]
        self.rank, self._keys = rank[in_place], index.keys
        self._prompts = IdLists(examples["prompt_ids"])
        self._kept = [IdLists(examples[f"{name}_ids"]) for name in names]
        self._cut_off = [IdLists(examples[f"{name}_cut_ids"]) for name in names]

    def __len__(self) -> int:
        return len(self.slot)

    def keys(self, answers: np.ndarray) -> pa.Array:
        keys = self._keys.take(self.rank[answers])
        halves = np.stack((keys.high, keys.low), axis=1).astype(">u8")
        return pa.FixedSizeBinaryArray.from_buffers(KEY, len(keys), [None, pa.py_buffer(halves.tobytes())])

    def longer_keys(self, answer: int, lengths: Sequence[int]) -> bytes:
        """The keys of this answer as it would be at these lengths, one after the other."""
        row, side = divmod(int(self.slot[answer]), 2)
        whole = np.concatenate([self._kept[side][row], self._cut_off[side][row][: lengths[-1]]])
        return b"".join(keys_of_prefixes(self._prompts[row].tobytes(), whole.tobytes(), lengths))


def _where_cut(examples: pa.Table, name: str, side: int) -> np.ndarray:
    """Slot, tokens of the prompt, kept and cut off, of each of these answers that was cut."""
    n_cut = pc.list_value_length(examples[f"{name}_cut_ids"]).fill_null(0).to_numpy()
    rows = np.flatnonzero(n_cut)
    n_prompt, n_kept = (examples[f"n_{of}"].fill_null(0).to_numpy()[rows] for of in ("prompt", name))
    return np.stack((2 * rows + side, n_prompt, n_kept, n_cut[rows])).astype(np.int64)


# -- which longer row ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Answers and where the longer row of each is."""

    answer: np.ndarray
    length: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    def take(self, chosen: np.ndarray) -> "_Found":
        return _Found(self.answer[chosen], self.length[chosen], self.shard[chosen], self.row[chosen])


def _joined(parts: Sequence[_Found]) -> _Found:
    nothing = np.empty(0, np.int64)
    columns = ([nothing, *(getattr(part, name) for part in parts)] for name in ("answer", "length", "shard", "row"))
    return _Found(*map(np.concatenate, columns))


def _longest(cut: _CutAnswers, waiting: np.ndarray, cache: Cache, shards: list[dict[str, Any]]) -> _Found:
    """One longer row for each key that has any."""
    known = _known_lengths(cache, shards)
    prompt = cut.n_prompt[waiting] << _LENGTH
    begin = np.searchsorted(known, prompt + cut.n_kept[waiting], side="right")
    end = np.searchsorted(known, prompt + cut.n_kept[waiting] + cut.n_cut[waiting], side="right")
    last = np.maximum(end - 1, begin)
    first = _among(cut, waiting, known, last, end, cache, shards)
    # What shares its key with an answer that was found may still have a longer row: it has lost another end.
    rest = ~np.isin(waiting, first.answer)
    others = _among(cut, waiting[rest], known, begin[rest], last[rest], cache, shards)
    found = _joined([first, others])
    found = found.take(np.lexsort((found.answer, -found.length, cut.rank[found.answer])))
    return found.take(np.unique(cut.rank[found.answer], return_index=True)[1])


def _known_lengths(cache: Cache, shards: list[dict[str, Any]]) -> np.ndarray:
    """The lengths of prompt and answer that occur together, each pair as a number, ascending."""
    pairs = [np.empty(0, np.int64)]
    for record in shards:
        table = _read(cache, record, ["n_prompt", "n_completion"])
        if table is not None:
            n_prompt, n_completion = (column.to_numpy().astype(np.int64) for column in table.columns)
            pairs.append(np.unique((n_prompt << _LENGTH) + n_completion))
    return np.unique(np.concatenate(pairs))


def _among(
    cut: _CutAnswers,
    answers: np.ndarray,
    known: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    cache: Cache,
    shards: list[dict[str, Any]],
) -> _Found:
    """All rows that are one of these answers at one of its lengths, known[begin:end]."""
    parts, until = [], np.cumsum(end - begin)
    blocks = np.split(np.arange(len(answers)), np.flatnonzero(np.diff(until // _KEYS_AT_ONCE)) + 1)
    for block in blocks:
        some = block[end[block] > begin[block]]
        if not len(some):
            continue
        ranges = [known[begin[i] : end[i]] & ((1 << _LENGTH) - 1) for i in some]
        keys = b"".join(
            cut.longer_keys(answer, lengths.tolist()) for answer, lengths in zip(answers[some], ranges, strict=True)
        )
        tried = np.repeat(answers[some], (end - begin)[some])
        parts.append(_looked_up(keys, tried, np.concatenate(ranges), cache, shards))
    return _joined(parts)


def _looked_up(
    keys: bytes, answer: np.ndarray, length: np.ndarray, cache: Cache, shards: list[dict[str, Any]]
) -> _Found:
    halves = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)
    index = KeyIndex(Keys(halves[:, 0].copy(), halves[:, 1].copy()))
    length_K, shard_K, row_K = (np.full(len(index), -1, np.int64) for _ in range(3))
    length_K[index.rank] = length
    for number, record in enumerate(shards):
        found = _usable(index, length_K, cache, record)
        if found is not None:
            rows, ranks = found
            new = shard_K[ranks] < 0
            shard_K[ranks[new]], row_K[ranks[new]] = number, rows[new]
    hit = shard_K[index.rank] >= 0
    ranks = index.rank[hit]
    return _Found(answer[hit], length[hit], shard_K[ranks], row_K[ranks])


def _usable(
    index: KeyIndex, length_K: np.ndarray, cache: Cache, record: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows of a shard that are looked for and have a value for each token, and the ranks of their keys."""
    try:
        keys, sums = cache.values(record)
    except (IntegrityError, FileNotFoundError) as error:
        _note(cache, record, error)
        return None
    rows, ranks = index.find(keys)
    has_value = ~np.isnan(sums[rows])
    rows, ranks = rows[has_value], ranks[has_value]
    if not len(rows) or (table := _read(cache, record, ["logps"])) is None:
        return None
    lists = IdLists(table["logps"])
    # Lists are vouched for by their pages alone, sums by the record: where the two are at odds, nothing is cut.
    whole = np.array(
        [
            len(logps := lists[row]) == n
            and math.isclose(logps.sum(dtype=np.float64), total, rel_tol=1e-6, abs_tol=1e-6)
            for row, n, total in zip(rows.tolist(), length_K[ranks], sums[rows], strict=True)
        ]
    )
    return rows[whole], ranks[whole]


# -- rows ------------------------------------------------------------------------------------------------------------


def _tables(cut: _CutAnswers, found: _Found, cache: Cache, shards: list[dict[str, Any]]) -> Iterator[pa.Table]:
    found = found.take(np.lexsort((found.row, found.shard)))
    made: list[pa.Table] = []
    n_tokens = 0
    for at in np.split(np.arange(len(found.shard)), np.flatnonzero(np.diff(found.shard)) + 1):
        record = shards[found.shard[at[0]]] if len(at) else None
        if record is None or (table := _read(cache, record, ["logps", "status"])) is None:
            continue
        until = np.cumsum(cut.n_kept[found.answer[at]])
        for some in np.split(at, np.flatnonzero(np.diff(until // _TOKENS_AT_ONCE)) + 1):
            made.append(_table(cut, found.take(some), table, record["numerics_id"]))
            n_tokens += int(cut.n_kept[found.answer[some]].sum())
            if n_tokens >= _TOKENS_AT_ONCE:
                yield pa.concat_tables(made)
                made, n_tokens = [], 0
    if made:
        yield pa.concat_tables(made)


def _table(cut: _CutAnswers, found: _Found, longer: pa.Table, numerics_id: str) -> pa.Table:
    lists, n_kept = IdLists(longer["logps"]), cut.n_kept[found.answer]
    logps = [lists[row][:n] for row, n in zip(found.row.tolist(), n_kept.tolist(), strict=True)]
    columns = {
        "key": cut.keys(found.answer),
        "n_prompt": cut.n_prompt[found.answer],
        "n_completion": n_kept,
        "logp_sum": [float(each.sum(dtype=np.float64)) for each in logps],
        "logps": pa.ListArray.from_arrays(np.cumsum([0, *n_kept], dtype=np.int32), np.concatenate(logps)),
        "numerics_id": [numerics_id] * len(logps),
        "status": longer["status"].take(found.row).to_pylist(),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in CACHE], schema=CACHE)


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(cache: Cache, record: dict[str, Any], columns: list[str]) -> pa.Table | None:
    try:
        return cache.read(record, columns)
    except (IntegrityError, FileNotFoundError) as error:
        _note(cache, record, error)
        return None


def _note(cache: Cache, record: dict[str, Any], error: Exception) -> None:
    """A shard that cannot be read serves nothing. Where its record is gone too, it was merged into another meanwhile."""
    path = cache.record_path(record)
    if path.exists():
        gone = f"{cache.folder / record['file']} is missing"
        cache.damaged.setdefault(path, str(error) if isinstance(error, IntegrityError) else gone)
