"""Rows into the kind of file that its name asks for: .parquet and .arrow by columns, .jsonl and .csv by rows.

The file is there whole or not at all. Text ones are compressed where the name ends in .gz or .zst. A column of texts can be read back.
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

from pipeline.errors import UsageError
from pipeline.stored import artifact

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BY_COLUMNS = (".parquet", ".arrow")
BY_ROWS = (".jsonl", ".csv")


class Rows(Protocol):
    def write(self, rows: list[dict[str, Any]]) -> None: ...


class Columns(Protocol):
    def write_table(self, table: pa.Table) -> None: ...


def kind_of(path: Path) -> str:
    """`.jsonl` of scored.jsonl.gz, or UsageError for what is not written."""
    name = path.name.lower()
    compression = next((ending for ending in _COMPRESSED if name.endswith(ending)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in BY_COLUMNS + BY_ROWS or (compression and kind in BY_COLUMNS):
        raise UsageError(
            f"{path}: its ending says no kind of file that is written here. Expected {', '.join(BY_COLUMNS + BY_ROWS)}; "
            "the last two also with .gz or .zst."
        )
    return kind


@contextlib.contextmanager
def by_columns(path: Path, schema: pa.Schema) -> Iterator[Columns]:
    with artifact.commit_stream(path) as stream:
        file = pa.PythonFile(stream, "w")
        if kind_of(path) == ".parquet":
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
                yield writer
        else:
            with pa.ipc.new_stream(file, schema) as writer:
                yield writer


@contextlib.contextmanager
def by_rows(path: Path, columns: list[str]) -> Iterator[Rows]:
    """JSON Lines, whose rows hold what they hold; or CSV with these columns."""
    compression = next((name for ending, name in _COMPRESSED.items() if path.name.lower().endswith(ending)), None)
    with artifact.commit_stream(path) as stream:
        file = pa.PythonFile(_LeftOpen(stream), "w")
        with pa.CompressedOutputStream(file, compression) if compression else contextlib.nullcontext(file) as out:
            yield _Csv(out, columns) if kind_of(path) == ".csv" else _JsonLines(out)


def read_texts(path: Path, column: str, reader: str) -> pa.ChunkedArray:
    """One column of such a file. `reader`: who needs it, for the error where there is none."""
    try:
        found = _READERS[kind_of(path)](path, column)
        return found[column].cast(pa.string())
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).strip("'").partition("\n")[0]
        raise UsageError(f"{path} cannot be read as a file with a column {column}; {reader}. ({reason})") from None


def _read_parquet(path: Path, column: str) -> pa.Table:
    return pq.read_table(path, columns=[column], page_checksum_verification=True)


def _read_arrow(path: Path, column: str) -> pa.Table:
    return artifact.open_arrow_stream(path).select([column])


def _read_lines(path: Path, column: str) -> pa.Table:
    schema = pa.schema([(column, pa.string())])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    return pa_json.read_json(pa.input_stream(str(path)), parse_options=options)


def _read_csv(path: Path, column: str) -> pa.Table:
    options = pa_csv.ConvertOptions(column_types={column: pa.string()}, include_columns=[column])
    lines = pa_csv.ParseOptions(newlines_in_values=True)
    return pa_csv.read_csv(pa.input_stream(str(path)), convert_options=options, parse_options=lines)


_READERS = {".parquet": _read_parquet, ".arrow": _read_arrow, ".jsonl": _read_lines, ".csv": _read_csv}


class _LeftOpen:
    """A stream that whoever compresses into it may close."""

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
