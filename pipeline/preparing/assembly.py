"""From finished parts to the prepared folder: duplicates, weights, mismatched answers, shards, and the manifest last.

Here everything is decided that depends on more than one part. It is decided from small columns of all parts (hashes,
in numpy); the rows themselves stream from part to shard, so memory does not grow with the data.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Prepare
from pipeline.errors import DataError
from pipeline.preparing import parts
from pipeline.schema import HELD_OUT, PREPARED, QUARANTINE, TRAIN, key_of_bytes
from pipeline.stored import artifact

_ROWS_AT_ONCE = 8192
_NEIGHBOURS = 64
_NOBODY = -1


@dataclass
class Parts:
    """The finished parts of one preparation, in order."""

    folder: Path
    records: list[dict[str, Any]]
    starts: np.ndarray = field(init=False)  # number of rows before each part

    def __post_init__(self) -> None:
        rows = [record["table"]["rows"] for record in self.records]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    @contextlib.contextmanager
    def table(self, number: int) -> Iterator[pa.Table]:
        """Memory-mapped for as long as it is used: pages of all parts at once would count as this process's memory."""
        with pa.memory_map(str(parts.table_file(self.folder, number))) as mapped:
            yield pa.ipc.open_stream(mapped).read_all()

    def column(self, name: str, read: Callable[[pa.ChunkedArray], np.ndarray], dtype: Any = np.uint64) -> np.ndarray:
        """One column of all parts, as `read` makes numbers of it."""
        whole = np.empty(self.n_rows, dtype)
        for number in range(len(self.records)):
            with self.table(number) as table:
                whole[self.starts[number] : self.starts[number + 1]] = read(table[name])
        return whole

    def per_row(self, values: list[Any]) -> np.ndarray:
        """A value per part, for every row of it."""
        return np.repeat(np.asarray(values), np.diff(self.starts))

    def summed(self, name: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record[name])
        return dict(sorted((what, n) for what, n in total.items() if n))


def commit_quarantine(path: Path, made: Parts) -> dict[str, Any]:
    """Every record that could not be used, in the order of the input."""
    rows = 0
    with artifact.commit_stream(path) as stream:
        options = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(pa.PythonFile(stream, "w"), QUARANTINE, **options) as writer:
            for record in made.records:
                if record["quarantine"]["rows"]:
                    table = artifact.open_arrow_stream(made.folder / record["quarantine"]["file"])
                    writer.write_table(table)
                    rows += len(table)
    return stream.entry(path, rows=rows)


def commit_shards(
    folder: Path, made: Parts, kind: str, generation: str, prepare: Prepare, weights: list[float]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The shards of both splits, and what was done to the rows on the way."""
    ids, held_out = made.column("example_id", _hex_numbers), made.column("split", _is_held_out, bool)
    whole_ids = made.column("whole_id", pa.ChunkedArray.to_numpy)
    copies, done = _copies(ids, whole_ids, held_out, made.per_row(weights), prepare)
    if not copies.any():
        raise DataError(f"None of {len(copies):,} examples is left: the weights of their sources are too small.")
    mismatched = _Mismatched(made, ids, whole_ids, copies > 0, prepare) if kind == "labels" else None
    copies_before = _before(ids, copies)
    with contextlib.ExitStack() as stack:
        shards = {
            split: stack.enter_context(_Shards(folder, split, generation, kind, prepare.rows_per_shard))
            for split in (TRAIN, HELD_OUT)
        }
        for number in range(len(made.records)):
            begin, end = made.starts[number], made.starts[number + 1]
            with made.table(number) as table:
                for split, wanted in ((TRAIN, ~held_out[begin:end]), (HELD_OUT, held_out[begin:end])):
                    rows = begin + np.repeat(np.arange(end - begin), copies[begin:end] * wanted)
                    names = copies_before[rows] + _before(rows, np.ones_like(rows))
                    for at in range(0, len(rows), _ROWS_AT_ONCE):
                        some = slice(at, at + _ROWS_AT_ONCE)
                        block = _named(table.take(rows[some] - begin), names[some])
                        block = mismatched.beside(block, rows[some]) if mismatched else block
                        shards[split].write(block.select(PREPARED[kind].names))
    if mismatched and prepare.kl_pairs:
        done["unmatched"] = mismatched.n_without
    return [entry for each in shards.values() for entry in each.entries], done


def _is_held_out(splits: pa.ChunkedArray) -> np.ndarray:
    held_out: np.ndarray = np.asarray(splits.to_numpy(zero_copy_only=False)) == HELD_OUT
    return held_out


def _hex_numbers(values: pa.ChunkedArray) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(values.to_pylist())), ">u8")


# -- which rows, how often, under which name -------------------------------------------------------------------------


def _copies(
    ids: np.ndarray, whole_ids: np.ndarray, held_out: np.ndarray, weights: np.ndarray, prepare: Prepare
) -> tuple[np.ndarray, dict[str, int]]:
    """How often each row is used: the whole part of its source's weight, and once more for the rest's share of ids.

    A held-out row is used once where it is used at all: the same pair twice says nothing more about a policy.
    """
    whole = np.floor(weights).astype(np.int64)
    copies = whole + (_mixed(whole_ids, prepare.seed) / 2.0**64 < weights - whole)
    copies = np.where(held_out, np.minimum(copies, 1), copies)
    # Of an earlier one that is used: what a weight left out takes no other's place.
    again = (copies > 0) & (_before(ids, (copies > 0).astype(np.int64)) > 0)
    done = {"duplicates": int(again.sum()), "left_out": int((copies == 0).sum())}
    if prepare.duplicates == "drop":
        done["dropped"] = int(again.sum())
        copies[again] = 0
    done["repeated"] = int(np.maximum(copies - 1, 0).sum())
    return copies, done


def _before(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each row, the sum of the counts of earlier rows with its id."""
    if not len(ids):
        return np.zeros(0, np.int64)
    order = np.argsort(ids, kind="stable")
    sums = np.cumsum(counts[order]) - counts[order]
    new = np.concatenate([[True], ids[order][1:] != ids[order][:-1]])
    before = np.empty(len(ids), np.int64)
    before[order] = sums - np.maximum.accumulate(np.where(new, sums, 0))
    return before


def _named(block: pa.Table, numbers: np.ndarray) -> pa.Table:
    """Copies of one example get names of their own: the second is `ID-2`."""
    if not numbers.any():
        return block
    names = [f"{name}-{n + 1}" if n else name for name, n in zip(block["example_id"].to_pylist(), numbers, strict=True)]
    at = block.schema.get_field_index("example_id")
    return block.set_column(at, block.schema.field(at), pa.array(names, pa.string()))


def _mixed(ids: np.ndarray, seed: int) -> np.ndarray:
    """Another hash of each id for each seed (the finalizer of MurmurHash3)."""
    with np.errstate(over="ignore"):
        x = ids ^ (np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019))
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
        mixed: np.ndarray = x ^ (x >> np.uint64(33))
        return mixed


# -- mismatched answers ----------------------------------------------------------------------------------------------


class _Mismatched:
    """For each label, another example's answer: what KTO's estimate of the divergence is taken over.

    All examples stand in a ring in the order of a hash of seed and id; each takes the answer of the next one that has
    another prompt and another answer. So the choice depends on the data and the seed, not on shards or workers, and not
    on where answers are cut.
    """

    def __init__(self, made: Parts, ids: np.ndarray, whole_ids: np.ndarray, used: np.ndarray, prepare: Prepare) -> None:
        self._made, self._max_length = made, prepare.max_length
        self._ids, self.n_without = ids, 0
        self.partner = np.full(len(ids), _NOBODY, np.int64)
        if prepare.kl_pairs and used.any():
            rows = np.flatnonzero(used)
            ring = rows[np.lexsort((rows, _mixed(whole_ids[rows], prepare.seed)))]
            hashes = {
                name: made.column(name, pa.ChunkedArray.to_numpy)[ring]
                for name in ("prompt_hash", "text_hash", "ids_hash")
            }
            self.partner[ring] = _next_in_ring(ring, **hashes)

    def beside(self, block: pa.Table, rows: np.ndarray) -> pa.Table:
        """The block with the columns of the mismatched answers."""
        partners = self.partner[rows]
        answers = self._answers(partners)
        prompts = block["prompt_ids"].to_pylist()
        of, ids, cut_ids, keys = [], [], [], []
        for partner, prompt, own, (whole, n_kept) in zip(
            partners, prompts, block["completion_ids"].to_pylist(), answers, strict=True
        ):
            answer = whole[: min(n_kept, self._max_length - len(prompt))]
            # Cut to the length that is left, it may have become the row's own.
            known = partner != _NOBODY and len(answer) > 0 and answer.tolist() != own
            self.n_without += not known
            of.append(f"{self._ids[partner]:016x}" if known else None)
            ids.append(answer if known else None)
            cut_ids.append(whole[len(answer) :] if known else None)
            keys.append(key_of_bytes(np.asarray(prompt, "<i4").tobytes(), answer.tobytes()) if known else None)
        n_kl = [None if i is None else len(i) for i in ids]
        columns = {"kl_of": of, "kl_ids": ids, "kl_cut_ids": cut_ids, "kl_key": keys, "n_kl": n_kl}
        schema = PREPARED["labels"]
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else block[f.name].combine_chunks() for f in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _answers(self, partners: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """The answers of these rows, which may be in any part: whole, and how many of their tokens were kept."""
        answers: list[tuple[np.ndarray, int]] = [(np.empty(0, np.int32), 0)] * len(partners)
        part_of = np.searchsorted(self._made.starts, partners, side="right") - 1
        for number in np.unique(part_of[partners != _NOBODY]):
            at = np.flatnonzero((part_of == number) & (partners != _NOBODY))
            with self._made.table(int(number)) as table:
                taken = table.select(["completion_ids", "completion_cut_ids"]).take(
                    partners[at] - self._made.starts[number]
                )
                for where, kept, cut in zip(at, *(column.to_pylist() for column in taken.columns), strict=True):
                    answers[where] = np.asarray(kept + cut, "<i4"), len(kept)
        return answers


def _next_in_ring(ring: np.ndarray, prompt_hash: np.ndarray, text_hash: np.ndarray, ids_hash: np.ndarray) -> np.ndarray:
    n = len(ring)
    partner = np.full(n, _NOBODY, np.int64)

    def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        apart: np.ndarray = (text_hash[a] != text_hash[b]) & (ids_hash[a] != ids_hash[b])
        return apart

    waiting = np.arange(n)
    for step in range(1, min(n, _NEIGHBOURS + 1)):
        other = (waiting + step) % n
        fits = differs(waiting, other) & (prompt_hash[waiting] != prompt_hash[other])
        partner[waiting[fits]] = ring[other[fits]]
        waiting = waiting[~fits]
    # Where the neighbours are all of one prompt or one answer, any other answer has to do.
    for candidate in _distinct(text_hash, ids_hash):
        other = np.full(len(waiting), candidate)
        fits = differs(waiting, other)
        partner[waiting[fits]] = ring[candidate]
        waiting = waiting[~fits]
    return partner


def _distinct(text_hash: np.ndarray, ids_hash: np.ndarray) -> list[int]:
    """Two examples whose answers differ, if there are any: one of them differs from whatever answer one has."""
    others = np.flatnonzero((text_hash != text_hash[0]) & (ids_hash != ids_hash[0]))
    return [0, int(others[0])] if len(others) else []


# -- shards ----------------------------------------------------------------------------------------------------------


class _Shards:
    """The shards of one split, each written as it fills."""

    def __init__(self, folder: Path, split: str, generation: str, kind: str, rows_per_shard: int) -> None:
        self._folder, self._split, self._generation = folder, split, generation
        self._schema, self._rows_per_shard = PREPARED[kind], rows_per_shard
        self._open: contextlib.ExitStack | None = None
        self._stream: artifact.Stream
        self._writer: Any = None
        self._rows = 0
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._close()
        elif self._open:
            self._open.__exit__(kind, error, trace)

    def write(self, block: pa.Table) -> None:
        while len(block):
            if self._open is None:
                self._begin()
            room = self._rows_per_shard - self._rows
            self._writer.write_table(block.slice(0, room).combine_chunks())
            self._rows += min(room, len(block))
            block = block.slice(room)
            if self._rows == self._rows_per_shard:
                self._close()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._split}-{self._generation}-{len(self.entries):05}.arrow"

    def _begin(self) -> None:
        self._open = contextlib.ExitStack()
        self._stream = self._open.enter_context(artifact.commit_stream(self._path))
        self._writer = self._open.enter_context(pa.ipc.new_stream(pa.PythonFile(self._stream, "w"), self._schema))

    def _close(self) -> None:
        if self._open is not None:
            path, rows = self._path, self._rows
            self._open.close()
            self.entries.append(self._stream.entry(path, split=self._split, rows=rows))
            self._open, self._rows = None, 0
