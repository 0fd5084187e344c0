"""The prepared folder, as scoring and training read it: Arrow shards, the quarantine, and the manifest of both.

Shards are in the stream format, so `datasets.Dataset.from_file` memory-maps them. A new preparation writes shards of
other names and then switches the manifest, so a reader sees the old set or the new one, never a mixture.
"""

import bisect
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline import image_processor
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import ANSWERS, IDS, IMAGE_IDS, PREPARED, TokenSequence
from prefcache.pipeline.spans import counted_positions
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.images import StoredImages
from prefcache.pipeline.stored.records import PreparedManifest, ShardEntry

QUARANTINE_FILE = "quarantine.parquet"
# What prepare did besides reading: names in the manifest, and words to follow a number.
DONE = {
    "limited": "of the sources gave as many records as prepare.max_records allows; what may follow was not read",
    "duplicates": "have the tokens of an earlier example",
    "dropped": "of these were dropped",
    "left_out": "were left out by their source's weight",
    "repeated": "are repetitions, by their source's weight",
    "leaked": "of the evaluation data have a prompt that is also trained on",
    "unmatched": "have no mismatched answer: there is no other answer",
    "cut_prompts": "lost the oldest turns of their prompt (cut_prompt says how many tokens)",
    "cut_answers": "lost the end of an answer (cut_chosen, cut_rejected, cut_completion)",
    "ended": "got an end token, because the template writes none",
    "merged_system": "had a system message, for which the template has no place; it went before the first user turn",
    "unseen_tools": "have tools, which the template does not print",
    "dropped_thoughts": "answers lost thoughts in earlier turns, where the template does not print them",
    "unseen_thoughts": "have thoughts in a column of their own, which the template does not print",
    "image_marks": "have <image> in their prompt and no images, so that it stays text; name the column of the images: prepare.columns={images: COLUMN}",
    "plain_text": "are plain text, each put into the chat template as one turn; TRL takes text as it is (prepare.template: none)",
    "restored": "answers would have been changed by the template and were put in as they are",
}


class Prepared:
    """A finished preparation, verified and memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = PreparedManifest.find(folder)
        if manifest is None:
            raise UsageError(f"{folder} holds no finished preparation. Prepare first (prefcache prepare CONFIG).")
        self._remedy = f"Delete {folder} and prepare again (prefcache prepare CONFIG)."
        for entry in (*manifest.shards, *manifest.images):
            # Pictures may be a hundred times as large as all texts. Each is compared with its hash when it is decoded.
            if reason := artifact.damage(folder, entry, every_byte=entry in manifest.shards):
                raise IntegrityError(f"{folder / entry.file} {reason}. {self._remedy}")
        self.manifest = manifest
        self.kind: str = manifest.kind
        self.id: str = artifact.checksum(folder / artifact.MANIFEST)

    def refuse_older(self) -> None:
        """UsageError if an earlier version prepared it, which did not say which tokens count; reading it is possible."""
        for shard in self.manifest.shards[:1]:
            if not _has_spans(self._open(shard), self.kind):
                raise UsageError(
                    f"{self.folder} was prepared by an earlier version, which did not store which tokens of an answer count. Prepare "
                    "again (prefcache prepare CONFIG): what is scored is kept, and no sequence is scored twice."
                )

    def quarantine(self) -> Path:
        """The file of unusable records, verified."""
        entry = self.manifest.quarantine
        if reason := artifact.damage(self.folder, entry):
            raise IntegrityError(f"{self.folder / entry.file} {reason}. {self._remedy}")
        return self.folder / entry.file

    def table(self, split: str | None = None) -> pa.Table:
        """The examples of one split, or of all: first training, then held out, then other evaluation data."""
        order = [s for name in self.manifest.splits for s in self.manifest.shards if s.split == name]
        tables = [self._rows(shard) for shard in order if split in (None, shard.split)]
        return pa.concat_tables(tables) if tables else PREPARED[self.kind].empty_table()

    def images(self) -> StoredImages:
        """The pictures of the examples' prompts."""
        return StoredImages(self.folder, self.manifest.images)

    def prompt_images(self, processor: Path, features_root: Path | None = None) -> PromptImages | None:
        """The images of the prompts as the processor in this folder prepares them; None if there are none.

        `features_root`: the folder of caches, in which features may be stored for later runs.
        """
        pictures = self.images()
        return PromptImages(image_processor.load(processor), pictures, features_root) if len(pictures) else None

    def _open(self, shard: ShardEntry) -> pa.Table:
        path = self.folder / shard.file
        try:
            return artifact.open_arrow_stream(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise IntegrityError(f"{path} cannot be read ({reason}). {self._remedy}") from None

    def _rows(self, shard: ShardEntry) -> pa.Table:
        path, remedy, table = self.folder / shard.file, self._remedy, self._open(shard)
        wanted = {"example_id", "prompt_ids", *(f"{name}_ids" for name in ANSWERS[self.kind])}
        if missing := wanted - {*table.column_names}:
            raise IntegrityError(f"{path} has no column {min(missing)}, which {self.kind} have. {remedy}")
        if len(table) != shard.rows:
            raise IntegrityError(f"{path} has {len(table)} rows; its manifest says {shard.rows}. {remedy}")
        table = table if _has_spans(table, self.kind) else _count_all(table, self.kind)
        return table if "images" in table.column_names else _without_images(table, self.kind)


def _has_spans(table: pa.Table, kind: str) -> bool:
    return f"{ANSWERS[kind][0]}_spans" in table.column_names


def _count_all(table: pa.Table, kind: str) -> pa.Table:
    """Complete the examples of an earlier version, for which every token counted."""
    for name in ANSWERS[kind]:
        n = table[f"n_{name}"].combine_chunks()
        spans = np.stack([np.zeros(len(n), np.int32), n.fill_null(0).to_numpy()], 1).ravel()
        ends = pa.array(np.arange(0, len(spans) + 1, 2, dtype=np.int32))
        table = table.append_column(f"n_{name}_counted", n)
        table = table.append_column(f"{name}_spans", pa.ListArray.from_arrays(ends, pa.array(spans), mask=n.is_null()))
    for field in PREPARED[kind]:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(PREPARED[kind].names)


def _without_images(table: pa.Table, kind: str) -> pa.Table:
    """Complete the examples of an earlier version, which had no images."""
    return table.append_column("images", pa.nulls(len(table), IMAGE_IDS)).select(PREPARED[kind].names)


class IdLists:
    """A column of id lists as numpy views of the memory map, without copies or Python lists."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._parts = [(part.offsets.to_numpy(), part.values.to_numpy()) for part in column.chunks if len(part)]
        self._ends = list(accumulate(len(offsets) - 1 for offsets, _ in self._parts))

    def __getitem__(self, row: int) -> np.ndarray:
        part = bisect.bisect_right(self._ends, row)
        offsets, values = self._parts[part]
        at = row - (self._ends[part - 1] if part else 0)
        ids: np.ndarray = values[offsets[at] : offsets[at + 1]]
        return ids


class ImageLists:
    """The ids of the images of each example's prompt."""

    def __init__(self, examples: pa.Table) -> None:
        column = examples["images"]
        # Most data has none: then no row is ever looked at.
        has_any = any(len(part.values) for part in column.chunks)
        self._column = column if has_any else None

    def __getitem__(self, row: int) -> tuple[bytes, ...]:
        return tuple(self._column[row].as_py() or ()) if self._column is not None else ()

    @property
    def first_row(self) -> int | None:
        """The first row whose prompt has images; None if none has any."""
        if self._column is None:
            return None
        return int(np.argmax(pc.list_value_length(self._column).fill_null(0).to_numpy() > 0))


class CountedTokens:
    """Which tokens of an answer count (spans.py), by the rows of a table of examples."""

    def __init__(self, examples: pa.Table, answer: str) -> None:
        self.n_all, self.n = (examples[f"n_{answer}{of}"].fill_null(0).to_numpy() for of in ("", "_counted"))
        self.is_partial = self.n < self.n_all
        self.spans = examples[f"{answer}_spans"]
        self._lists = IdLists(self.spans)

    def positions(self, row: int) -> np.ndarray | None:
        """Return where in the answer they are; None if all tokens count."""
        return counted_positions(self._lists[row]) if self.is_partial[row] else None


def drop_ids(examples: pa.Table) -> pa.Table:
    """Leave out ids and spans, but say how many spans there are: one for each turn that counts."""
    kept = examples.select([column.name for column in examples.schema if column.type != IDS])
    for name in (column.removesuffix("_spans") for column in examples.column_names if column.endswith("_spans")):
        kept = kept.append_column(f"n_{name}_turns", pc.divide(pc.list_value_length(examples[f"{name}_spans"]), 2))
    return kept


def answer_names(examples: pa.Table) -> tuple[str, str]:
    """The names of an example's two answers: chosen and rejected, or completion and kl."""
    return next(names for names in ANSWERS.values() if f"{names[0]}_ids" in examples.column_names)


def sequence_table(examples: pa.Table) -> pa.Table:
    """One row per sequence, as a scorer plans with it: key, slot in Sequences, number of tokens and of the answer's tokens,
    and a number that sequences with the same prompt share."""
    row, prompt, parts = np.arange(len(examples), dtype=np.int64), prompt_hashes(examples), []
    for side, name in enumerate(answer_names(examples)):
        n_completion = examples[f"n_{name}"]
        n = pc.add(examples["n_prompt"], n_completion)
        key = examples[f"{name}_key"]
        part = pa.table({"key": key, "slot": 2 * row + side, "prompt": prompt, "n": n, "n_completion": n_completion})
        # A label that has no mismatched answer.
        parts.append(part.filter(pc.is_valid(part["key"])) if part["key"].null_count else part)
    return pa.concat_tables(parts)


def prompt_hashes(examples: pa.Table) -> np.ndarray:
    """A number for each prompt, equal for equal ones, which have the same ids and the same images."""
    hashes = _list_hashes(examples["prompt_ids"])
    if any(len(part.values) for part in examples["images"].chunks):
        images = ImageLists(examples)
        mixed = [int.from_bytes(blake2b(b"".join(images[row]), digest_size=8).digest()) for row in range(len(examples))]
        hashes = hashes ^ np.array(mixed, np.uint64)
    return hashes


def _list_hashes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each list, equal for equal lists: good for grouping equal lists, not for telling lists apart."""
    # Powers of an odd number, which repeat modulo 2**64 only after 2**62.
    longest = max([0, *(int(np.diff(part.offsets.to_numpy()).max(initial=0)) for part in column.chunks)])
    powers = np.cumprod(np.full(longest, 0x9E3779B97F4A7C15, dtype=np.uint64), dtype=np.uint64)
    hashes = [np.empty(0, np.uint64)]
    for part in column.chunks:
        offsets, values = part.offsets.to_numpy(), part.values.to_numpy()
        for start in range(0, len(part), 65_536):
            at = offsets[start : start + 65_537].astype(np.int64)
            ids = values[at[0] : at[-1]].astype(np.uint64) + np.uint64(1)
            lengths = np.diff(at)
            position = np.arange(len(ids)) - np.repeat(at[:-1] - at[0], lengths)
            mixed = ids * powers[position]
            until = np.cumsum(
                np.concatenate([np.zeros(1, np.uint64), mixed ^ (mixed >> np.uint64(29))]), dtype=np.uint64
            )
            offsets_in_block = at - at[0]
            hashes.append(until[offsets_in_block[1:]] - until[offsets_in_block[:-1]])
    return np.concatenate(hashes)


class Sequences:
    """The sequences of a table of examples. Slot 2*row is a row's first answer (chosen), 2*row + 1 its second."""

    def __init__(self, table: pa.Table) -> None:
        self._prompt, self._images = IdLists(table["prompt_ids"]), ImageLists(table)
        first, second = answer_names(table)
        self._answers = IdLists(table[f"{first}_ids"]), IdLists(table[f"{second}_ids"])

    def __getitem__(self, slot: int) -> TokenSequence:
        row, side = divmod(int(slot), 2)
        return TokenSequence(self._prompt[row], self._answers[side][row], images=self._images[row])

    @property
    def slot_with_images(self) -> int | None:
        """The first slot of a prompt with images; None if no prompt has any."""
        row = self._images.first_row
        return None if row is None else 2 * row
