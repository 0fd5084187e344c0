"""A query before it is run: what it reads, and that it reads nothing but views.

DuckDB's own parser says it, as a tree. The lock of the database keeps files and the network out of reach; this keeps out what
that lock does not know of: functions that take addresses of memory, tables about the database itself, other schemas.
"""

import difflib
import json
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

from pipeline.errors import UsageError

# Functions that make rows of their arguments. All others read files, the database's inner state, or memory at an address.
_TABLE_FUNCTIONS = {
    *("range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "histogram", "histogram_values"),
}
# Scalar functions that tell of the process, or that act.
_REFUSED = {
    *("getenv", "current_setting", "getvariable", "write_log", "sleep_ms"),
    *("setseed", "nextval", "currval", "setval"),
}


class Statement:
    """One SELECT over these views, or UsageError."""

    def __init__(self, con: duckdb.DuckDBPyConnection, sql: str, views: Collection[str]) -> None:
        self.sql, self._views = sql, sorted(views)
        try:
            kinds = [statement.type.name for statement in con.extract_statements(sql)]
        except duckdb.Error as error:
            raise UsageError(f"{error}\n{self._known}") from None
        # Not EXPLAIN: with ANALYZE it runs what it explains, which may be a COPY over a file of the cache.
        if kinds != ["SELECT"]:
            raise UsageError(f"Found {', '.join(kinds) or 'nothing'}; expected one SELECT. {self._known}")
        try:
            tree = json.loads(con.execute("select json_serialize_sql($1)", [sql]).fetchall()[0][0])
        except RecursionError:
            raise UsageError("The query is nested too deeply. Say it in a simpler way.") from None
        if tree["error"]:
            raise UsageError(f"{tree['error_message']}. {self._known}")
        self.tree: dict[str, Any] = tree
        self.views = {view for node, own in _nodes(tree) for view in self._read_by(node, own)}

    @property
    def _known(self) -> str:
        return f"Views: {', '.join(self._views)}."

    def _read_by(self, node: dict[str, Any], own: frozenset[str]) -> Iterator[str]:
        """The view that a node of the tree names, where it is none of the query's `own`. Whatever else gives rows is refused."""
        kind = node.get("type")
        if kind == "TABLE_FUNCTION":
            self._refuse_unless(node["function"]["function_name"], _TABLE_FUNCTIONS.__contains__)
        elif node.get("class") == "FUNCTION":
            self._refuse_unless(node["function_name"], lambda name: name not in _REFUSED)
        elif (kind == "BASE_TABLE" or (kind == "SHOW_REF" and node["query"] is None)) and not _is_listing(node):
            yield from self._view(node, own)

    def _refuse_unless(self, function: str, allowed: Any) -> None:
        if not allowed(function.lower()):
            raise UsageError(f"{function}() is not available here. {self._known}")

    def _view(self, node: dict[str, Any], own: frozenset[str]) -> Iterator[str]:
        name, path = node["table_name"], node["qualified_name"]["path"]
        if len(path) == 1 and name.lower() in own:
            return
        if name.lower() in self._views and [part.lower() for part in path[:-1]] in ([], ["main"], ["memory", "main"]):
            yield name.lower()
            return
        near = difflib.get_close_matches(name.lower(), self._views, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"There is no view {'.'.join(path)}{hint}. {self._known}")


def _is_listing(node: dict[str, Any]) -> bool:
    """`show tables`, to the parser a table of that name with the quotes."""
    return bool(node["table_name"] == '"tables"' and node.get("show_type") == "SHOW_SPECIAL")


def _nodes(tree: Any) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """Every node of a parsed statement, whatever the version of DuckDB calls what lies between, and the names that a `with`
    has given there: elsewhere the same name is a view's, or the database's own."""
    waiting: list[tuple[Any, frozenset[str]]] = [(tree, frozenset())]
    while waiting:
        node, own = waiting.pop()
        if isinstance(node, dict):
            # A query that is given a name knows those before it, and its own where it goes round (`recursive`).
            for entry in (node.get("cte_map") or {}).get("map", ()):
                waiting.append((entry["value"], own))
                own |= {entry["key"].lower()}
            yield node, own
            waiting += [(part, own | _round(node, name)) for name, part in node.items() if name != "cte_map"]
        elif isinstance(node, list):
            waiting += [(part, own) for part in node]


def _round(node: dict[str, Any], part: str) -> frozenset[str]:
    """The name of a query that goes round, in the part that does."""
    return frozenset({node["cte_name"].lower()} if node.get("type") == "RECURSIVE_CTE_NODE" and part == "right" else ())
