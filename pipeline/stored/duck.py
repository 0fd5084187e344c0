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


def define(con: duckdb.DuckDBPyConnection, name: str, files: Sequence[str], schema: pa.Schema) -> None:
    """The view `name` over Parquet files of this schema, perhaps none, with the column filename beside the stored ones."""
    if not files:
        con.register(name, schema.empty_table().append_column("filename", pa.array([], pa.string())))
        return
    listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    con.register(f"{name}_columns", schema.empty_table())
    # Without hive_partitioning = false DuckDB takes a folder called beta=0.7 for a column. Files of an earlier version may lack
    # columns, which are then empty.
    con.execute(
        f"create view {name} as select * from read_parquet([{listed}], filename = true, hive_partitioning = false, "
        f"union_by_name = true) union all by name select * from {name}_columns"
    )


def missing(files: Sequence[str]) -> list[str]:
    """Those that are there no more: what DuckDB says of them depends on its settings."""
    return [file for file in files if not Path(file).exists()]
