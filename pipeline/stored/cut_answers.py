"""Shorter answers out of longer ones: rows for answers that were cut, from rows that the cache has.

A model that reads from left to right gives an answer's tokens the same log-probs whatever follows them. So where
prepare.too_long: keep_start has cut an answer and the cache holds it whole, or cut at a greater length, its log-probs
are the beginning of that row's list. The longer row is found by its own key, made of the prompt, what was kept and what
was cut off: what is served was scored from exactly these tokens, under exactly these numerics.

Of several longer rows the longest is used. It nearly always is the whole answer or has the last scoring's length, so
that length is looked up first; all other lengths in the cache are tried only for answers that lack it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import CACHE, KEY, keys_of_prefixes
from prefcache.pipeline.stored import shards
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.contradictions import Contradictions
from prefcache.pipeline.stored.key_index import KeyIndex, Keys, concat, read_keys
from prefcache.pipeline.stored.prepared import IdLists, ImageLists, answer_names
from prefcache.pipeline.stored.records import ShardRecord

# What is in memory at once: keys that are tried, and log-probs of a table.
_KEYS_AT_ONCE = 1 << 22
_TOKENS_AT_ONCE = 1 << 20
_LENGTH = 32  # bits of an answer's length, below those of its prompt's


def find_rows(
    examples: pa.Table, missing_slots: np.ndarray, cache: Cache, accepted: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield rows for the missing sequences that the cache has a longer row of, in tables of one numerics_id each.

    Slots are those of prepared.Sequences. The numerics named first win. A shard that turns out to be damaged serves
    nothing and is noted in cache.damaged.
    """
    cut = _CutAnswers(examples, np.asarray(missing_slots, np.int64))
    waiting = np.arange(len(cut))
    for numerics_id in accepted:
        records = [record for record in cache.records if record.numerics_id == numerics_id]
        if len(waiting) and records:
            matches = _find_longest(cut, waiting, cache, records)
            yield from _build_rows(cut, matches, cache, records)
            waiting = waiting[~np.isin(cut.rank[waiting], cut.rank[matches.answer])]


def has_cut_answers(examples: pa.Table) -> bool:
    """Whether any answer was cut, so that `find_rows` may find something."""
    names = [f"{name}_cut_ids" for name in answer_names(examples)]
    return any(
        len(chunk.flatten()) for name in names if name in examples.column_names for chunk in examples[name].chunks
    )


class _CutAnswers:
    """The missing sequences that were cut. Those of one key may have lost different ends: each is an answer here."""

    def __init__(self, examples: pa.Table, missing_slots: np.ndarray) -> None:
        # Preparations of earlier versions did not keep the ends that they cut off.
        names = [name for name in answer_names(examples) if f"{name}_cut_ids" in examples.column_names]
        keys = [read_keys([examples[f"{name}_key"]]) for name in names]
        columns = [np.empty((4, 0), np.int64)]
        for side, name in enumerate(names):
            n_cut = pc.list_value_length(examples[f"{name}_cut_ids"]).fill_null(0).to_numpy()
            places = np.flatnonzero(n_cut)
            n_prompt, n_kept = (examples[f"n_{each}"].fill_null(0).to_numpy()[places] for each in ("prompt", name))
            columns.append(np.stack((2 * places + side, n_prompt, n_kept, n_cut[places])).astype(np.int64))
        missing = [missing_slots[missing_slots % 2 == side] // 2 for side in range(len(names))]
        index = KeyIndex(concat([each.take(places) for each, places in zip(keys, missing, strict=True)]))
        # By keys, not by slots: of equal sequences, one is missing for all.
        cut_keys = concat([each.take(cut[0] // 2) for each, cut in zip(keys, columns[1:], strict=True)])
        at, rank = index.find(cut_keys)
        table = np.concatenate(columns, axis=1)
        in_place = np.argsort(table[0, at])  # so that ids are read one after the other
        self.slot, self.n_prompt, self.n_kept, self.n_cut = table[:, at[in_place]]
        self.rank, self._keys = rank[in_place], index.keys
        self._prompts, self._images = IdLists(examples["prompt_ids"]), ImageLists(examples)
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
        return b"".join(keys_of_prefixes(self._prompts[row].tobytes(), whole.tobytes(), lengths, self._images[row]))


# -- which longer row ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matches:
    """Answers, and where the longer row of each is."""

    answer: np.ndarray
    length: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    def take(self, chosen: np.ndarray) -> "_Matches":
        return _Matches(self.answer[chosen], self.length[chosen], self.shard[chosen], self.row[chosen])


def _find_longest(cut: _CutAnswers, waiting: np.ndarray, cache: Cache, records: list[ShardRecord]) -> _Matches:
    """Find one longer row for each key that has any."""
    # The lengths of prompt and answer that occur together, each pair as one number, ascending.
    pairs = [np.empty(0, np.int64)]
    for record in records:
        if (table := _read(cache, record, ["n_prompt", "n_completion"])) is not None:
            n_prompt, n_completion = (column.to_numpy().astype(np.int64) for column in table.columns)
            pairs.append(np.unique((n_prompt << _LENGTH) + n_completion))
    known = np.unique(np.concatenate(pairs))
    kept = (cut.n_prompt[waiting] << _LENGTH) + cut.n_kept[waiting]
    begin = np.searchsorted(known, kept, side="right")
    end = np.searchsorted(known, kept + cut.n_cut[waiting], side="right")
    last = np.maximum(end - 1, begin)
    first = _try_lengths(cut, waiting, known, last, end, cache, records)
    # An answer that shares its key with a matched one may still have a longer row: it has lost another end.
    rest = ~np.isin(waiting, np.concatenate([np.empty(0, np.int64), *(each.answer for each in first)]))
    others = _try_lengths(cut, waiting[rest], known, begin[rest], last[rest], cache, records)
    nothing = np.empty(0, np.int64)
    columns = ([nothing, *(getattr(each, name) for each in [*first, *others])] for name in _Matches.__annotations__)
    matches = _Matches(*map(np.concatenate, columns))
    matches = matches.take(np.lexsort((matches.answer, -matches.length, cut.rank[matches.answer])))
    return matches.take(np.unique(cut.rank[matches.answer], return_index=True)[1])


def _try_lengths(
    cut: _CutAnswers,
    answers: np.ndarray,
    known: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    cache: Cache,
    records: list[ShardRecord],
) -> list[_Matches]:
    """Find all rows that are one of these answers at one of its lengths, known[begin:end]."""
    matches, until = [], np.cumsum(end - begin)
    for block in np.split(np.arange(len(answers)), np.flatnonzero(np.diff(until // _KEYS_AT_ONCE)) + 1):
        some = block[end[block] > begin[block]]
        if len(some):
            ranges = [known[begin[i] : end[i]] & ((1 << _LENGTH) - 1) for i in some]
            keys = b"".join(
                cut.longer_keys(answer, lengths.tolist()) for answer, lengths in zip(answers[some], ranges, strict=True)
            )
            tried = np.repeat(answers[some], (end - begin)[some])
            matches.append(_look_up(keys, tried, np.concatenate(ranges), cache, records))
    return matches


def _look_up(keys: bytes, answer: np.ndarray, length: np.ndarray, cache: Cache, records: list[ShardRecord]) -> _Matches:
    halves = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)
    index = KeyIndex(Keys(halves[:, 0].copy(), halves[:, 1].copy()))
    length_K, shard_K, row_K = (np.full(len(index), -1, np.int64) for _ in range(3))
    length_K[index.rank] = length
    candidates = Contradictions(cache.folder)
    for number, record in enumerate(records):
        if (usable := _find_usable(index, length_K, cache, record)) is not None:
            places, ranks, sums = usable
            candidates.add(record, ranks, places, sums)
            new = shard_K[ranks] < 0
            shard_K[ranks[new]], row_K[ranks[new]] = number, places[new]
    if contradicting := candidates.find():
        for record, reason in contradicting:
            cache.note_damage(record, reason)
        return _look_up(keys, answer, length, cache, [each for each in records if each in cache.records])
    hit = shard_K[index.rank] >= 0
    ranks = index.rank[hit]
    return _Matches(answer[hit], length[hit], shard_K[ranks], row_K[ranks])


def _find_usable(
    index: KeyIndex, length_K: np.ndarray, cache: Cache, record: ShardRecord
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The places of a shard's rows that are looked for and have a log-prob per token, their ranks, and their values."""
    try:
        keys, sums = shards.read_values(cache.folder, record)
    except (IntegrityError, FileNotFoundError) as error:
        _note_unreadable(cache, record, error)
        return None
    places, ranks = index.find(keys)
    has_value = ~np.isnan(sums[places])
    places, ranks = places[has_value], ranks[has_value]
    order = np.argsort(places)
    places, ranks = places[order], ranks[order]
    if not len(places) or (table := _read(cache, record, ["logps"], places)) is None:
        return None
    lists = IdLists(table["logps"])
    # Lists are covered by page checksums only, sums also by the record: where the two disagree, no value is derived.
    agrees = np.array(
        [
            len(logps := lists[i]) == n and math.isclose(logps.sum(dtype=np.float64), total, rel_tol=1e-6, abs_tol=1e-6)
            for i, (n, total) in enumerate(zip(length_K[ranks], sums[places], strict=True))
        ]
    )
    return places[agrees], ranks[agrees], sums[places[agrees]]


def _build_rows(cut: _CutAnswers, matches: _Matches, cache: Cache, records: list[ShardRecord]) -> Iterator[pa.Table]:
    matches = matches.take(np.lexsort((matches.row, matches.shard)))
    tables: list[pa.Table] = []
    n_tokens = 0
    for at in np.split(np.arange(len(matches.shard)), np.flatnonzero(np.diff(matches.shard)) + 1):
        record = records[matches.shard[at[0]]] if len(at) else None
        # One answer may be cut in several places, so rows may repeat.
        rows = np.unique(matches.row[at])
        if record is None or (longer := _read(cache, record, ["logps", "status"], rows)) is None:
            continue
        lists, until = IdLists(longer["logps"]), np.cumsum(cut.n_kept[matches.answer[at]])
        for some in np.split(at, np.flatnonzero(np.diff(until // _TOKENS_AT_ONCE)) + 1):
            answers, places = matches.answer[some], np.searchsorted(rows, matches.row[some])
            n_kept = cut.n_kept[answers]
            logps = [lists[place][:n] for place, n in zip(places.tolist(), n_kept.tolist(), strict=True)]
            columns = {
                "key": cut.keys(answers),
                "n_prompt": cut.n_prompt[answers],
                "n_completion": n_kept,
                "logp_sum": [float(each.sum(dtype=np.float64)) for each in logps],
                "logps": pa.ListArray.from_arrays(np.cumsum([0, *n_kept], dtype=np.int32), np.concatenate(logps)),
                "numerics_id": [record.numerics_id] * len(logps),
                "status": longer["status"].take(places).to_pylist(),
            }
            tables.append(pa.table([pa.array(columns[field.name], field.type) for field in CACHE], schema=CACHE))
            n_tokens += int(n_kept.sum())
            if n_tokens >= _TOKENS_AT_ONCE:
                yield pa.concat_tables(tables)
                tables, n_tokens = [], 0
    if tables:
        yield pa.concat_tables(tables)


def _read(cache: Cache, record: ShardRecord, columns: list[str], rows: np.ndarray | None = None) -> pa.Table | None:
    """Read columns of all rows of a shard, or of some, in ascending order; None if it cannot be read."""
    try:
        return cache.read(record, columns) if rows is None else cache.take(record, rows, columns)
    except (IntegrityError, FileNotFoundError) as error:
        _note_unreadable(cache, record, error)
        return None


def _note_unreadable(cache: Cache, record: ShardRecord, error: Exception) -> None:
    """Note damage, unless the record is gone too: then the shard was merged meanwhile."""
    if cache.record_path(record).exists():
        gone = f"{cache.place}/{record.file} is missing"
        cache.note_damage(record, str(error) if isinstance(error, IntegrityError) else gone)
