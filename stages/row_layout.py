"""Lay out the rows of an answer for a person: a table if it fits, else each row as lines of its own."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefcache.pipeline.visible_text import visible

_ANY_WIDTH = 1 << 20


def format_value(value: Any, most: int | None = None) -> str:
    """Return a value as text, cut after `most` characters."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value), most)


def start_table(*columns: str) -> Table:
    """Start a table; `>` before a column's name aligns it to the right."""
    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left")
    return table


def print_rows(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int | None = None
) -> None:
    """Print a table if it fits in the width, else each row as lines of its own. No name is cut, and no value before `most` characters."""
    names = [visible(column) for column in columns]
    cells = [[format_value(value, most) for value in row] for row in rows]
    table = start_table(*names)
    for row in cells:
        table.add_row(*map(Text, row))
    if console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum <= console.width:
        console.print(table)
        return
    for line in _lines(names, cells):
        print(line, file=console.file)


def _lines(names: list[str], cells: list[list[str]]) -> Iterable[str]:
    """Yield lines of a column's name and its whole value."""
    if not cells:
        yield from names
    width = max(map(cell_len, names), default=0)
    for n, row in enumerate(cells, 1):
        yield f"-- row {n:,}"
        for name, value in zip(names, row, strict=True):
            lead = name + " " * (width - cell_len(name))
            for line in value.split("\n"):
                yield f"{lead}  {line}".rstrip()
                lead = " " * width
