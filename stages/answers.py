"""The answer to a query for machines, on stdout or in a file: CSV, JSON, Parquet, Markdown. Rows pass through; none are kept."""

import csv
import json
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.progress import printable
from pipeline.stored import rowfiles
from pipeline.views import Result

_ROWS_AT_ONCE = 4096


def show(result: Result, form: str) -> None:
    _FORMS[form](result)


def save(result: Result, path: Path) -> int:
    """Into the kind of file that the name says, whole or not at all; returns the number of rows."""
    if rowfiles.kind_of(path) in rowfiles.BY_COLUMNS:
        reader = result.arrow()
        with rowfiles.by_columns(path, reader.schema) as file:
            for batch in result.batches(reader):
                file.write_table(pa.Table.from_batches([batch]))
        return result.n_rows
    with rowfiles.by_rows(path, result.columns) as out:
        found = result.rows()
        while rows := [_named(result, row) for row in islice(found, _ROWS_AT_ONCE)]:
            out.write(rows)
    return result.n_rows


def _json(result: Result) -> None:
    lead = "[\n "
    for row in result.rows():
        text = json.dumps(_named(result, row), ensure_ascii=sys.stdout.isatty(), default=_plain)
        print(lead, text, sep="", end="")
        lead = ",\n "
    print("[]" if lead == "[\n " else "\n]")


def _csv(result: Result) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    # A file gets what stands in the data, a terminal what cannot drive it.
    shown = _printable if sys.stdout.isatty() else tuple
    out.writerow(shown(result.columns))
    out.writerows(map(shown, result.rows()))


def _markdown(result: Result) -> None:
    print(f"| {' | '.join(map(_cell, result.columns))} |\n|{' --- |' * len(result.columns)}")
    for row in result.rows():
        print(f"| {' | '.join(map(_cell, row))} |")


def _parquet(result: Result) -> None:
    if sys.stdout.isatty():
        raise UsageError("Parquet is no text for a terminal. Name a file (--out answer.parquet), or redirect it.")
    reader = result.arrow()
    with pq.ParquetWriter(pa.PythonFile(sys.stdout.buffer, "w"), reader.schema, compression="zstd") as file:
        for batch in result.batches(reader):
            file.write_batch(batch)
    sys.stdout.buffer.flush()


def _printable(row: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(printable(value) if isinstance(value, str) else value for value in row)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else printable(str(value))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _named(result: Result, row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(result.columns, row, strict=True))


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


_FORMS: dict[str, Callable[[Result], None]] = {
    "csv": _csv,
    "json": _json,
    "markdown": _markdown,
    "parquet": _parquet,
}
