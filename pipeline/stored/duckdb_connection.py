"""DuckDB, as it is opened here: no progress bar, no spilling into the user's folder, Parquet read as it was written."""

import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa


def connect() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute("set enable_progress_bar = false")
    # Else what is too large for memory would spill into the user's working folder.
    con.execute(
        "set temp_directory = $folder", {"folder": str(Path(tempfile.gettempdir()) / f"prefcache-{uuid.uuid4().hex}")}
    )
    return con


def lock(con: duckdb.DuckDBPyConnection) -> None:
    """From here on, nothing is read but what it was given: no other file, no network, no extension, no other setting."""
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        con.execute(f"set {setting}")


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def register(con: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    """The view `name` over a table in memory, or mapped into it, in the schema that is set; nothing is copied.

    DuckDB's own `register` would put it beside the views, where `show tables` lists it.
    """
    con.from_arrow(table).create_view(name)


def define(con: duckdb.DuckDBPyConnection, name: str, files: Sequence[str], schema: pa.Schema) -> None:
    """The view `name` over Parquet files of this schema, perhaps none, with the column filename beside the stored ones."""
    if not files:
        register(con, name, schema.empty_table().append_column("filename", pa.array([], pa.string())))
        return
    listed = ", ".join(literal(file) for file in files)
    register(con, f"{name}_columns", schema.empty_table())
    # Without hive_partitioning = false DuckDB takes a folder called beta=0.7 for a column. Files of an earlier version may lack
    # columns, which are then empty.
    con.execute(
        f"create view {name} as select * from {name}_columns union all by name select * from "
        f"read_parquet([{listed}], filename = true, hive_partitioning = false, union_by_name = true)"
    )


def missing(files: Sequence[str]) -> list[str]:
    """Those that are there no more: what DuckDB says of them depends on its settings."""
    return [file for file in files if not Path(file).exists()]
