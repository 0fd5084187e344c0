"""Records in tables: Parquet, Arrow files and streams, folders of `save_to_disk`, data sets of the hub.

A chunk carries its rows as an Arrow stream. In a table every message of a column has the same keys, so a key that a
message never had comes out as null: null keys inside structs are left out, null columns of a record are None.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.preparing.sources.chunk import Chunk, Limits, Line, Record, invalid_utf8

_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@contextmanager
def _whole(file: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        problem = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(
            f"{file} is cut short or damaged: {problem}. Expected a whole {kind} file; copy or write it again."
        ) from None


# -- files -----------------------------------------------------------------------------------------------------------


def parquet_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    with _whole(file, "Parquet"), pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
        row_bytes = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        at_once = _rows_at_once(row_bytes, table.metadata.num_rows, limits)
        yield from _chunks(table.iter_batches(batch_size=at_once), source, limits)


def arrow_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    import pyarrow as pa

    with _whole(file, "Arrow"), pa.memory_map(str(file)) as mapped:
        yield from _chunks(_arrow_batches(mapped), source, limits)


def _arrow_batches(mapped: Any) -> Iterator[Any]:
    import pyarrow as pa

    if mapped.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(mapped)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        mapped.seek(0)
        yield from pa.ipc.open_stream(mapped)


def check(file: Path, kind: str) -> None:
    """That a table can be opened, which is known before its rows are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with _whole(file, "Parquet"), pq.ParquetFile(file):
            return
    with _whole(file, "Arrow"), pa.memory_map(str(file)) as mapped:
        next(_arrow_batches(mapped), None)


# -- data sets -------------------------------------------------------------------------------------------------------


def load_folder(folder: Path, split: str) -> Any:
    """What `save_to_disk` wrote; of several splits the one named."""
    import datasets  # type: ignore[import-untyped]

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # The library lets through whatever its parts raise.
        raise DataError(
            f"{folder} looks like a folder of save_to_disk, but is empty or damaged ({_first_line(error)}). Save it again."
        ) from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise UsageError(f"{folder} has no split {split!r}. Set this source's split to one of: {', '.join(found)}.")
    return found[split]


def load_hub(hub: str, name: str | None, split: str, revision: str | None) -> Any:
    """A data set of the hub. No code of its own is ever run: the library has no way left to do it."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(hub, name, split=split, revision=revision)
    except Exception as error:  # The library lets through whatever its parts raise.
        raise UsageError(f"data set {hub}: {_why(error)}") from None
    fetched = commit(found)
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and fetched not in (None, revision):
        raise UsageError(
            f"data set {hub}: revision {revision} was asked for, the local cache has {fetched}. "
            "Connect to the network, or ask for that revision."
        )
    return found


def _why(error: Exception) -> str:
    reason = _first_line(error)
    if "scripts are no longer supported" in str(error):
        return (
            "it needs code of its own to load, which is never run. Many such data sets have a converted copy: "
            "set revision: refs/convert/parquet. Or convert it elsewhere and name the files."
        )
    if isinstance(error, ConnectionError) or "offline" in str(error).lower():
        return (
            f"it is not in the local cache, and the hub cannot be reached ({reason}). Connect to the network (and "
            "unset HF_HUB_OFFLINE), or download it elsewhere and name its files."
        )
    if "load_from_disk" in str(error):
        return "it is a folder of save_to_disk. Name it as this source's path, not as hub."
    if isinstance(error, ValueError):
        return f"{reason}. Set this source's name (the subset) or split to one that it has."
    return f"it cannot be loaded ({reason}). Check its id, its revision and your access to it, or name local files."


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Where the first line ends in a colon, it announces what stands in the next one.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (text or type(error).__name__)[:300].rstrip(". ")


def commit(dataset: Any) -> str | None:
    """The hub's commit from which the data came, where the data set says it."""
    found = {match[1] for url in dataset.download_checksums or {} if (match := _COMMIT.search(url))}
    return found.pop() if len(found) == 1 else None


def dataset_chunks(dataset: Any, source: str, limits: Limits) -> Iterator[Chunk]:
    at_once = _rows_at_once(dataset.data.nbytes, dataset.data.num_rows, limits)
    tables = dataset.with_format("arrow").iter(batch_size=at_once)
    yield from _chunks((batch for table in tables for batch in table.combine_chunks().to_batches()), source, limits)


# -- chunks ----------------------------------------------------------------------------------------------------------


def _rows_at_once(n_bytes: int, n_rows: int, limits: Limits) -> int:
    """How many rows to take into memory together."""
    return max(1, min(limits.records, limits.n_bytes * n_rows // max(n_bytes, 1)))


def _chunks(batches: Iterable[Any], source: str, limits: Limits) -> Iterator[Chunk]:
    number = 1
    for batch in batches:
        plain = _without_views(batch)
        for start in range(0, plain.num_rows, limits.records):
            for part in _halved(plain.slice(start, limits.records), limits.n_bytes):
                yield Chunk(source, number, part.nbytes, _stream(part), read_rows)
                number += part.num_rows


def _halved(batch: Any, most_bytes: int) -> Iterator[Any]:
    if batch.nbytes <= most_bytes or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _halved(batch.slice(0, half), most_bytes)
    yield from _halved(batch.slice(half), most_bytes)


def _without_views(batch: Any) -> Any:
    """Text as most tables hold it. A slice of views has the size of the whole, and would be sent with it."""
    import pyarrow as pa

    fields = [field.with_type(_without_view(field.type)) for field in batch.schema]
    schema = pa.schema(fields, metadata=batch.schema.metadata)
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def _without_view(kind: Any) -> Any:
    import pyarrow as pa

    if kind in (pa.string_view(), pa.binary_view()):
        return pa.large_string() if kind == pa.string_view() else pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_without_view(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_view(field.type)) for field in kind])
    return kind


def _stream(batch: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def read_rows(chunk: Chunk) -> Iterator[Line]:
    import pyarrow as pa

    number = chunk.number
    for batch in pa.ipc.open_stream(chunk.payload):
        nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
        try:
            lines = [_line(chunk.source, number + i, record, nested) for i, record in enumerate(batch.to_pylist())]
        except (ValueError, OverflowError):  # Text that is no UTF-8, a date out of range: it is one row's alone.
            lines = [_single(chunk.source, number + i, batch.slice(i, 1), nested) for i in range(batch.num_rows)]
        number += batch.num_rows
        yield from lines


def _line(source: str, number: int, record: Record, nested: list[str]) -> Line:
    for column in nested:
        record[column] = _without_nulls(record[column])
    return Line(source, number, _as_json(record), record, "", "")


def _single(source: str, number: int, row: Any, nested: list[str]) -> Line:
    try:
        return _line(source, number, row.to_pylist()[0], nested)
    except UnicodeDecodeError as error:
        reason, detail = invalid_utf8(error)
    except (ValueError, OverflowError) as error:
        reason, detail = "unreadable value", str(error)
    return Line(source, number, _as_json(_readable(row)), None, reason, detail)


def _readable(row: Any) -> Record:
    """Of a row with an unreadable value, the rest."""
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record[name] = column.to_pylist()[0]
        except (ValueError, OverflowError):
            record[name] = "(unreadable)"
    return record


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _as_json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, default=str).encode()
