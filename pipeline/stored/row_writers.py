"""Writers for the kind of file that a name asks for: .parquet and .arrow by columns, .jsonl and .csv by rows.

A file appears whole or not at all (see overwrite_guard.py). Text is compressed if the name ends in .gz or .zst.
"""

import base64
import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact, overwrite_guard

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BY_COLUMNS = (".parquet", ".arrow")
BY_ROWS = (".jsonl", ".csv")


class Rows(Protocol):
    def write(self, rows: list[dict[str, Any]]) -> None: ...


class Columns(Protocol):
    def write_table(self, table: pa.Table) -> None: ...


def file_kind(path: Path) -> str:
    """Return the kind of a file's name, `.jsonl` for scored.jsonl.gz; UsageError for others."""
    name = path.name.lower()
    compression = next((ending for ending in _COMPRESSED if name.endswith(ending)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in BY_COLUMNS + BY_ROWS or (compression and kind in BY_COLUMNS):
        raise UsageError(
            f"{path}: unsupported extension {''.join(path.suffixes[-2:] if compression else path.suffixes[-1:]) or '(none)'}; use "
            ".parquet, .arrow, .jsonl or .csv, the last two also with .gz or .zst."
        )
    return kind


@contextlib.contextmanager
def open_columns(path: Path, schema: pa.Schema) -> Iterator[Columns]:
    with overwrite_guard.open_stream(path) as stream:
        file = pa.PythonFile(stream, "w")
        if file_kind(path) == ".parquet":
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
                yield writer
        else:
            with pa.ipc.new_stream(file, schema) as writer:
                yield writer


@contextlib.contextmanager
def open_rows(path: Path, columns: list[str]) -> Iterator[Rows]:
    """Write JSON Lines, whose rows may have any keys, or CSV with these columns."""
    compression = next((name for ending, name in _COMPRESSED.items() if path.name.lower().endswith(ending)), None)
    with overwrite_guard.open_stream(path) as stream:
        file = pa.PythonFile(_LeftOpen(stream), "w")
        with pa.CompressedOutputStream(file, compression) if compression else contextlib.nullcontext(file) as out:
            yield _Csv(out, columns) if file_kind(path) == ".csv" else _JsonLines(out)


def read_texts(path: Path, column: str, reader: str) -> pa.ChunkedArray:
    """Read one column of such a file. `reader` says in the error who needs it."""
    try:
        kind = file_kind(path)
        if kind == ".parquet":
            table = pq.read_table(path.absolute(), columns=[column], page_checksum_verification=True)
        elif kind == ".arrow":
            table = artifact.open_arrow_stream(path)
        elif kind == ".jsonl":
            schema = pa.schema([(column, pa.string())])
            parse = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            table = pa_json.read_json(pa.input_stream(str(path)), parse_options=parse)
        else:
            convert = pa_csv.ConvertOptions(column_types={column: pa.string()}, include_columns=[column])
            lines = pa_csv.ParseOptions(newlines_in_values=True)
            table = pa_csv.read_csv(pa.input_stream(str(path)), convert_options=convert, parse_options=lines)
        return table[column].cast(pa.string())
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).strip("'").partition("\n")[0]
        raise UsageError(f"{path} cannot be read as a file with a column {column}; {reader}. ({reason})") from None


class _LeftOpen:
    """A stream that stays open when a compressor closes it."""

    closed = False

    def __init__(self, stream: artifact.Stream) -> None:
        self.write, self.flush = stream.write, stream.flush

    def close(self) -> None:
        pass


class _JsonLines:
    def __init__(self, out: Any) -> None:
        self._out = out

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._out.write("".join(f"{_json(row)}\n" for row in rows).encode())


class _Csv:
    def __init__(self, out: Any, columns: list[str]) -> None:
        self._out, self._columns = out, columns
        self._put([columns])

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._put([[_cell(row.get(name)) for name in self._columns] for row in rows])

    def _put(self, lines: list[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        self._out.write(text.getvalue().encode())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _cell(value: Any) -> Any:
    if isinstance(value, bool | list | dict):
        return _json(value)
    return value if value is None or isinstance(value, str | int | float) else _plain(value)


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
