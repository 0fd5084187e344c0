"""SQL over prepared data, reference scores and runs, in a DuckDB that can read nothing else.

In: verified files and tables (`Sources`). Out: an experiment's views, the answers to SELECTs over them, and hints for queries
that fail or find nothing. One view per .sql file here; its first comment is its help. To add a view, add a file.

Start with database.py, which opens the views; query.py answers a query, and query_worker.py does so in a process that can be
ended.
"""

from prefcache.pipeline.views.database import (
    CHECKPOINTS,
    MEMORY_LIMIT,
    RUNS,
    Reference,
    Sources,
    connect,
    describe,
    short_id,
)
from prefcache.pipeline.views.query import Query, Result, ask
from prefcache.pipeline.views.view_files import VIEWS, Extension, find_stored_tables

__all__ = [
    "CHECKPOINTS",
    "MEMORY_LIMIT",
    "RUNS",
    "VIEWS",
    "Extension",
    "Query",
    "Reference",
    "Result",
    "Sources",
    "ask",
    "connect",
    "describe",
    "find_stored_tables",
    "short_id",
]
