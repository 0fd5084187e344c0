"""Records in CSV and TSV: a header, then rows whose quoted cells may hold separators, quotes and line ends.

An empty cell is None. A cell that holds a JSON list or object is decoded. Columns named like a label or a score hold
numbers or yes and no; elsewhere "1" and "true" stay text, for they may be somebody's answer.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.errors import DataError, UsageError
from pipeline.preparing.sources.chunk import Chunk, Limits, Line, Numbered, broken_text, grouped, invalid_utf8
from pipeline.preparing.sources.text import BOM, opened

_SCALARS = re.compile(
    "(?<![a-z])(label|score|rating|rank|reward|margin|tag|vote|winner|preferred|preference|better|safer|safe)s?(?![a-z])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[+-]?(\d+|\d+\.\d*|\.\d+)([eE][+-]?\d+)?")
_LONGEST_NAME = 256


class Rows(NamedTuple):
    """What a worker needs to read rows."""

    header: list[str]
    scalars: frozenset[str]  # columns of numbers or yes and no
    delimiter: str
    rows: list[Numbered]


def table_chunks(file: Path, source: str, limits: Limits, delimiter: str, names: dict[str, str]) -> Iterator[Chunk]:
    """`number` is the row's first line. `names` says what the formats call a column: as the file calls it."""
    with opened(file) as stream:
        rows = _rows(file, stream, delimiter)
        header = _header(file, next(rows, (1, b""))[1], delimiter)
        renamed = {theirs: ours for ours, theirs in names.items()}
        scalars = frozenset(name for name in header if _SCALARS.search(f"{name} {renamed.get(name, '')}"))
        for size, group in grouped(rows, limits):
            yield Chunk(source, group[0][0], size, Rows(header, scalars, delimiter, group), read_rows)


def _rows(file: Path, stream: BinaryIO, delimiter: str) -> Iterator[Numbered]:
    """The raw rows and the lines on which they begin. Blank lines are no rows."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for number, raw in enumerate(stream):
            taken.append(raw.removeprefix(BOM) if number == 0 else raw)
            # In Latin-1 a character is a byte. Whether it is UTF-8 is asked of each row where it is read.
            yield taken[-1].decode("latin-1")

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines(), delimiter=delimiter)
    began, number, raw = 1, 1, b""
    try:
        for cells in reader:
            raw = b"".join(taken)
            taken.clear()
            began, number = number, reader.line_num + 1
            if cells:
                yield began, raw
        number = began
        _check_closed(raw, delimiter)
    except csv.Error as error:
        problem = str(error).partition(" - ")[0]
        raise DataError(
            f"{file} breaks in the row that begins at line {number}: {problem}. Expected CSV in which cells with quotes, "
            "separators or line ends stand in double quotes. Mend the row, or write the file as JSON Lines."
        ) from None


def _check_closed(last: bytes, delimiter: str) -> None:
    """Whether the last row ended by itself, not by the file's end."""
    try:
        list(csv.reader([last.decode("latin-1")], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise csv.Error("a quote in it is never closed") from None


def _header(file: Path, raw: bytes, delimiter: str) -> list[str]:
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
        yield _read_row(chunk.source, number, raw, rows)


def _read_row(source: str, number: int, raw: bytes, rows: Rows) -> Line:
    try:
        (cells,) = csv.reader([raw.decode("utf-8")], delimiter=rows.delimiter)
    except UnicodeDecodeError as error:
        return Line(source, number, raw, None, *invalid_utf8(error))
    if len(cells) != len(rows.header):
        detail = f"found {len(cells)}, the header has {len(rows.header)}"
        return Line(source, number, raw, None, "wrong number of cells", detail)
    # A column without a name is the index that some programs write.
    named = {name: cell for name, cell in zip(rows.header, cells, strict=True) if name}
    record = {name: _value(cell, name in rows.scalars) for name, cell in named.items()}
    if broken := broken_text(raw, record):
        return Line(source, number, raw, None, "lone surrogate", broken)
    return Line(source, number, json.dumps(record, ensure_ascii=False).encode(), record, "", "")


def _value(cell: str, scalar: bool) -> Any:
    if not cell:
        return None
    if cell.startswith(("[", "{")):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    if scalar and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    if scalar and _NUMBER.fullmatch(cell.strip()):
        return float(cell) if re.search("[.eE]", cell) else int(cell) if len(cell) < 20 else float(cell)
    return cell
