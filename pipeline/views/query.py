"""Answer one SELECT over the views, with DuckDB's errors translated into ours."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.views.database import describe_columns, translate_error
from prefcache.pipeline.views.hints import explain_empty, suggest_column
from prefcache.pipeline.views.query_check import Statement
from prefcache.pipeline.views.view_files import VIEWS, Extension

_BATCH_ROWS = 1 << 16


class Result:
    """The answer to a query, streamed."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        statement: Statement,
        parameters: Mapping[str, Any] | None,
        files: Sequence[str],
    ) -> None:
        self._con, self._statement, self._parameters, self._files = con, statement, parameters, files
        self._cursor = con.execute(statement.sql, parameters)
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


def ask(
    con: duckdb.DuckDBPyConnection,
    query: str,
    files: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    extension: Extension | None = None,
) -> Result:
    """Run one SELECT, or raise an error that names what would have been right.

    `files` are those behind the views; the tables of an extension may be read as well.
    """
    names = [*VIEWS, *(extension.names if extension else ())]
    statement = Statement(con, query, names)
    try:
        return Result(con, statement, parameters, files)
    except (duckdb.Error, RuntimeError) as error:
        if isinstance(error, duckdb.BinderException):
            columns = {name: [column for column, _ in columns] for name, columns in describe_columns(con, names)}
            if hint := suggest_column(str(error), statement, columns):
                raise UsageError(hint) from None
        raise translate_error(error, files) from None
