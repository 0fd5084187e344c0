"""Hints for a query that went wrong: the nearest column to one that does not exist, and which condition left no row."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import duckdb

from prefcache.pipeline.views.query_check import Statement, parse_sql

_NO_COLUMN = re.compile(
    r'[Cc]olumn "([^"]+)" (?:in EXCLUDE list )?(?:not found|does not exist)|does not have a column named "([^"]+)"'
)


def suggest_column(error: str, statement: Statement, columns: Mapping[str, list[str]]) -> str | None:
    """Turn DuckDB's error about a missing column into a suggestion; None for another error. `columns` are those of every view."""
    if (match := _NO_COLUMN.search(error)) is None:
        return None
    name = match[1] or match[2]
    available = [column for view in sorted(statement.views) for column in columns[view]]
    where = f" in {', '.join(sorted(statement.views))}" if statement.views else ""
    if near := difflib.get_close_matches(name.lower(), available, n=1):
        hint = f"the nearest is {near[0]}"
    elif elsewhere := [view for view, names in columns.items() if name.lower() in names]:
        hint = f"{', '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} one"
    else:
        hint = f"there are {', '.join(dict.fromkeys(available))}"
    return f"There is no column {name}{where}; {hint}. Text goes in single quotes."


def explain_empty(
    con: duckdb.DuckDBPyConnection, statement: Statement, parameters: Mapping[str, Any] | None
) -> list[str]:
    """Count the rows left after each condition of an empty answer's `where`; [] if it has none or is not a plain SELECT."""
    node = statement.tree["statements"][0]["node"]
    if node["type"] != "SELECT_NODE" or not node["where_clause"]:
        return []
    where = node["where_clause"]
    parts = where["children"] if where["type"] == "CONJUNCTION_AND" else [where]
    try:
        conditions = [_write_sql(con, {"select_list": [part]}).removeprefix("SELECT ") for part in parts]
        n_before, *counts = _count_rows(con, node, conditions, parameters or {})
    except duckdb.Error:
        # A condition may only be valid after the others, such as a cast of what they let through.
        return []
    if not n_before:
        return ["no rows, even without `where`"]
    lines = [f"no rows. Of {n_before:,} before `where`:"]
    for i, condition in enumerate(conditions):
        n_left, n_alone = counts[2 * i : 2 * i + 2]
        lines.append(
            f"  {n_left:,} left after {condition}" + (f"; alone it matches {n_alone:,}" if i and not n_left else "")
        )
        if not n_left:
            return lines
    return [*lines, "  0 left after the clauses that follow `where`"]


def _count_rows(
    con: duckdb.DuckDBPyConnection, node: dict[str, Any], conditions: list[str], parameters: Mapping[str, Any]
) -> tuple[int, ...]:
    """Count all rows; then, per condition, those that pass it and all before it, and those that pass it alone."""
    counts = ["count(*)"]
    for i, condition in enumerate(conditions):
        for combined in (" and ".join(conditions[: i + 1]), condition):
            counts.append(f"count(*) filter (where {combined})")
    select_list = parse_sql(con, f"select {', '.join(counts)}")["statements"][0]["node"]["select_list"]
    query = _write_sql(con, {"select_list": select_list, "from_table": node["from_table"], "cte_map": node["cte_map"]})
    used = {name: value for name, value in parameters.items() if re.search(rf"\${name}\b", query)}
    row: tuple[int, ...] = con.execute(query, used or None).fetchall()[0]
    return row


def _write_sql(con: duckdb.DuckDBPyConnection, parts: dict[str, Any]) -> str:
    """Write the SQL of a SELECT with these parts of a parsed one."""
    tree = parse_sql(con, "select 1")
    tree["statements"][0]["node"] |= parts
    return str(con.execute("select json_deserialize_sql($1)", [json.dumps(tree)]).fetchall()[0][0])
