"""Records in tables: Parquet, Arrow files and streams, folders of `save_to_disk`, data sets of the hub.

A chunk carries its rows as an Arrow stream. In a table every message of a column has the same keys, and null stands for
a key that a message never had: null keys inside structs are left out, null columns of a record are None.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources.chunk import Chunk, Limits, Line, Record, explain_utf8

_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_MOST_BYTES_SHOWN = 1024


@contextmanager
def _explain_damage(file: Path, kind: str) -> Iterator[None]:
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

    with (
        _explain_damage(file, "Parquet"),
        pq.ParquetFile(file.absolute(), pre_buffer=False, buffer_size=1 << 20) as table,
    ):
        row_bytes = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        at_once = _rows_at_once(row_bytes, table.metadata.num_rows, limits)
        yield from _chunks(table.iter_batches(batch_size=at_once), source, limits)


def arrow_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    import pyarrow as pa

    with _explain_damage(file, "Arrow"), pa.memory_map(str(file)) as mapped:
        yield from _chunks(_arrow_batches(mapped), source, limits)


def _arrow_batches(mapped: Any) -> Iterator[Any]:
    import pyarrow as pa

    if mapped.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(mapped)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        mapped.seek(0)
        yield from pa.ipc.open_stream(mapped)


def check_opens(file: Path, kind: str) -> None:
    """Refuse a table that cannot be opened, before its rows are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with _explain_damage(file, "Parquet"), pq.ParquetFile(file.absolute()):
            return
    with _explain_damage(file, "Arrow"), pa.memory_map(str(file)) as mapped:
        next(_arrow_batches(mapped), None)


# -- data sets -------------------------------------------------------------------------------------------------------


def load_folder(folder: Path, split: str) -> Any:
    """Load what `save_to_disk` wrote; with several splits, the one named."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # The library passes on whatever its parts raise.
        raise DataError(
            f"{folder} looks like a folder of save_to_disk, but is empty or damaged ({_first_line(error)}). Save it again."
        ) from None
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UsageError(f"{folder} has no split {split!r}. Set this source's split to one of: {', '.join(dataset)}.")
    return dataset[split]


def load_hub(hub: str, name: str | None, split: str, revision: str | None, most: int | None = None) -> Any:
    """Load a data set of the hub, or its first `most` records. Its own code is never run: the library can no longer do that."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if most is not None and (first := _stream_first(hub, name, split, revision, most)) is not None:
            return first
        dataset = datasets.load_dataset(hub, name, split=split, revision=revision)
    except Exception as error:  # The library passes on whatever its parts raise.
        raise UsageError(f"data set {hub}: {_explain_hub_error(error)}") from None
    fetched = hub_commit(dataset)
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and fetched not in (None, revision):
        raise UsageError(
            f"data set {hub}: revision {revision} was asked for, the local cache has {fetched}. "
            "Connect to the network, or ask for that revision."
        )
    return dataset


def _stream_first(hub: str, name: str | None, split: str, revision: str | None, most: int) -> Any:
    """Fetch the first records of a data set without the rest of it; None if the hub cannot be reached."""
    import datasets

    try:
        stream = datasets.load_dataset(hub, name, split=split, revision=revision, streaming=True)
        return datasets.Dataset.from_list(list(stream.take(most)), features=stream.features)
    except (ConnectionError, FileNotFoundError):
        return None  # it may be in the local cache, as a whole


def _explain_hub_error(error: Exception) -> str:
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
    # A first line that ends in a colon announces the next one.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (text or type(error).__name__)[:300].rstrip(". ")


def hub_commit(dataset: Any) -> str | None:
    """Return the hub's commit from which the data came, if the data set tells."""
    commits = {match[1] for url in dataset.download_checksums or {} if (match := _COMMIT.search(url))}
    return commits.pop() if len(commits) == 1 else None


def dataset_chunks(dataset: Any, source: str, limits: Limits) -> Iterator[Chunk]:
    at_once = _rows_at_once(dataset.data.nbytes, dataset.data.num_rows, limits)
    tables = dataset.with_format("arrow").iter(batch_size=at_once)
    yield from _chunks((batch for table in tables for batch in table.combine_chunks().to_batches()), source, limits)


# -- chunks ----------------------------------------------------------------------------------------------------------


def _rows_at_once(n_bytes: int, n_rows: int, limits: Limits) -> int:
    """Return how many rows to take into memory together."""
    return max(1, min(limits.records, limits.n_bytes * n_rows // max(n_bytes, 1)))


def _chunks(batches: Iterable[Any], source: str, limits: Limits) -> Iterator[Chunk]:
    import pyarrow as pa

    number = 1
    for batch in batches:
        plain = _copy_views(batch)
        for start in range(0, plain.num_rows, limits.records):
            for part in _halve(plain.slice(start, limits.records), limits.n_bytes):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                yield Chunk(source, number, part.nbytes, bytes(sink.getvalue().to_pybytes()), read_rows)
                number += part.num_rows


def _halve(batch: Any, most_bytes: int) -> Iterator[Any]:
    if batch.nbytes <= most_bytes or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _halve(batch.slice(0, half), most_bytes)
    yield from _halve(batch.slice(half), most_bytes)


def _copy_views(batch: Any) -> Any:
    """Store text as most tables do: a slice of views has the size of the whole, and the worker would be sent all of it."""
    import pyarrow as pa

    fields = [field.with_type(_plain_type(field.type)) for field in batch.schema]
    schema = pa.schema(fields, metadata=batch.schema.metadata)
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def _plain_type(kind: Any) -> Any:
    import pyarrow as pa

    if kind in (pa.string_view(), pa.binary_view()):
        return pa.large_string() if kind == pa.string_view() else pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_plain_type(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    return kind


def read_rows(chunk: Chunk) -> Iterator[Line]:
    import pyarrow as pa

    number = chunk.number
    for batch in pa.ipc.open_stream(chunk.payload):
        nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
        try:
            lines = [_line(chunk.source, number + i, record, nested) for i, record in enumerate(batch.to_pylist())]
        except (ValueError, OverflowError):  # Invalid UTF-8 or a date out of range: only the row with it is unreadable.
            lines = [_parse_single(chunk.source, number + i, batch.slice(i, 1), nested) for i in range(batch.num_rows)]
        number += batch.num_rows
        yield from lines


def _line(source: str, number: int, record: Record, nested: list[str]) -> Line:
    for column in nested:
        record[column] = _drop_nulls(record[column])
    return Line(source, number, _as_json(record), record, "", "")


def _parse_single(source: str, number: int, row: Any, nested: list[str]) -> Line:
    try:
        return _line(source, number, row.to_pylist()[0], nested)
    except UnicodeDecodeError as error:
        reason, detail = explain_utf8(error)
    except (ValueError, OverflowError) as error:
        reason, detail = "unreadable value", str(error)
    readable = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            readable[name] = column.to_pylist()[0]
        except (ValueError, OverflowError):
            readable[name] = "(unreadable)"
    return Line(source, number, _as_json(readable), None, reason, detail)


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_drop_nulls(inner) for inner in value]
    return value


def _as_json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, default=_shorten).encode()


def _shorten(value: Any) -> str:
    """Write a value that JSON lacks as text; long bytes, such as a picture's, as their number alone."""
    return f"({len(value):,} bytes)" if isinstance(value, bytes) and len(value) > _MOST_BYTES_SHOWN else str(value)
