"""One shard of the cache: a Parquet file of rows, and the JSON record that vouches for it.

Parquet has a checksum for each page; the record has one for all keys and sums, which also covers headers and footers.
A damaged shard is an IntegrityError, a shard that is gone a FileNotFoundError: gc may have merged it meanwhile.

In the mirror of an object store a shard may be here in parts; what is missing of the columns that are read is fetched. A
copy that turns out to be damaged is dropped and read again from the store.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prefcache.pipeline.errors import IntegrityError, ResourceError
from prefcache.pipeline.schema import OK
from prefcache.pipeline.stored.key_index import Keys, read_keys
from prefcache.pipeline.stored.mirror import Mirror, find_mirror, find_row_groups
from prefcache.pipeline.stored.records import SHARD_RECORD_FILE, ShardRecord

# What read_values reads.
VALUE_COLUMNS = ("key", "logp_sum", "status")
# Below this, waking Arrow's threads takes longer than reading the rows.
_ROWS_FOR_THREADS = 1 << 16


def list_records(folder: Path) -> list[Path]:
    """List the records of shards in a folder, by name. Files of other names, and what is not a file, are ignored."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if SHARD_RECORD_FILE.fullmatch(entry.name) and entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names)]


# Dictionary codes cost next to nothing where every row has the same string.
_HOW: dict[str, Any] = {"page_checksum_verification": True, "read_dictionary": ["status", "numerics_id"]}


@contextlib.contextmanager
def _open(folder: Path, record: ShardRecord) -> Iterator[pq.ParquetFile]:
    path, mirror, is_part = folder / record.file, find_mirror(folder), False
    try:
        with contextlib.ExitStack() as opened:
            file = _open_whole(folder, record, mirror)
            if file is None and mirror is not None and mirror.is_demanded(record):
                if reason := mirror.fetch(folder, [record]).get(record.file):
                    raise IntegrityError(f"{path} {reason}")
                if (file := _open_whole(folder, record, mirror)) is None:
                    raise FileNotFoundError(path)
            if file is None:
                assert mirror is not None
                is_part = True
                part = opened.enter_context(mirror.open_part(folder, record))
                # Arrow's reading ahead would fetch more than is asked for.
                file = pq.ParquetFile(part, metadata=mirror.read_metadata(part), pre_buffer=False, **_HOW)
            opened.enter_context(file)
            if (n_rows := count_rows(file.metadata)) != record.rows:
                raise IntegrityError(f"{path} has {n_rows} rows, {record.rows} were written")
            yield file
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        # The blocks of a part are as they were written, so this is about memory, open files or the disk of this machine.
        if is_part and (isinstance(error, MemoryError) or getattr(error, "errno", None) is not None):
            raise ResourceError(f"{path} cannot be read on this machine ({reason}).") from error
        raise IntegrityError(f"{path} cannot be read ({reason})") from error


def _open_whole(folder: Path, record: ShardRecord, mirror: Mirror | None) -> pq.ParquetFile | None:
    """Open a shard that is here as a whole; None if a mirror has no whole copy of it, or another process has just dropped it."""
    if mirror is not None and not mirror.has_whole(folder, record):
        return None
    try:
        # Arrow takes a relative path with a colon, such as a:b/c, for a URI.
        return pq.ParquetFile((folder / record.file).absolute(), **_HOW)
    except FileNotFoundError:
        if mirror is None:
            raise
        return None


F = TypeVar("F", bound=Callable[..., Any])


def _read_again_if_copy_is_damaged(read: F) -> F:
    """Read once more, from the object store, where only the mirror's copy of a shard may be damaged."""

    @functools.wraps(read)
    def read_twice(folder: Path, record: ShardRecord, *arguments: Any, **options: Any) -> Any:
        try:
            return read(folder, record, *arguments, **options)
        except IntegrityError:
            mirror = find_mirror(folder)
            if mirror is None or not mirror.forget(folder, record):
                raise
        return read(folder, record, *arguments, **options)

    return cast(F, read_twice)


@_read_again_if_copy_is_damaged
def read_rows(folder: Path, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    with _open(folder, record) as file:
        table = file.read(columns and list(columns), use_threads=record.rows > _ROWS_FOR_THREADS)
    if len(table) != record.rows:
        raise IntegrityError(f"{folder / record.file} has {len(table)} rows, {record.rows} were written")
    return table


@_read_again_if_copy_is_damaged
def take_rows(folder: Path, record: ShardRecord, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Read columns of some rows, given by their places in ascending order, and no row group that has none of them."""
    with _open(folder, record) as file:
        groups, begins = find_row_groups(file.metadata, rows)
        table = file.read_row_groups(groups, list(columns), use_threads=record.rows > _ROWS_FOR_THREADS)
        # A row's place in what was read: less the rows of the groups before it that were left out.
        n_rows = [file.metadata.row_group(group).num_rows for group in groups]
    if len(table) != sum(n_rows) or (len(rows) and rows[-1] >= record.rows):
        raise IntegrityError(f"{folder / record.file} has other rows than were written")
    offsets = np.concatenate([begin + np.arange(n) for begin, n in zip(begins, n_rows, strict=True)] or [rows])
    return table.take(pa.array(np.searchsorted(offsets, rows)))


def read_batches(folder: Path, record: ShardRecord, n_rows: int = 8192) -> Iterator[pa.Table]:
    """Yield all rows of a shard, `n_rows` at a time."""
    with _open(folder, record) as file:
        for batch in file.iter_batches(n_rows):
            yield pa.Table.from_batches([batch])


@_read_again_if_copy_is_damaged
def read_values(folder: Path, record: ShardRecord) -> tuple[Keys, np.ndarray]:
    """Return the keys and summed log-probs of a shard, verified by the record; nan where a row has no value."""
    table = read_rows(folder, record, VALUE_COLUMNS)
    try:
        keys, sums = read_keys([table["key"]]), usable_sums(table)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise IntegrityError(f"{folder / record.file} has other columns than were written") from error
    if record.values_xxh3_128 not in (None, checksum_values(keys, sums)):
        raise IntegrityError(f"{folder / record.file} has other values than were written (checksum)")
    return keys, sums


@_read_again_if_copy_is_damaged
def lacks_lists(folder: Path, record: ShardRecord) -> bool:
    """Whether any row may have no log-prob per token. Parquet's statistics count them, so that no list is read."""
    with _open(folder, record) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    statistics = [column.statistics for column in columns if is_of_lists(column)]
    return any(each is None or each.null_count for each in statistics)


def count_rows(metadata: pq.FileMetaData) -> int:
    """The rows that reading a file would give. Look before reading: a few bytes can stand for any number of rows."""
    return sum(abs(metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups))


def describe_blocks(data: memoryview) -> list[dict[str, Any]]:
    """Divide the bytes of a shard into blocks that can be read alone, each with its checksum.

    In turn: what precedes the log-probs of tokens of a row group, these log-probs, and so on; the last has the footer.
    """
    metadata = pq.read_metadata(pa.BufferReader(data))
    borders = [0]
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        (lists,) = (column for column in map(group.column, range(group.num_columns)) if is_of_lists(column))
        start = min(lists.data_page_offset, lists.dictionary_page_offset or lists.data_page_offset)
        borders += [start, start + lists.total_compressed_size]
    borders.append(len(data))
    blocks = [data[start:end] for start, end in itertools.pairwise(borders)]
    return [{"bytes": len(block), "xxh3_128": xxhash.xxh3_128_hexdigest(block)} for block in blocks]


def is_of_lists(column: pq.ColumnChunkMetaData) -> bool:
    """Whether a column of a shard holds log-probs of tokens."""
    return str(column.path_in_schema).startswith("logps.")


def is_usable(status: str | None) -> bool:
    """Whether a row of this status has a value."""
    return status is not None and (status == OK or status.startswith(f"{OK}:"))


def usable_rows(rows: pa.Table) -> np.ndarray:
    """Mask of the rows that have a value."""
    masks = [np.empty(0, bool)]
    for chunk in rows["status"].chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        by_code = np.array([*map(is_usable, encoded.dictionary.to_pylist()), False])
        codes = encoded.indices.fill_null(len(by_code) - 1) if encoded.null_count else encoded.indices
        masks.append(by_code[codes.to_numpy()])
    return np.concatenate(masks)


def usable_sums(rows: pa.Table) -> np.ndarray:
    """The column logp_sum, with nan in the rows of failures."""
    return np.where(usable_rows(rows), rows["logp_sum"].to_numpy(), np.nan)


def checksum_values(keys: Keys, sums: np.ndarray) -> str:
    return f"{keys.checksum()}-{xxhash.xxh3_128_hexdigest(sums.astype('<f8').data)}"
