"""The sources of records: whatever `prepare.data` may name becomes a stream of chunks.

A file, a folder, a glob pattern, standard input, what `save_to_disk` of datasets wrote, a data set of the hub. Nothing
that a source holds is executed. Start with chunk.py, which defines a chunk; sniff.py decides which file is read how.
"""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache.pipeline.config import Source
from prefcache.pipeline.errors import DataError, PrefcacheError, UsageError
from prefcache.pipeline.preparing.sources import arrow_tables, csv_tsv, jsonl, sniff
from prefcache.pipeline.preparing.sources.chunk import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    DEFAULT,
    Chunk,
    Limits,
    Line,
    group_by_size,
    take_records,
)
from prefcache.pipeline.stored import artifact

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_RECORDS",
    "Chunk",
    "DataSource",
    "Limits",
    "Line",
    "group_by_size",
    "open_source",
    "refuse_undecodable",
]

STDIN = "-"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DELIMITERS = {"csv": ",", "tsv": "\t", "semicolons": ";"}
# Files that describe a data set and lie next to its data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_TYPICAL_RECORD = 2048  # bytes
_COMPRESSED, _COMPRESSION = (*sniff.COMPRESSED, ".parquet"), 3  # at least, for text


@dataclass(frozen=True)
class DataSource:
    """One entry of `prepare.data`, opened and checked."""

    name: str  # as people see it
    entry: Source
    files: list[Path]  # empty for a data set of the hub
    dataset: Any = None  # of the library datasets, if that reads it
    kinds: tuple[sniff.Kind, ...] = ()  # of the files, if we read them

    def identity(self) -> list[dict[str, Any]]:
        """Return what the records depend on."""
        if self.dataset is None or self.files:
            return [{"file": self.display_name(file), "xxh3_128": artifact.checksum(file)} for file in self.files]
        return [
            {
                "hub": self.name,
                "name": self.entry.name,
                "split": self.entry.split,
                "revision": arrow_tables.hub_commit(self.dataset) or self.entry.revision,
                "fingerprint": self.dataset._fingerprint,
            }
        ]

    def estimate_bytes(self) -> int:
        """Return about how much data is read."""
        n_bytes = sum(map(_estimate_size, self.files)) if self.files else self.dataset.data.nbytes
        most = self.entry.max_records
        return int(n_bytes if most is None else min(n_bytes, most * _TYPICAL_RECORD))

    def chunks(self, limits: Limits = DEFAULT) -> Iterator[Chunk]:
        """Yield the records, up to as many as the entry allows."""
        most = self.entry.max_records
        if most is None:
            return self._all_chunks(limits)
        return take_records(self._all_chunks(limits._replace(records=min(limits.records, most))), most)

    def _all_chunks(self, limits: Limits) -> Iterator[Chunk]:
        if self.dataset is not None:
            yield from arrow_tables.dataset_chunks(self.dataset, self.name, limits)
            return
        for file, kind in zip(self.files, self.kinds, strict=True):
            yield from self._file_chunks(file, kind, self.display_name(file), limits)

    def _file_chunks(self, file: Path, kind: sniff.Kind, shown: str, limits: Limits) -> Iterator[Chunk]:
        if kind == "parquet":
            return arrow_tables.parquet_chunks(file, shown, limits)
        if kind == "arrow":
            return arrow_tables.arrow_chunks(file, shown, limits)
        if kind == "array":
            return jsonl.array_chunks(file, shown, limits)
        if kind == "lines":
            return jsonl.line_chunks(file, shown, limits)
        # What the formats call a column, and what the data calls it.
        names = {key: value for key, value in self.entry.format_args.items() if isinstance(value, str)}
        return csv_tsv.table_chunks(file, shown, limits, _DELIMITERS[kind], names | self.entry.columns)

    def display_name(self, file: Path) -> str:
        return STDIN if self.name == STDIN else str(file)


def _estimate_size(file: Path) -> int:
    return file.stat().st_size * (_COMPRESSION if file.suffix in _COMPRESSED else 1)


def open_source(entry: Source, spool: Path) -> DataSource:
    """Find what an entry names. Standard input is copied to the folder `spool`, so that it can be read twice."""
    source = _open(entry, spool)
    for name in (source.name, *map(source.display_name, source.files)):
        refuse_undecodable(name)
    return source


def holds_text(paths: Iterable[str], spool: Path) -> bool | None:
    """Return whether the first records of these files have text, and not messages; None if they differ or cannot be read."""
    kinds: set[bool | None] = set()
    for path in paths:
        record = None
        if Path(path).exists():
            with contextlib.suppress(PrefcacheError):
                source = open_source(Source(path=path), spool)
                record = next((line.record for chunk in source.chunks() for line in chunk.lines() if line.record), None)
        values = [record[column] for column in ("chosen", "completion") if column in record] if record else []
        kinds.add(isinstance(values[0], str) if values else None)
    return kinds.pop() if len(kinds) == 1 else None


def refuse_undecodable(name: str) -> None:
    """Refuse a name that is not UTF-8: the names of sources are recorded."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise UsageError(f"{shown}: this name is not valid UTF-8. Rename it.") from None


def _open(entry: Source, spool: Path) -> DataSource:
    if entry.hub is not None:
        return _open_hub(entry, entry.hub)
    assert entry.path is not None
    path = Path(entry.path)
    if entry.path == STDIN:
        return _open_files(STDIN, entry, [_spool_stdin(spool, entry.max_records)])
    if path.is_dir():
        return _open_folder(path, entry)
    if path.exists():
        return _open_files(entry.path, entry, [path])
    if glob.has_magic(entry.path):
        return _open_files(entry.path, entry, _match_files(entry.path))
    # org/name; but a file that is missing from an existing folder is a missing file.
    is_in_folder = Path(path.parts[0] if path.parts else "").exists()
    if _HUB_ID.fullmatch(entry.path) and not sniff.is_known(path) and not is_in_folder:
        return _open_hub(entry, entry.path)
    if "://" in entry.path:
        raise UsageError(
            f"{entry.path} is an address; prepare.data reads local files. Download it first, or pipe it in and name -."
        )
    raise UsageError(
        f"No data at {entry.path}; prepare.data names it. Expected a file, a folder, a glob pattern, -, or a hub id."
    )


def _open_hub(entry: Source, hub: str) -> DataSource:
    dataset = arrow_tables.load_hub(hub, entry.name, entry.split, entry.revision, entry.max_records)
    if not dataset.num_rows:
        raise DataError(f"data set {hub}, split {entry.split}, is empty; expected records.")
    return DataSource(hub, entry, [], dataset)


def _open_files(name: str, entry: Source, files: list[Path]) -> DataSource:
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is not a regular file. Pipe it in and name - in prepare.data.")
    kinds = tuple(sniff.detect_kind(file, STDIN if name == STDIN else str(file)) for file in files)
    for file, kind in zip(files, kinds, strict=True):
        if kind in ("parquet", "arrow"):
            arrow_tables.check_opens(file, kind)
    return DataSource(name, entry, files, kinds=kinds)


def _match_files(pattern: str) -> list[Path]:
    paths = [Path(match) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH207 (Path.glob refuses absolute patterns)
    files = sorted(path for path in paths if path.is_file() and path.name not in _DESCRIPTIONS)
    if not files:
        raise UsageError(f"No file matches {pattern}; prepare.data names it. `**` stands for any folders.")
    return files


def _open_folder(folder: Path, entry: Source) -> DataSource:
    is_dataset = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    if is_dataset or (folder / "dataset_dict.json").is_file():
        dataset = arrow_tables.load_folder(folder, entry.split)
        if not dataset.num_rows:
            raise DataError(f"{folder} is empty; expected records.")
        files = sorted({Path(file["filename"]) for file in dataset.cache_files})
        return DataSource(str(folder), entry, [*files, *(file.parent / "state.json" for file in files[:1])], dataset)
    paths = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files = [path for path in visible if sniff.is_known(path) and path.name not in _DESCRIPTIONS]
    if not files:
        raise UsageError(f"{folder} holds no file of records. {sniff.EXPECTED}")
    return _open_files(str(folder), entry, files)


def _spool_stdin(spool: Path, most: int | None) -> Path:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError(
            "prepare.data names - (standard input), which is a terminal or closed. Pipe records in, "
            "as in `zcat pairs.jsonl.gz | prefcache prepare ...`, or name a file."
        )
    with artifact.commit_folder(spool / "stdin") as folder, open(folder / "records", "wb") as file:
        jsonl.copy_stream(sys.stdin.buffer, file, most)
        if not file.tell():
            raise DataError("Standard input is empty; expected records.")
    return spool / "stdin" / "records"
