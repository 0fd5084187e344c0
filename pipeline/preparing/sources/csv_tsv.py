"""Records in CSV and TSV: a header, then rows whose quoted cells may hold separators, quotes and line ends.

An empty cell is None. A cell that holds a JSON list or object is decoded. Columns named like a label or a score hold
numbers or booleans; elsewhere "1" and "true" stay text, because they may be an answer.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources.chunk import (
    Chunk,
    Limits,
    Line,
    Numbered,
    count_raw,
    explain_utf8,
    find_surrogate,
    group_by_size,
)
from prefcache.pipeline.preparing.sources.jsonl import BOM, open_bytes
from prefcache.pipeline.schema import DATA_COLUMNS

_SCALARS = re.compile(
    "(?<![a-z])(label|score|rating|rank|reward|margin|tag|vote|winner|preferred|preference|better|safer|safe)s?(?![a-z])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[+-]?(\d+|\d+\.\d*|\.\d+)([eE][+-]?\d+)?")
_LONGEST_NAME = 256


class Rows(NamedTuple):
    """What a worker needs to read rows."""

    header: list[str]
    scalars: frozenset[str]  # columns of numbers or booleans
    delimiter: str
    rows: list[Numbered]


def table_chunks(file: Path, source: str, limits: Limits, delimiter: str, names: dict[str, str]) -> Iterator[Chunk]:
    """Yield chunks whose `number` is the row's first line. `names` maps what the formats call a column to the file's name."""
    with open_bytes(file) as stream:
        rows = _raw_rows(file, stream, delimiter)
        header = _parse_header(file, next(rows, (1, b""))[1], delimiter)
        ours = {theirs: ours for ours, theirs in names.items()}
        numbers = {column.name for column in DATA_COLUMNS}
        scalars = frozenset(
            name
            for name in header
            if _SCALARS.search(f"{name} {ours.get(name, '')}") or ours.get(name, name) in numbers
        )
        for size, group in group_by_size(rows, limits, count_raw):
            yield Chunk(source, group[0][0], size, Rows(header, scalars, delimiter, group), read_rows)


def _raw_rows(file: Path, stream: BinaryIO, delimiter: str) -> Iterator[Numbered]:
    """Yield the raw rows and the lines on which they begin, without blank lines."""
    read: list[bytes] = []  # since the row began

    def lines() -> Iterator[str]:
        for number, raw in enumerate(stream):
            read.append(raw.removeprefix(BOM) if number == 0 else raw)
            # In Latin-1 a character is a byte. Whether it is UTF-8 is checked for each row when it is parsed.
            yield read[-1].decode("latin-1")

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines(), delimiter=delimiter)
    began, number, raw = 1, 1, b""
    try:
        for cells in reader:
            raw = b"".join(read)
            read.clear()
            began, number = number, reader.line_num + 1
            if cells:
                yield began, raw
        number = began
        _refuse_open_quote(raw, delimiter)
    except csv.Error as error:
        problem = str(error).partition(" - ")[0]
        raise DataError(
            f"{file} breaks in the row that begins at line {number}: {problem}. Expected CSV in which cells with quotes, "
            "separators or line ends stand in double quotes. Repair the row, or write the file as JSON Lines."
        ) from None


def _refuse_open_quote(last: bytes, delimiter: str) -> None:
    """Refuse a last row that ended only because the file did."""
    try:
        list(csv.reader([last.decode("latin-1")], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise csv.Error("a quote in it is never closed") from None


def _parse_header(file: Path, raw: bytes, delimiter: str) -> list[str]:
    try:
        (cells,) = csv.reader([raw.decode("utf-8")], delimiter=delimiter)
    except (ValueError, csv.Error):
        cells = []
    names = [cell.strip() for cell in cells]
    if not any(names) or any(len(name) > _LONGEST_NAME or name.startswith(("{", "[")) for name in names):
        raise UsageError(f"{file} has no header: its first line must name the columns. Add such a line.")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UsageError(f"{file} has two columns named {twice[0]!r}. Rename one of them in its first line.")
    return names


def read_rows(chunk: Chunk) -> Iterator[Line]:
    rows: Rows = chunk.payload
    csv.field_size_limit(sys.maxsize)
    for number, raw in rows.rows:
        yield _parse_row(chunk.source, number, raw, rows)


def _parse_row(source: str, number: int, raw: bytes, rows: Rows) -> Line:
    try:
        (cells,) = csv.reader([raw.decode("utf-8")], delimiter=rows.delimiter)
    except UnicodeDecodeError as error:
        return Line(source, number, raw, None, *explain_utf8(error))
    if len(cells) != len(rows.header):
        detail = f"found {len(cells)}, the header has {len(rows.header)}"
        return Line(source, number, raw, None, "wrong number of cells", detail)
    # A column without a name is the index that some programs write.
    named = {name: cell for name, cell in zip(rows.header, cells, strict=True) if name}
    record = {name: _parse_cell(cell, name in rows.scalars) for name, cell in named.items()}
    if surrogate := find_surrogate(raw, record):
        return Line(source, number, raw, None, "lone surrogate", surrogate)
    return Line(source, number, json.dumps(record, ensure_ascii=False).encode(), record, "", "")


def _parse_cell(cell: str, is_scalar: bool) -> Any:
    if not cell:
        return None
    if cell.startswith(("[", "{")):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    if is_scalar and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    if is_scalar and _NUMBER.fullmatch(cell.strip()):
        is_float = re.search("[.eE]", cell) or len(cell) >= 20
        return float(cell) if is_float else int(cell)
    return cell
