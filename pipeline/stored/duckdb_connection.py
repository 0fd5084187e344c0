"""DuckDB as prefcache opens it: no progress bar, no spilling into the user's folder, Parquet read as it was written."""

import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa


def connect() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    # In a notebook without ipywidgets there is none, and switching it off would be an error.
    if con.execute("select current_setting('enable_progress_bar')").fetchall() == [(True,)]:
        con.execute("set enable_progress_bar = false")
    # By default, what does not fit into memory spills into the working folder.
    folder = str(Path(tempfile.gettempdir()) / f"prefcache-{uuid.uuid4().hex}")
    con.execute("set temp_directory = $folder", {"folder": folder})
    return con


def lock(con: duckdb.DuckDBPyConnection) -> None:
    """From here on, allow no other file, no network, no extension and no change of settings."""
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def register(con: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    """Make a table in memory, or mapped into it, the view `name` in the current schema, without copying it.

    DuckDB's own `register` would put it next to the views, where `show tables` lists it.
    """
    con.from_arrow(table).create_view(name)


def define(con: duckdb.DuckDBPyConnection, name: str, files: Sequence[str], schema: pa.Schema) -> None:
    """Make Parquet files of this schema, perhaps none, the view `name`, with an additional column filename."""
    if not files:
        register(con, name, schema.empty_table().append_column("filename", pa.array([], pa.string())))
        return
    names = ", ".join(literal(file) for file in files)
    register(con, f"{name}_columns", schema.empty_table())
    # Without hive_partitioning = false DuckDB takes a folder called beta=0.7 for a column. Files of an earlier version may
    # lack columns, which are then empty.
    con.execute(
        f"create view {name} as select * from {name}_columns union all by name select * from "
        f"read_parquet([{names}], filename = true, hive_partitioning = false, union_by_name = true)"
    )


def find_missing(files: Sequence[str]) -> list[str]:
    """The files that no longer exist: what DuckDB says about them depends on its settings."""
    return [file for file in files if not Path(file).exists()]
