"""Check a query before it runs: which views it reads, and that it reads nothing else.

The tree that DuckDB's own parser makes of it is searched. The lock of the database already keeps files and the network out of
reach; this check refuses what that lock allows: functions that take memory addresses, tables about the database itself, other
schemas.
"""

import difflib
import json
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

from prefcache.pipeline.errors import UsageError

# Table functions that only use their arguments. All others read files, the database's inner state, or memory at an address.
_TABLE_FUNCTIONS = {
    *("range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "histogram", "histogram_values"),
}
# Scalar functions that reveal the process or have side effects.
_REFUSED_FUNCTIONS = {
    *("getenv", "current_setting", "getvariable", "write_log", "sleep_ms"),
    *("setseed", "nextval", "currval", "setval"),
}


def parse_sql(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """Parse SQL into DuckDB's tree, or into an error in the same form."""
    tree: dict[str, Any] = json.loads(con.execute("select json_serialize_sql($1)", [sql]).fetchall()[0][0])
    return tree


class Statement:
    """One SELECT over these views; anything else raises UsageError."""

    def __init__(self, con: duckdb.DuckDBPyConnection, sql: str, views: Collection[str]) -> None:
        self.sql, self._known_views = sql, sorted(views)
        self._hint = f"Views: {', '.join(self._known_views)}."
        try:
            kinds = [statement.type.name for statement in con.extract_statements(sql)]
        except duckdb.Error as error:
            raise UsageError(f"{error}\n{self._hint}") from None
        # EXPLAIN is refused too: with ANALYZE it runs what it explains, which may be a COPY over a file of the cache.
        if kinds != ["SELECT"]:
            raise UsageError(f"Found {', '.join(kinds) or 'nothing'}; expected one SELECT. {self._hint}")
        try:
            self.tree = parse_sql(con, sql)
        except RecursionError:
            raise UsageError("The query is nested too deeply. Simplify it.") from None
        if self.tree["error"]:
            raise UsageError(f"{self.tree['error_message']}. {self._hint}")
        self.views = {view for node, ctes in _walk(self.tree) for view in self._find_views(node, ctes)}

    def _find_views(self, node: dict[str, Any], ctes: frozenset[str]) -> Iterator[str]:
        """Yield the view that a node of the tree names, if any, and refuse every other source of rows."""
        kind = node.get("type")
        if kind == "TABLE_FUNCTION":
            name = node["function"]["function_name"]
            if name.lower() not in _TABLE_FUNCTIONS:
                raise UsageError(f"{name}() is not available here. {self._hint}")
        elif node.get("class") == "FUNCTION":
            if node["function_name"].lower() in _REFUSED_FUNCTIONS:
                raise UsageError(f"{node['function_name']}() is not available here. {self._hint}")
        elif kind == "BASE_TABLE" or (kind == "SHOW_REF" and node["query"] is None):
            # The parser turns `show tables` into a table whose name includes the quotes.
            if node["table_name"] == '"tables"' and node.get("show_type") == "SHOW_SPECIAL":
                return
            name, path = node["table_name"].lower(), node["qualified_name"]["path"]
            if len(path) == 1 and name in ctes:
                return
            if name not in self._known_views or [part.lower() for part in path[:-1]] not in (
                [],
                ["main"],
                ["memory", "main"],
            ):
                near = difflib.get_close_matches(name, self._known_views, n=1)
                nearest = f"; the nearest is {near[0]}" if near else ""
                raise UsageError(f"There is no view {'.'.join(path)}{nearest}. {self._hint}")
            yield name


def _walk(tree: Any) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """Yield every node of a parsed statement with the names of the common table expressions in scope there.

    Out of their scope the same names are a view's, or the database's own. Nothing is assumed about the levels in between,
    which differ between versions of DuckDB.
    """
    waiting: list[tuple[Any, frozenset[str]]] = [(tree, frozenset())]
    while waiting:
        node, ctes = waiting.pop()
        if isinstance(node, dict):
            # An expression sees those defined before it.
            for entry in (node.get("cte_map") or {}).get("map", ()):
                waiting.append((entry["value"], ctes))
                ctes |= {entry["key"].lower()}
            yield node, ctes
            # The recursive half of a recursive expression also sees itself.
            own = {node["cte_name"].lower()} if node.get("type") == "RECURSIVE_CTE_NODE" else set()
            for key, part in node.items():
                if key != "cte_map":
                    waiting.append((part, ctes | own if key == "right" else ctes))
        elif isinstance(node, list):
            waiting += [(part, ctes) for part in node]
