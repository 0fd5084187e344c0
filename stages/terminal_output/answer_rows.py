"""The rows of the answer to a query, and the verdict of a ready question."""

import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from prefcache import row_layout
from prefcache.pipeline.visible_text import count
from prefcache.terminal_output.console import open_console, say, wrap

if TYPE_CHECKING:
    from prefcache.pipeline.questions import Verdict


def print_rows(columns: list[str], rows: Iterator[tuple[Any, ...]], limit: int) -> None:
    """Print the first rows, whole, and count all."""
    shown = list(islice(rows, limit))
    row_layout.print_rows(open_console(), columns, shown)
    n_more = sum(1 for _ in rows)
    say(count(len(shown), "row") + (f" of {len(shown) + n_more:,}" if n_more else ""))


def print_verdict(verdict: "Verdict", *, err: bool = False) -> None:
    print(wrap(verdict.sentence), file=sys.stderr if err else sys.stdout)
