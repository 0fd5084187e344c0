"""The answer to a query or a ready question in Python: an Arrow table, and what other libraries and a notebook make of it."""

import html
import io
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefcache.commands.query import AnsweredQuestion
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.questions import Verdict
from prefcache.pipeline.views.query_worker import Answer
from prefcache.pipeline.visible_text import count, visible

_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 300  # of a value


@dataclass(frozen=True, repr=False)
class SqlResult:
    """All rows of an answer. Methods are named as DuckDB's; polars, pandas and DuckDB also take the result itself."""

    table: pa.Table

    @classmethod
    def read(cls, answer: Answer) -> "SqlResult":
        columns = answer.arrow()
        return cls(pa.Table.from_batches(list(answer.batches(columns)), columns.schema))

    def arrow(self) -> pa.Table:
        return self.table

    def df(self) -> Any:
        """As a pandas DataFrame."""
        return self.table.to_pandas()

    def pl(self) -> Any:
        """As a polars DataFrame. Needs polars."""
        try:
            import polars
        except ModuleNotFoundError:
            raise UsageError("pl() needs polars, which is not installed: pip install polars.") from None
        return polars.from_arrow(self.table)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return _rows(self.table)

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Hand the rows over without a copy, by Arrow's PyCapsule protocol."""
        return self.table.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        from rich.console import Console

        from prefcache import row_layout

        out = io.StringIO()
        # In a notebook, rich would show the table by itself and write nothing.
        console = Console(file=out, markup=False, highlight=False, emoji=False, force_jupyter=False)
        row_layout.print_rows(console, self.columns, _rows(self.table.slice(0, _SHOWN_ROWS)), _SHOWN_CHARACTERS)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([*filter(None, lines), self._count_rows()])

    def _repr_html_(self) -> str:
        from prefcache.row_layout import format_value

        def cells(tag: str, values: Iterable[Any]) -> str:
            texts = (format_value(value, _SHOWN_CHARACTERS) for value in values)
            return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

        head = cells("th", self.columns)
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in _rows(self.table.slice(0, _SHOWN_ROWS)))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{self._count_rows()}</p>"

    def _count_rows(self) -> str:
        more = len(self) - _SHOWN_ROWS
        return count(more, "more row") if more > 0 else count(len(self), "row")


@dataclass(frozen=True, repr=False)
class AskResult(SqlResult):
    """All rows of a ready question, and its verdict: a sentence, and the numbers behind it."""

    verdict: Verdict

    @classmethod
    def read_question(cls, answered: AnsweredQuestion) -> "AskResult":
        return cls(SqlResult.read(answered.answer).table, answered.verdict())

    def __repr__(self) -> str:
        width = shutil.get_terminal_size().columns
        sentence = textwrap.fill(visible(self.verdict.sentence), width, break_long_words=False, break_on_hyphens=False)
        return f"{super().__repr__()}\n{sentence}"

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_()}<p><b>{html.escape(visible(self.verdict.sentence))}</b></p>"


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
