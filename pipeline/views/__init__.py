"""SQL over prepared data, reference scores and runs, in a DuckDB that can read nothing else.

One view per .sql file here; its first comment is its help. To add a view, add a file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.errors import IntegrityError, ResourceError, UsageError
from pipeline.schema import CACHE, EVENTS, PREPARED, STEPS, THROUGHPUT
from pipeline.stored import duck

MEMORY_LIMIT = "4GB"
# What is known of each run: the folder of its parts, and what makes rewards of log-probs.
RUNS = pa.schema(
    [
        ("folder", pa.string()),
        ("run", pa.string()),
        ("loss", pa.string()),
        ("beta", pa.float64()),
        ("per_token", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Sources:
    """Verified files and tables, from which the views are made."""

    prepared: pa.Table
    cached: Sequence[str]  # Parquet shards
    references: pa.Table  # path of the shard's folder, name of the reference
    visits: Sequence[str]  # Parquet parts in RUN/steps/
    runs: pa.Table  # of RUNS
    events: Sequence[str] = ()  # in RUN/events/
    throughput: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        return [*self.cached, *self.visits, *self.events, *self.throughput]


class Result:
    """The answer to a query, read as far as it is wanted."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, files: Sequence[str] = ()) -> None:
        self._cursor, self._files = cursor, files
        self.columns = [column[0] for column in cursor.description or []]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        # Answers stream: an error may come with the last block.
        try:
            while block := self._cursor.fetchmany(1024):
                yield from block
        except (duckdb.Error, RuntimeError) as error:
            raise _translated(error, self._files) from None


def connect(sources: Sources) -> duckdb.DuckDBPyConnection:
    con = duck.connect()
    con.execute("set python_enable_replacements = false")
    con.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
    con.execute("set allowed_paths = $paths", {"paths": sources.files})
    con.register("prepared", _with_all_columns(sources.prepared))
    con.register("references_", sources.references)
    con.register("runs_", sources.runs)
    try:
        duck.define(con, "cached", sources.cached, CACHE)
        duck.define(con, "visits", sources.visits, STEPS)
        duck.define(con, "events", sources.events, EVENTS)
        duck.define(con, "timed", sources.throughput, THROUGHPUT)
        _create_views(con)
    except duckdb.IOException as error:
        raise _translated(error, sources.files) from None
    duck.lock(con)
    return con


def _with_all_columns(prepared: pa.Table) -> pa.Table:
    """Pairs with the columns of labels and the other way round, empty, so that one view serves both."""
    return pa.concat_tables(
        [prepared, *(schema.empty_table() for schema in PREPARED.values())], promote_options="default"
    )


def ask(con: duckdb.DuckDBPyConnection, query: str, files: Sequence[str] = ()) -> Result:
    """One SELECT, or an error that names what would have been right. `files`: those behind the views."""
    try:
        statements = con.extract_statements(query)
        # Not EXPLAIN: with ANALYZE it runs what it explains, which may be a COPY over a file of the cache.
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise UsageError(f"Found {kinds}; expected one SELECT over the views {', '.join(names())}.")
        return Result(con.execute(statements[0]), files)
    except (duckdb.Error, RuntimeError) as error:
        raise _translated(error, files) from None


def _translated(error: Exception, files: Sequence[str]) -> BaseException:
    """DuckDB's error as ours."""
    text = str(error).strip()
    if isinstance(error, duckdb.Error) and (gone := duck.missing(files)):
        return IntegrityError(
            f"{gone[0]} is gone: its shards were merged (prefcache gc), or it was removed, while the query was being answered. "
            "Ask again."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return ResourceError(
            f"The query needs more than {MEMORY_LIMIT} of memory. Ask for fewer rows or columns at once."
        )
    if isinstance(error, duckdb.Error):
        return UsageError(f"{text}\nViews: {', '.join(names())}.")
    return KeyboardInterrupt() if "interrupted" in text else error


def describe() -> Iterator[tuple[str, str, list[str]]]:
    """Name, help and columns of every view."""
    nothing = Sources(
        PREPARED["pairs"].empty_table(),
        [],
        pa.table({"folder": pa.array([], pa.string()), "reference": pa.array([], pa.string())}),
        [],
        RUNS.empty_table(),
    )
    con = connect(nothing)
    for name in names():
        columns = con.execute(f"select * from {name}").description or []
        yield name, _help(name), [column[0] for column in columns]


def names() -> list[str]:
    return [file.stem for file in _files()]


def _help(name: str) -> str:
    """The first comment of a view's file."""
    first = (Path(__file__).parent / f"{name}.sql").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("--").strip()


def _create_views(con: duckdb.DuckDBPyConnection) -> None:
    """A view may read another: one whose turn has not come waits for the next round."""
    waiting = {file.stem: file.read_text(encoding="utf-8") for file in _files()}
    while waiting:
        before = len(waiting)
        for name, select in list(waiting.items()):
            try:
                con.execute(f"create view {name} as {select}")
                del waiting[name]
            except duckdb.CatalogException:
                if before == len(waiting) and name == list(waiting)[-1]:
                    raise


def _files() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.sql"))
