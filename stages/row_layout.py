"""Lay out rows for a person: a table where it reads well, else each row as a block of `name  value` lines.

A table it is if it fits the width with every word of a header and every value whole, and if no value has a line break or is longer
than a line of prose. On a terminal, lines of prose wrap between words; ids, keys and paths are never broken. A pipe has a width of its
own and gets every value whole, so that its bytes are the same in any terminal and grep finds all of a line.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefcache.pipeline.visible_text import visible

PIPE_WIDTH = 100
LONG = 80  # characters; a longer value is prose, which a narrow column would tear
_LEAST_PROSE = 24  # columns that prose in a table needs; in a block, it wraps only if it has as many
_BETWEEN = 2  # columns between two columns of a table
_EDGES = 2  # columns around it


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise what every other write to a closed pipe raises: rich would exit with code 1."""
        raise BrokenPipeError


def open_console(file: TextIO | None = None) -> Console:
    """Return a console on stdout as wide as the terminal, or plain and of a fixed width for a pipe."""
    is_terminal = (file or sys.stdout).isatty()
    plain: dict[str, Any] = {} if is_terminal else {"width": PIPE_WIDTH, "color_system": None, "force_terminal": False}
    # In a notebook, rich would show a table by itself and write nothing.
    return _Console(file=file, markup=False, highlight=False, emoji=False, force_jupyter=False, **plain)


def format_value(value: Any, most: int | None = None) -> str:
    """Return a value as text, cut after `most` characters."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value), most)


@dataclass(frozen=True)
class Column:
    """A column of a table: `>` before its name aligns it to the right, `~` says that its values are prose and may wrap."""

    name: str
    is_right: bool
    is_prose: bool

    @classmethod
    def parse(cls, text: str) -> "Column":
        return cls(text.lstrip(">~"), text.startswith(">"), text.startswith("~"))


Rows = Iterable[Sequence[str | Text]]  # of a command's own table: a str is made visible, a Text keeps its style


def print_table(console: Console, columns: Sequence[str], rows: Rows) -> None:
    """Print a command's own table, with columns as Column.parse reads them."""
    _print(console, list(map(Column.parse, columns)), _cells(rows))


def fits(console: Console, columns: Sequence[str], rows: Rows) -> bool:
    """Whether these rows would be a table."""
    return _choose_widths(console, list(map(Column.parse, columns)), _cells(rows)) is not None


def _cells(rows: Rows) -> list[list[Text]]:
    return [[cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row] for row in rows]


def print_rows(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int | None = None
) -> None:
    """Print the rows of an answer. No value is cut before `most` characters."""
    cells = [[Text(format_value(value, most)) for value in row] for row in rows]
    _print(console, [Column(visible(name), is_right=False, is_prose=False) for name in columns], cells)


def _print(console: Console, columns: list[Column], cells: list[list[Text]]) -> None:
    widths = _choose_widths(console, columns, cells)
    if widths is None:
        _print_numbered(console, [column.name for column in columns], cells)
        return
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column.name), justify="right" if column.is_right else "left", width=width)
    for row in cells:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip(), file=console.file)


def _choose_widths(console: Console, columns: list[Column], cells: list[list[Text]]) -> list[int] | None:
    """Return the widths of the columns of a table; None if the rows read better as blocks."""
    is_long = any(
        "\n" in cell.plain or len(cell) > LONG
        for row in cells
        for column, cell in zip(columns, row, strict=True)
        if not column.is_prose
    )
    return None if is_long else _fit_widths(columns, cells, console.width)


def _fit_widths(columns: list[Column], cells: list[list[Text]], width: int) -> list[int] | None:
    """Return the columns' widths; None if they do not fit with every word of a name and every value whole."""
    natural, least = [], []
    for i, column in enumerate(columns):
        values = [row[i].plain for row in cells]
        longest = max(map(cell_len, values), default=0)
        words = max(map(cell_len, column.name.split()), default=0)
        natural.append(max(longest, cell_len(column.name)))
        if column.is_prose:
            longest = max((cell_len(word) for value in values for word in value.split()), default=0)
            longest = max(longest, min(natural[-1], _LEAST_PROSE))
        least.append(max(longest, words))
    excess = sum(natural) + _BETWEEN * (len(columns) - 1) + _EDGES - width
    while excess > 0:
        slack = [a - b for a, b in zip(natural, least, strict=True)]
        widest = max(range(len(columns)), key=lambda i: slack[i], default=None)
        if widest is None or not slack[widest]:
            return None
        natural[widest] -= 1
        excess -= 1
    return natural


def _print_numbered(console: Console, names: list[str], cells: list[list[Text]]) -> None:
    if not cells:
        for name in names:
            console.print(Text(name), soft_wrap=True)
    for n, row in enumerate(cells, 1):
        console.print(Text(f"-- row {n:,}"), soft_wrap=True)
        print_block(console, names, row)


def print_block(console: Console, names: Sequence[str], row: Sequence[Text]) -> None:
    """Print a record as lines of a name and its value."""
    indent = max(map(cell_len, names), default=0) + 2
    for name, value in zip(names, row, strict=True):
        for lead, line in zip_longest([name], _wrap_value(console, value, indent), fillvalue=""):
            text = Text(str(lead)) + Text(" " * (indent - cell_len(str(lead)))) + (line or Text())
            text.rstrip()
            console.print(text, soft_wrap=True)


def _wrap_value(console: Console, value: Text, indent: int) -> list[Text]:
    """The lines of a value, which on a terminal wrap between words."""
    lines = list(value.split("\n", allow_blank=True))
    width = console.width - indent
    if not console.is_terminal or width < _LEAST_PROSE:
        return lines
    return [part for line in lines for part in _wrap_line(line, width)]


def _wrap_line(line: Text, width: int) -> list[Text]:
    """Break a line between words; a word that is wider than the line stays whole."""
    breaks, used = [], 0
    for word in re.finditer(r"\S+\s*|^\s+", line.plain):
        if used and used + cell_len(word[0].rstrip()) > width:
            breaks.append(word.start())
            used = 0
        used += cell_len(word[0])
    return list(line.divide(breaks))
