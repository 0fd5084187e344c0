"""Answer one SELECT over the views, with DuckDB's errors translated into ours."""

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.views.database import describe_columns, translate_error
from prefcache.pipeline.views.hints import explain_empty, suggest_column
from prefcache.pipeline.views.query_check import Statement
from prefcache.pipeline.views.view_files import ANSWER, VIEWS, Extension, find_stored_tables

_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Query:
    """One SELECT, or several that are answered together: the rows, and numbers about all the data."""

    rows: str
    numbers: str | None = None  # a SELECT of one row
    answer: str | None = None  # a SELECT that is computed once, for both to read as the table `answer`

    def find_stored_tables(self, extension: Extension | None = None) -> set[str]:
        """Find the tables of the schema `stored` that its SELECTs read."""
        selects = filter(None, (self.rows, self.numbers, self.answer))
        return {table for select in selects for table in find_stored_tables(select, extension, self.kept_tables)}

    @property
    def kept_tables(self) -> tuple[str, ...]:
        """What its SELECTs may read next to the views."""
        return () if self.answer is None else (ANSWER,)


class Result:
    """The answer to a query, streamed."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        query: Query,
        tables: Collection[str],
        parameters: Mapping[str, Any] | None,
        files: Sequence[str],
    ) -> None:
        self._con, self._query, self._tables, self._parameters, self._files = con, query, tables, parameters, files
        if query.answer is not None:
            answer = Statement(con, query.answer, tables).sql
            self._execute(f"create or replace temp table {ANSWER} as (\n{answer}\n)")
        self._statement = Statement(con, query.rows, tables)
        self._cursor = self._execute(self._statement.sql)
        self.columns = [column[0] for column in self._cursor.description or []]
        self.n_rows = 0  # read so far

    def rows(self) -> Iterator[tuple[Any, ...]]:
        for block in self.blocks(1024):
            yield from block

    def blocks(self, n: int) -> Iterator[list[tuple[Any, ...]]]:
        # Answers stream, so an error may come with the last block.
        try:
            while block := self._cursor.fetchmany(n):
                self.n_rows += len(block)
                yield block
        except (duckdb.Error, RuntimeError) as error:
            raise translate_error(error, self._files) from None

    def arrow(self) -> pa.RecordBatchReader:
        """Return the answer by columns, instead of rows()."""
        with warnings.catch_warnings():
            # DuckDB warns that it copies each batch, which costs little compared with writing it.
            warnings.simplefilter("ignore", UserWarning)
            return self._cursor.to_arrow_reader(_BATCH_ROWS)

    def batches(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            for batch in reader:
                self.n_rows += len(batch)
                yield batch
        except (duckdb.Error, pa.ArrowException, RuntimeError, OSError) as error:
            raise translate_error(error, self._files) from None

    def explain_empty(self) -> list[str]:
        """Say which condition left no row, once the whole answer has been read and was empty."""
        return [] if self.n_rows else explain_empty(self._con, self._statement, self._parameters)

    def numbers(self) -> dict[str, Any]:
        """Return the numbers about all the data, once the rows have been read; {} if the query asks for none."""
        if self._query.numbers is None:
            return {}
        statement = Statement(self._con, self._query.numbers, self._tables)
        try:
            cursor = self._execute(statement.sql)
            names = [column[0] for column in cursor.description or []]
            (row,) = cursor.fetchall()
        except (duckdb.Error, RuntimeError) as error:
            raise translate_error(error, self._files) from None
        finally:
            if self._query.answer is not None:
                self._con.execute(f"drop table if exists {ANSWER}")
        # A correlation of equal values is not a number.
        is_nan = [isinstance(value, float) and math.isnan(value) for value in row]
        return {name: None if nan else value for name, value, nan in zip(names, row, is_nan, strict=True)}

    def _execute(self, sql: str) -> duckdb.DuckDBPyConnection:
        """Run one of the query's SELECTs with those parameters that it reads: DuckDB refuses others."""
        named = {name: value for name, value in (self._parameters or {}).items() if re.search(rf"\${name}\b", sql)}
        return self._con.execute(sql, named if self._query.numbers else self._parameters)


def ask(
    con: duckdb.DuckDBPyConnection,
    query: str | Query,
    files: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    extension: Extension | None = None,
) -> Result:
    """Run one SELECT, or raise an error that names what would have been right.

    `files` are those behind the views; the tables of an extension may be read as well.
    """
    query = Query(query) if isinstance(query, str) else query
    tables = [*VIEWS, *(extension.names if extension else ()), *query.kept_tables]
    try:
        return Result(con, query, tables, parameters, files)
    except (duckdb.Error, RuntimeError) as error:
        if isinstance(error, duckdb.BinderException):
            columns = {name: [column for column, _ in columns] for name, columns in describe_columns(con, tables)}
            if hint := suggest_column(str(error), Statement(con, query.rows, tables), columns):
                raise UsageError(hint) from None
        raise translate_error(error, files) from None
