"""What would have been right: the nearest column to one that is not there, and which condition left no row."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import duckdb

from pipeline.views.statement import Statement

_NO_COLUMN = re.compile(
    r'[Cc]olumn "([^"]+)" (?:in EXCLUDE list )?(?:not found|does not exist)|does not have a column named "([^"]+)"'
)


def missing_column(text: str, statement: Statement, columns: Mapping[str, list[str]]) -> str | None:
    """Of DuckDB's error, where it is about a column: what there is instead. `columns` of every view."""
    if (found := _NO_COLUMN.search(text)) is None:
        return None
    name = found[1] or found[2]
    here = [column for view in sorted(statement.views) for column in columns[view]]
    where = f" in {', '.join(sorted(statement.views))}" if statement.views else ""
    if near := difflib.get_close_matches(name.lower(), here, n=1):
        hint = f"the nearest is {near[0]}"
    elif elsewhere := [view for view, names in columns.items() if name.lower() in names]:
        hint = f"{', '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} one"
    else:
        hint = f"there are {', '.join(dict.fromkeys(here))}"
    return f"There is no column {name}{where}; {hint}. Text stands in single quotes."


def why_empty(con: duckdb.DuckDBPyConnection, statement: Statement, parameters: Mapping[str, Any] | None) -> list[str]:
    """Of a query that gave no row, how many its conditions left, one after another. Nothing where it has none, or is no plain SELECT."""
    node = statement.tree["statements"][0]["node"]
    if node["type"] != "SELECT_NODE" or not node["where_clause"]:
        return []
    where = node["where_clause"]
    parts = where["children"] if where["type"] == "CONJUNCTION_AND" else [where]
    try:
        conditions = [_text(con, {"select_list": [part]}).removeprefix("SELECT ") for part in parts]
        before, *counts = _counts(con, node, conditions, parameters or {})
    except duckdb.Error:
        # A condition may only be one after the others, such as a cast of what they let through.
        return []
    if not before:
        return ["no rows: there were none before `where`"]
    lines = [f"no rows. Of {before:,} before `where`:"]
    for i, condition in enumerate(conditions):
        left, alone = counts[2 * i : 2 * i + 2]
        by_itself = f", which {alone:,} satisfy by themselves" if i and not left else ""
        lines.append(f"  {left:,} are left after {condition}{by_itself}")
        if not left:
            return lines
    return [*lines, "  none is left by what comes after `where`"]


def _counts(
    con: duckdb.DuckDBPyConnection, node: dict[str, Any], conditions: list[str], parameters: Mapping[str, Any]
) -> tuple[int, ...]:
    """Rows in all; then, for each condition, those that it and the ones before it let through, and those that it does alone."""
    counts = ["count(*)"]
    for i, condition in enumerate(conditions):
        for those in (" and ".join(conditions[: i + 1]), condition):
            counts.append(f"count(*) filter (where {those})")
    asked = _tree(con, f"select {', '.join(counts)}")["statements"][0]["node"]["select_list"]
    query = _text(con, {"select_list": asked, "from_table": node["from_table"], "cte_map": node["cte_map"]})
    used = {name: value for name, value in parameters.items() if re.search(rf"\${name}\b", query)}
    found: tuple[int, ...] = con.execute(query, used or None).fetchall()[0]
    return found


def _tree(con: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(con.execute("select json_serialize_sql($1)", [query]).fetchall()[0][0])
    return tree


def _text(con: duckdb.DuckDBPyConnection, parts: dict[str, Any]) -> str:
    """The SQL of a SELECT that has these parts."""
    tree = _tree(con, "select 1")
    tree["statements"][0]["node"] |= parts
    return str(con.execute("select json_deserialize_sql($1)", [json.dumps(tree)]).fetchall()[0][0])
