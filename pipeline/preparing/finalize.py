"""From finished parts to the prepared folder: duplicates, weights, mismatched answers, shards, and the manifest last.

What depends on more than one part is decided here, from small columns of all parts (hashes, in numpy). The rows
themselves and their pictures stream from part to shard, so memory does not grow with the data.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.errors import DataError
from prefcache.pipeline.preparing import part_table, part_worker
from prefcache.pipeline.preparing.shard_writer import ShardWriter
from prefcache.pipeline.progress import counting
from prefcache.pipeline.schema import HELD_OUT, IMAGE_FILES, IMAGES, PREPARED, QUARANTINE, TRAIN, key_of_bytes
from prefcache.pipeline.spans import clip_spans, count_tokens
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import PartRecord

_BLOCK_ROWS = 8192
_NEIGHBOURS = 64
_NONE = -1
_KEY = "S16"  # schema.KEY in numpy
_IMAGE_SHARD_BYTES = 1 << 30


class Committed(NamedTuple):
    """What was written: entries of the manifest, and counts of what was done to the rows."""

    shards: list[dict[str, Any]]
    images: list[dict[str, Any]]
    done: dict[str, int]


@dataclass
class Parts:
    """The finished parts of one preparation, in order."""

    folder: Path
    records: list[PartRecord]
    starts: np.ndarray = field(init=False)  # number of rows before each part

    def __post_init__(self) -> None:
        rows = [record.table.rows for record in self.records]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    @contextlib.contextmanager
    def open_table(self, number: int) -> Iterator[pa.Table]:
        """Memory-map a part while it is used: pages of all parts at once would count as this process's memory."""
        with pa.memory_map(str(part_worker.table_file(self.folder, number))) as mapped:
            yield pa.ipc.open_stream(mapped).read_all()

    def read_column(
        self, name: str, to_numpy: Callable[[pa.ChunkedArray], np.ndarray] = pa.ChunkedArray.to_numpy, dtype: Any = "u8"
    ) -> np.ndarray:
        """Return one column of all parts."""
        column = np.empty(self.n_rows, dtype)
        for number in range(len(self.records)):
            with self.open_table(number) as table:
                column[self.starts[number] : self.starts[number + 1]] = to_numpy(table[name])
        return column

    def read_batches(self, name: Literal["images", "image_files"]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a further file of all parts, in their order."""
        for record in self.records:
            entry = getattr(record, name)
            if entry is not None:
                # Read and not mapped: the pages of a part's pictures would count as this process's memory.
                with pa.OSFile(str(self.folder / entry.file)) as file:
                    yield from pa.ipc.open_stream(file)

    def sum_counts(self, name: Literal["done", "quarantined"]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(getattr(record, name))
        return dict(sorted((what, n) for what, n in total.items() if n))


def commit_quarantine(path: Path, parts: Parts) -> dict[str, Any]:
    """Write every record that could not be used, in the order of the input."""
    n_rows = 0
    with artifact.commit_stream(path) as stream:
        options = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(pa.PythonFile(stream, "w"), QUARANTINE, **options) as writer:
            for record in parts.records:
                if record.quarantine.rows:
                    table = artifact.open_arrow_stream(parts.folder / record.quarantine.file)
                    # A part of an earlier version lacks columns.
                    table = pa.concat_tables([QUARANTINE.empty_table(), table], promote_options="default")
                    writer.write_table(table)
                    n_rows += len(table)
    return stream.entry(path, rows=n_rows)


def commit_shards(
    folder: Path, parts: Parts, kind: str, generation: str, prepare: Prepare, weights: list[float]
) -> Committed:
    """Write the shards of all splits, and their pictures.

    `weights` has one number per part.
    """
    names = (TRAIN, HELD_OUT, *prepare.held_out_data)
    ids = parts.read_column("example_id", lambda ids: np.frombuffer(bytes.fromhex("".join(ids.to_pylist())), ">u8"))
    splits = parts.read_column("split", lambda column: pc.index_in(column, pa.array(names)).to_numpy(), "i4")
    whole_ids = parts.read_column("whole_id")
    row_weights = np.repeat(np.asarray(weights), np.diff(parts.starts))
    # Evaluation data of its own changes nothing about the other examples, and loses none to them.
    groups = np.maximum(splits - 1, 0)
    copies, done = _count_copies(ids, whole_ids, splits, groups, row_weights, prepare)
    if not copies.any():
        raise DataError(f"None of {len(copies):,} examples is left: the weights of their sources are too small.")
    if n_leaked := _count_leaked(parts, splits, copies > 0):
        done["leaked"] = n_leaked
    rings = splits if prepare.kl_batch_size else groups  # a batch of TRL's has rows of one split
    mismatched = _MismatchedAnswers(parts, ids, whole_ids, copies > 0, rings, prepare) if kind == "labels" else None
    earlier_copies = _sum_earlier(ids, copies)
    with contextlib.ExitStack() as stack:
        counter = stack.enter_context(counting("put together", parts.n_rows, "examples"))
        shards = {
            split: stack.enter_context(
                ShardWriter(
                    folder,
                    f"{split}-{generation}-{{:05}}.arrow".format,
                    PREPARED[kind],
                    most_rows=prepare.rows_per_shard,
                    split=split,
                )
            )
            for split in names
        }
        for number in range(len(parts.records)):
            begin, end = parts.starts[number], parts.starts[number + 1]
            with parts.open_table(number) as table:
                for number_of_split, split in enumerate(names):
                    is_in_split = splits[begin:end] == number_of_split
                    rows = begin + np.repeat(np.arange(end - begin), copies[begin:end] * is_in_split)
                    copy_numbers = earlier_copies[rows] + _sum_earlier(rows, np.ones_like(rows))
                    for at in range(0, len(rows), _BLOCK_ROWS):
                        some = slice(at, at + _BLOCK_ROWS)
                        block = _name_copies(table.take(rows[some] - begin), copy_numbers[some])
                        block = mismatched.add_columns(block, rows[some]) if mismatched else block
                        shards[split].write(block.select(PREPARED[kind].names))
            counter.add(int(end - begin))
    if mismatched and prepare.kl_pairs:
        done["unmatched"] = mismatched.n_without
    entries = [entry for writer in shards.values() for entry in writer.entries]
    return Committed(entries, _commit_images(folder, parts, copies > 0, generation), done)


# -- images ----------------------------------------------------------------------------------------------------------


def _commit_images(folder: Path, parts: Parts, used: np.ndarray, generation: str) -> list[dict[str, Any]]:
    """Write the pictures of the rows that are used, each once, in the order of the parts."""
    if not any(record.images for record in parts.records):
        return []
    wanted = _find_used_images(parts, used)
    is_written = np.zeros(len(wanted), bool)
    # Neither name can be that of a split, which has no hyphen.
    name = f"image-bytes-{generation}-{{:05}}.arrow".format
    with ShardWriter(folder, name, IMAGES, most_bytes=_IMAGE_SHARD_BYTES) as writer:
        for batch in parts.read_batches("images"):
            ids = _to_keys(batch["image"])
            at = np.searchsorted(wanted, ids).clip(max=max(len(wanted) - 1, 0))
            is_next = (wanted[at] == ids) & ~is_written[at] if len(wanted) else np.zeros(len(ids), bool)
            is_written[at[is_next]] = True
            table = pa.Table.from_batches([batch.filter(pa.array(is_next))])
            # A part of an earlier version lacks a column.
            writer.write(pa.concat_tables([IMAGES.empty_table(), table], promote_options="default"))
    assert is_written.all(), "a part names pictures that it has not stored"
    return writer.entries


def _find_used_images(parts: Parts, used: np.ndarray) -> np.ndarray:
    """Return the ids of the pictures of the used rows, each once, sorted."""
    ids = [np.empty(0, _KEY)]
    for number in range(len(parts.records)):
        with parts.open_table(number) as table:
            rows = used[parts.starts[number] : parts.starts[number + 1]]
            named = pc.list_flatten(table["images"].filter(pa.array(rows)).combine_chunks())
            ids.append(np.unique(_to_keys(named)))
    return np.unique(np.concatenate(ids))


def _to_keys(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    data = column.buffers()[1]
    keys = np.frombuffer(data, _KEY) if data is not None else np.empty(0, _KEY)
    return keys[column.offset : column.offset + len(column)]


def commit_image_files(folder: Path, parts: Parts, generation: str) -> list[dict[str, Any]]:
    """Write which files of pictures were looked at, with their stamps."""
    if not any(record.image_files for record in parts.records):
        return []
    with ShardWriter(folder, f"image-files-{generation}-{{:05}}.arrow".format, IMAGE_FILES) as writer:
        for batch in parts.read_batches("image_files"):
            writer.write(pa.Table.from_batches([batch], IMAGE_FILES))
    return writer.entries


# -- which rows, how often, under which name -------------------------------------------------------------------------


def _count_copies(
    ids: np.ndarray,
    whole_ids: np.ndarray,
    splits: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    prepare: Prepare,
) -> tuple[np.ndarray, dict[str, int]]:
    """Count how often each row is used: its source's weight, whose fraction is the share of rows that get one more.

    An evaluated row is used once at most: the same pair twice says nothing more about a policy. Duplicates are those of a row
    of the same group.
    """
    whole = np.floor(weights).astype(np.int64)
    copies = whole + (_hash_with_seed(whole_ids, prepare.seed) / 2.0**64 < weights - whole)
    copies = np.where(splits > 0, np.minimum(copies, 1), copies)
    # A row is a duplicate of an earlier one that is used, not of one that a weight left out.
    ids_in_group = ids if not groups.any() else ids ^ _hash_with_seed(groups.astype(np.uint64), 0)
    is_duplicate = (copies > 0) & (_sum_earlier(ids_in_group, (copies > 0).astype(np.int64)) > 0)
    done = {"duplicates": int(is_duplicate.sum()), "left_out": int((copies == 0).sum())}
    if prepare.duplicates == "drop":
        done["dropped"] = int(is_duplicate.sum())
        copies[is_duplicate] = 0
    done["repeated"] = int(np.maximum(copies - 1, 0).sum())
    return copies, done


def _count_leaked(parts: Parts, splits: np.ndarray, used: np.ndarray) -> int:
    """Count the rows of evaluation data of its own whose prompt is also trained on."""
    own = used & (splits > 1)
    if not own.any():
        return 0
    prompts = parts.read_column(
        "prompt", lambda column: np.array([part_table.prompt_number(each) for each in column.to_pylist()], "u8")
    )
    return int(np.isin(prompts[own], prompts[used & (splits == 0)]).sum())


def _sum_earlier(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return for each row the sum of the counts of earlier rows with its id."""
    if not len(ids):
        return np.zeros(0, np.int64)
    order = np.argsort(ids, kind="stable")
    sums = np.cumsum(counts[order]) - counts[order]
    is_first = np.concatenate([[True], ids[order][1:] != ids[order][:-1]])
    earlier = np.empty(len(ids), np.int64)
    earlier[order] = sums - np.maximum.accumulate(np.where(is_first, sums, 0))
    return earlier


def _name_copies(block: pa.Table, numbers: np.ndarray) -> pa.Table:
    """Give copies of an example ids of their own: the second is `ID-2`."""
    if not numbers.any():
        return block
    names = [f"{name}-{n + 1}" if n else name for name, n in zip(block["example_id"].to_pylist(), numbers, strict=True)]
    at = block.schema.get_field_index("example_id")
    return block.set_column(at, block.schema.field(at), pa.array(names, pa.string()))


def _hash_with_seed(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return another hash of each id for each seed (the finalizer of MurmurHash3)."""
    with np.errstate(over="ignore"):
        x = ids ^ (np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019))
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
        hashes: np.ndarray = x ^ (x >> np.uint64(33))
        return hashes


# -- mismatched answers ----------------------------------------------------------------------------------------------


class _MismatchedAnswers:
    """For each label, another example's answer: what KTO's estimate of the divergence is taken over.

    All examples form a ring in the order of a hash of seed and id, each set of evaluation data one of its own; each takes the
    answer of the next one that has another prompt and another answer. With prepare.kl_batch_size, each split is a ring that is
    cut into batches, where the first row takes the answer of the last and each other one that of the row before. So the choice
    depends on the data and the seed, not on shards or workers, nor on where answers are cut.
    """

    def __init__(
        self,
        parts: Parts,
        ids: np.ndarray,
        whole_ids: np.ndarray,
        used: np.ndarray,
        groups: np.ndarray,
        prepare: Prepare,
    ) -> None:
        self._parts, self._ids, self._max_length = parts, ids, prepare.max_length
        self._by_batch = prepare.kl_batch_size is not None
        self.n_without = 0
        self._partners = np.full(len(ids), _NONE, np.int64)
        for group in np.unique(groups[used]) if prepare.kl_pairs else ():
            rows = np.flatnonzero(used & (groups == group))
            ring = rows[np.lexsort((rows, _hash_with_seed(whole_ids[rows], prepare.seed)))]
            if prepare.kl_batch_size:
                self._partners[ring] = _previous_in_batch(ring, prepare.kl_batch_size)
                continue
            hashes = {name: parts.read_column(name)[ring] for name in ("prompt_hash", "text_hash", "ids_hash")}
            self._partners[ring] = _next_in_ring(ring, **hashes)

    def add_columns(self, block: pa.Table, rows: np.ndarray) -> pa.Table:
        """Return the block with the columns of the mismatched answers."""
        partners = self._partners[rows]
        columns = [block[name].to_pylist() for name in ("prompt_ids", "images", "completion_ids")]
        kl_rows: list[dict[str, Any]] = []
        for partner, prompt, images, own, (whole, n_kept, spans) in zip(
            partners, *columns, self._read_answers(partners), strict=True
        ):
            room = self._max_length - len(prompt)
            # TRL cuts the whole anew, and takes an answer that is the row's own too.
            answer = whole[: room if self._by_batch else min(n_kept, room)]
            if spans[-1:] == [n_kept]:  # what was cut off it counts as its last token does
                spans = [*spans[:-1], len(whole)]
            kept_spans = clip_spans(spans, len(answer))
            # Cut to the length that is left, it may have become the row's own.
            is_own = not self._by_batch and answer.tolist() == own
            if partner == _NONE or not kept_spans or is_own:
                self.n_without += 1
                kl_rows.append({})
                continue
            key = key_of_bytes(np.asarray(prompt, "<i4").tobytes(), answer.tobytes(), images or ())
            of = f"{self._ids[partner]:016x}"
            cut = whole[len(answer) :]
            kl_rows.append({"kl_of": of, "kl_ids": answer, "kl_cut_ids": cut, "kl_key": key, "n_kl": len(answer)})
            kl_rows[-1] |= {"kl_spans": kept_spans, "n_kl_counted": count_tokens(kept_spans)}
        schema = PREPARED["labels"]
        arrays = [
            block[column.name].combine_chunks()
            if column.name in block.column_names
            else pa.array([row.get(column.name) for row in kl_rows], column.type)
            for column in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _read_answers(self, partners: np.ndarray) -> list[tuple[np.ndarray, int, list[int]]]:
        """Return the answers of these rows, which may be in any part: whole, how many of their tokens were kept, which count."""
        answers: list[tuple[np.ndarray, int, list[int]]] = [(np.empty(0, np.int32), 0, [])] * len(partners)
        parts = np.where(partners == _NONE, _NONE, np.searchsorted(self._parts.starts, partners, side="right") - 1)
        for number in np.unique(parts[parts != _NONE]):
            at = np.flatnonzero(parts == number)
            with self._parts.open_table(int(number)) as table:
                rows = partners[at] - self._parts.starts[number]
                columns = table.select(["completion_ids", "completion_cut_ids", "completion_spans"]).take(rows).columns
                for i, kept, cut, spans in zip(at, *(column.to_pylist() for column in columns), strict=True):
                    answers[i] = np.asarray(kept + cut, "<i4"), len(kept), spans
        return answers


def _previous_in_batch(ring: np.ndarray, size: int) -> np.ndarray:
    """Return for each row the one before it in its batch; for the first one the last. One that is alone has none."""
    batches = np.split(ring, range(size, len(ring), size))
    partners = np.concatenate([np.roll(batch, 1) for batch in batches])
    partners[partners == ring] = _NONE
    return partners


def _next_in_ring(ring: np.ndarray, prompt_hash: np.ndarray, text_hash: np.ndarray, ids_hash: np.ndarray) -> np.ndarray:
    n = len(ring)
    partners = np.full(n, _NONE, np.int64)

    def have_other_answers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        other: np.ndarray = (text_hash[a] != text_hash[b]) & (ids_hash[a] != ids_hash[b])
        return other

    waiting = np.arange(n)
    for step in range(1, min(n, _NEIGHBOURS + 1)):
        neighbours = (waiting + step) % n
        fits = have_other_answers(waiting, neighbours) & (prompt_hash[waiting] != prompt_hash[neighbours])
        partners[waiting[fits]] = ring[neighbours[fits]]
        waiting = waiting[~fits]
    # If the neighbours are all of one prompt or one answer, any other answer has to do. If two answers differ, at least
    # one of them differs from any given third.
    others = np.flatnonzero(have_other_answers(np.arange(n), np.zeros(n, np.int64)))
    for candidate in [0, int(others[0])] if len(others) else []:
        fits = have_other_answers(waiting, np.full(len(waiting), candidate))
        partners[waiting[fits]] = ring[candidate]
        waiting = waiting[~fits]
    return partners
