"""The sources of records: whatever `prepare.data` may name becomes a stream of chunks.

A file, a folder, a glob pattern, standard input, what `save_to_disk` of datasets wrote, a data set of the hub. Nothing
that a source holds is run. Where to look next: chunk.py says what a chunk is, kinds.py which file is read how.
"""

import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.errors import DataError, UsageError
from pipeline.preparing.sources import kinds, separated, tables, text
from pipeline.preparing.sources.chunk import CHUNK_BYTES, CHUNK_RECORDS, DEFAULT, Chunk, Limits, Line
from pipeline.stored import artifact

__all__ = ["CHUNK_BYTES", "CHUNK_RECORDS", "Chunk", "Limits", "Line", "Opened", "open_source"]

STDIN = "-"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SEPARATORS = {"csv": ",", "tsv": "\t", "semicolons": ";"}
# Beside the data of a data set, what describes it.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Opened:
    """One entry of `prepare.data`, found and checked."""

    name: str  # as people see it
    entry: Source
    files: list[Path]  # behind it; none of a data set of the hub
    dataset: Any = None  # of the library datasets, where that reads it
    read_as: tuple[kinds.Kind, ...] = ()  # of the files, where we read them

    def identity(self) -> list[dict[str, Any]]:
        """What the records depend on."""
        if self.dataset is not None and not self.files:
            return [_hub_identity(self.entry, self.name, self.dataset)]
        return [{"file": self._shown(file), "xxh3_128": artifact.checksum(file)} for file in self.files]

    def chunks(self, limits: Limits = DEFAULT) -> Iterator[Chunk]:
        if self.dataset is not None:
            yield from tables.dataset_chunks(self.dataset, self.name, limits)
            return
        for file, kind in zip(self.files, self.read_as, strict=True):
            yield from _file_chunks(file, kind, self._shown(file), limits, self._names())

    def _names(self) -> dict[str, str]:
        """What the formats call a column: as the data calls it."""
        named = {key: value for key, value in self.entry.format_args.items() if isinstance(value, str)}
        return named | self.entry.columns

    def _shown(self, file: Path) -> str:
        return STDIN if self.name == STDIN else str(file)


def open_source(entry: Source, spool: Path) -> Opened:
    """Find what an entry names. Standard input is copied to the folder `spool`, so that it can be read twice."""
    if entry.hub is not None:
        return _open_hub(entry, entry.hub)
    assert entry.path is not None
    if entry.path == STDIN:
        return _open_files(STDIN, entry, [_spooled(spool)])
    path = Path(entry.path)
    if path.is_dir():
        return _open_folder(path, entry)
    if path.exists():
        return _open_files(entry.path, entry, [path])
    if glob.has_magic(entry.path):
        return _open_files(entry.path, entry, _matches(entry.path))
    if _may_be_hub(entry.path):
        return _open_hub(entry, entry.path)
    raise UsageError(_missing(entry.path))


def _missing(path: str) -> str:
    if "://" in path:
        return f"{path} is an address; prepare.data reads local files. Download it first, or pipe it in and name -."
    return f"No data at {path}; prepare.data names it. Expected a file, a folder, a glob pattern, -, or a hub id."


def _may_be_hub(path: str) -> bool:
    """org/name; but a file that is missing from a folder that is there is a missing file."""
    first = Path(path).parts[0] if path else ""
    return bool(_HUB_ID.fullmatch(path)) and not kinds.known(Path(path)) and not Path(first).exists()


# -- files -----------------------------------------------------------------------------------------------------------


def _open_files(name: str, entry: Source, files: list[Path]) -> Opened:
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is no regular file. Pipe it in and name - in prepare.data.")
    found = tuple(kinds.kind_of(file, STDIN if name == STDIN else str(file)) for file in files)
    for file, kind in zip(files, found, strict=True):
        if kind in ("parquet", "arrow"):
            tables.check(file, kind)
    return Opened(name, entry, files, read_as=found)


def _matches(pattern: str) -> list[Path]:
    files = [Path(match) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH207 (Path.glob refuses absolute patterns)
    found = sorted(file for file in files if file.is_file() and file.name not in _DESCRIPTIONS)
    if not found:
        raise UsageError(f"No file matches {pattern}; prepare.data names it. `**` stands for any folders.")
    return found


def _open_folder(folder: Path, entry: Source) -> Opened:
    saved = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    if saved or (folder / "dataset_dict.json").is_file():
        dataset = tables.load_folder(folder, entry.split)
        if not dataset.num_rows:
            raise DataError(f"{folder} is empty; expected records.")
        files = sorted({Path(file["filename"]) for file in dataset.cache_files})
        return Opened(str(folder), entry, [*files, *(file.parent / "state.json" for file in files[:1])], dataset)
    below = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    files = sorted(file for file in below if kinds.known(file) and not _is_beside(file.relative_to(folder)))
    if not files:
        raise UsageError(f"{folder} holds no file of records. {kinds.expected()}")
    return _open_files(str(folder), entry, files)


def _is_beside(file: Path) -> bool:
    return file.name in _DESCRIPTIONS or any(part.startswith(".") for part in file.parts)


def _file_chunks(file: Path, kind: kinds.Kind, source: str, limits: Limits, names: dict[str, str]) -> Iterator[Chunk]:
    if kind == "parquet":
        return tables.parquet_chunks(file, source, limits)
    if kind == "arrow":
        return tables.arrow_chunks(file, source, limits)
    if kind == "array":
        return text.array_chunks(file, source, limits)
    if kind == "lines":
        return text.line_chunks(file, source, limits)
    return separated.table_chunks(file, source, limits, _SEPARATORS[kind], names)


def _spooled(spool: Path) -> Path:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError(
            "prepare.data names - (standard input), which is a terminal or closed. Pipe records in, "
            "as in `zcat pairs.jsonl.gz | prefcache prepare ...`, or name a file."
        )
    with artifact.commit_folder(spool / "stdin") as folder, open(folder / "records", "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        if not file.tell():
            raise DataError("Standard input is empty; expected records.")
    return spool / "stdin" / "records"


# -- the hub ---------------------------------------------------------------------------------------------------------


def _open_hub(entry: Source, hub: str) -> Opened:
    dataset = tables.load_hub(hub, entry.name, entry.split, entry.revision)
    if not dataset.num_rows:
        raise DataError(f"data set {hub}, split {entry.split}, is empty; expected records.")
    return Opened(hub, entry, [], dataset)


def _hub_identity(entry: Source, hub: str, dataset: Any) -> dict[str, Any]:
    return {
        "hub": hub,
        "name": entry.name,
        "split": entry.split,
        "revision": tables.commit(dataset) or entry.revision,
        "fingerprint": dataset._fingerprint,
    }
