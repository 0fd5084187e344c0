"""The views, one .sql file each: name, help, and what each reads."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import duckdb

from prefcache.pipeline.schema import PREPARED, data_columns
from prefcache.pipeline.views.query_check import Statement

ANSWER = "answer"  # the rows of a ready question, which its numbers may read


@dataclass(frozen=True)
class View:
    name: str
    select: str

    @property
    def help(self) -> str:
        """The file's first comment."""
        return self.select.partition("\n")[0].removeprefix("--").strip()

    @property
    def stored_tables(self) -> set[str]:
        """The tables of the schema `stored` that the view itself reads."""
        return set(re.findall(r"\bstored\.(\w+)", self.select))

    @property
    def views(self) -> set[str]:
        """The other views that it reads."""
        return {name for name in VIEWS if re.search(rf"(?<!\.)\b(from|join) {name}\b", self.select)}


@dataclass(frozen=True)
class Extension:
    """Tables that a program adds next to the views, before the database is locked."""

    names: tuple[str, ...]
    views: frozenset[str]  # that they are made of
    create: Callable[[duckdb.DuckDBPyConnection], None]


def _read_select(file: Path) -> str:
    """Read a view's SQL, in which a comment stands for the columns that the data brings."""
    select = file.read_text(encoding="utf-8")
    for kind in PREPARED:
        columns = " ".join(f"{name}," for name in data_columns(kind))
        select = select.replace(f"/* data columns of {kind} */", columns)
    return select


VIEWS = {file.stem: View(file.stem, _read_select(file)) for file in sorted(Path(__file__).parent.glob("*.sql"))}


def sort_for_creation() -> list[View]:
    """Order the views so that each follows those it reads."""
    return [
        VIEWS[name] for name in TopologicalSorter({view.name: view.views for view in VIEWS.values()}).static_order()
    ]


def find_stored_tables(query: str, extension: Extension | None = None, kept: Collection[str] = ()) -> set[str]:
    """Find the tables of the schema `stored` that a query reads; UsageError unless it is a SELECT over the views and `kept` tables.

    With an extension, also those that its tables are made of, whether the query reads them or not.
    """
    known = [*VIEWS, *(extension.names if extension else ()), *kept]
    read = Statement(duckdb.connect(), query, known).views | (extension.views if extension else set())
    waiting, tables = [name for name in read if name in VIEWS], set[str]()
    while waiting:
        view = VIEWS[waiting.pop()]
        tables |= view.stored_tables
        waiting += view.views
    return tables
