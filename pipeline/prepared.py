"""The prepared folder: Arrow shards of examples, the quarantine, and the manifest that vouches for both.

Shards are in the stream format, so `datasets.Dataset.from_file` memory-maps them. A new preparation writes shards of
other names and then switches the manifest, so a reader sees the old set or the new one, never a mixture.
"""

import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import artifact
from pipeline.errors import IntegrityError, UsageError
from pipeline.schema import HELD_OUT, PREPARED, QUARANTINE, TRAIN, Sequence

_ROWS_PER_PACK = 1024
QUARANTINE_FILE = "quarantine.parquet"


class Writer:
    """Rows in, shards out. One shard per split is in memory at a time, as Arrow but for its last rows."""

    def __init__(self, folder: Path, generation: str, rows_per_shard: int) -> None:
        self._folder, self._generation, self._rows_per_shard = folder, generation, rows_per_shard
        artifact.remove_leftovers(folder)
        self._rows: dict[str, list[dict[str, Any]]] = {TRAIN: [], HELD_OUT: []}
        self._packed: dict[str, list[pa.Table]] = {TRAIN: [], HELD_OUT: []}
        self._quarantined: list[dict[str, Any]] = []
        self._seen: Counter[str] = Counter()
        self._shards: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> detail of the first record with it
        self.boundaries: Counter[str] = Counter()
        self.duplicates = 0

    def add(self, row: dict[str, Any]) -> None:
        row["example_id"] = self._unique(row["example_id"])
        self.boundaries[row["boundary"]] += 1
        split = row["split"]
        self._rows[split].append(row)
        n_packed = sum(map(len, self._packed[split]))
        if n_packed + len(self._rows[split]) == self._rows_per_shard:
            self._flush(split)
        elif len(self._rows[split]) == _ROWS_PER_PACK:
            self._pack(split)

    def quarantine(self, row: dict[str, Any]) -> None:
        self.reasons[row["reason"]] += 1
        self.first.setdefault(row["reason"], row["detail"])
        self._quarantined.append(row)

    @property
    def n_quarantined(self) -> int:
        return len(self._quarantined)

    def commit_quarantine(self) -> dict[str, Any]:
        table = pa.Table.from_pylist(self._quarantined, schema=QUARANTINE)
        return artifact.commit_file(self._folder / QUARANTINE_FILE, artifact.parquet(table), rows=len(table))

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write what is left, the quarantine, and the manifest last; then drop the shards of an older preparation."""
        for split in self._rows:
            self._flush(split)
        manifest = {**facts, "shards": self._shards, "quarantine": self.commit_quarantine()}
        artifact.commit_manifest(self._folder, manifest)
        current = {shard["file"] for shard in self._shards}
        for old in self._folder.glob("*.arrow"):
            if old.name not in current:
                old.unlink()
        return manifest

    def _unique(self, example_id: str) -> str:
        self._seen[example_id] += 1
        if self._seen[example_id] == 1:
            return example_id
        self.duplicates += 1
        return f"{example_id}-{self._seen[example_id]}"

    def _flush(self, split: str) -> None:
        self._pack(split)
        if self._packed[split]:
            number = sum(shard["split"] == split for shard in self._shards)
            path = self._folder / f"{split}-{self._generation}-{number:05}.arrow"
            table = pa.concat_tables(self._packed[split]).combine_chunks()
            self._shards.append(artifact.commit_file(path, artifact.arrow_stream(table), split=split, rows=len(table)))
            self._packed[split] = []

    def _pack(self, split: str) -> None:
        if self._rows[split]:
            self._packed[split].append(pa.Table.from_pylist(self._rows[split], schema=PREPARED))
            self._rows[split] = []


class Prepared:
    """A finished preparation, verified and memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = artifact.read_manifest(folder)
        if manifest is None:
            raise UsageError(f"{folder} holds no finished preparation. Prepare first (make prepare).")
        for entry in manifest["shards"]:
            if reason := artifact.damage(folder, entry):
                raise IntegrityError(
                    f"{folder / entry['file']} {reason}. Delete {folder} and prepare again (make prepare)."
                )
        self.manifest = manifest
        self.id: str = artifact.checksum(folder / artifact.MANIFEST)

    def table(self, split: str | None = None) -> pa.Table:
        """The examples of one split, or of all: first training, then held out."""
        order = [s for name in (TRAIN, HELD_OUT) for s in self.manifest["shards"] if s["split"] == name]
        tables = [
            artifact.open_arrow_stream(self.folder / shard["file"])
            for shard in order
            if split in (None, shard["split"])
        ]
        return pa.concat_tables(tables) if tables else PREPARED.empty_table()


def is_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether the folder holds, undamaged, what these inputs give."""
    try:
        manifest = Prepared(folder).manifest
        return manifest["inputs"] == inputs and not artifact.damage(folder, manifest["quarantine"])
    except (UsageError, IntegrityError):
        return False


class IdLists:
    """A column of id lists as numpy views of the memory map: no copy, no Python list."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._parts = [(part.offsets.to_numpy(), part.values.to_numpy()) for part in column.chunks if len(part)]
        self._ends = list(accumulate(len(offsets) - 1 for offsets, _ in self._parts))

    def __getitem__(self, row: int) -> np.ndarray:
        part = bisect.bisect_right(self._ends, row)
        offsets, values = self._parts[part]
        at = row - (self._ends[part - 1] if part else 0)
        ids: np.ndarray = values[offsets[at] : offsets[at + 1]]
        return ids


def sequence_table(examples: pa.Table) -> pa.Table:
    """What a scorer has to know of every sequence: its key, its slot in Sequences, its tokens and its answer's."""
    row, parts = np.arange(len(examples), dtype=np.int64), []
    for side, name in enumerate(("chosen", "rejected")):
        n_completion = examples[f"n_{name}"]
        n = pc.add(examples["n_prompt"], n_completion)
        parts.append({"key": examples[f"{name}_key"], "slot": 2 * row + side, "n": n, "n_completion": n_completion})
    return pa.concat_tables([pa.table(part) for part in parts])


class Sequences:
    """The sequences of a table of examples. Slot 2*row is the chosen answer of a row, 2*row + 1 the rejected."""

    def __init__(self, table: pa.Table) -> None:
        self._prompt = IdLists(table["prompt_ids"])
        self._answers = IdLists(table["chosen_ids"]), IdLists(table["rejected_ids"])

    def __getitem__(self, slot: int) -> Sequence:
        row, side = divmod(int(slot), 2)
        return Sequence(self._prompt[row], self._answers[side][row])

    def pairs(self, rows: Iterator[int] | list[int]) -> tuple[list[Sequence], list[Sequence]]:
        rows = list(rows)
        return [self[2 * row] for row in rows], [self[2 * row + 1] for row in rows]
