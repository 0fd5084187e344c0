"""The answer to a query in Python: an Arrow table, and what other libraries make of it."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefcache.pipeline.views.query_worker import Answer


@dataclass(frozen=True)
class SqlResult:
    """All rows of an answer. Methods are named as DuckDB's."""

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
        import polars

        return polars.from_arrow(self.table)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(zip(*(column.to_pylist() for column in self.table.columns), strict=True))

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)
