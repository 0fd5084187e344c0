"""A SQL expression over the columns of examples, as train.where, weight and order_by take it.

It is evaluated over one table, `examples`: a row per example of the training split, with the reference's log-probs next to the
data's own columns. A config may come from anywhere, so an expression is as safe as `prefcache sql` and narrower: it reads columns,
through deterministic functions and windows, and nothing else. They must be deterministic because every process of a run, and every
resumption, has to choose the same examples in the same order.
"""

import difflib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.schema import IMAGE_IDS, KEY, PREPARED
from prefcache.pipeline.stored import duckdb_connection
from prefcache.pipeline.stored.prepared import drop_ids
from prefcache.pipeline.views import MEMORY_LIMIT, query_worker

T = TypeVar("T")
_SECONDS = 600.0  # the time limit of an evaluation

# Columns besides the data's own: the reference's log-probs, of the tokens that count and of whole answers, and what is computed.
_ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion",)}
_REFERENCE = {
    kind: tuple(f"ref_{answer}_logp{which}" for which in ("", "_all") for answer in answers)
    for kind, answers in _ANSWERS.items()
}
_IMAGES = {"n_images": "coalesce(len(images), 0)"}
_COMPUTED = {
    "pairs": {
        "margin": "ref_chosen_logp - ref_rejected_logp",
        "margin_per_token": "ref_chosen_logp / n_chosen_counted - ref_rejected_logp / n_rejected_counted",
        "length_difference": "n_chosen_counted - n_rejected_counted",
        "score_gap": "chosen_score - rejected_score",
        **_IMAGES,
    },
    "labels": _IMAGES,
}
# How ids are written, by the type of their column.
_IN_HEX = {
    str(KEY): "lower(hex({0}))",
    str(IMAGE_IDS): "coalesce(list_transform({0}, lambda id: lower(hex(id))), [])",
}
_REFERENCE_PREFIXES = ("ref_", "margin")  # of columns that need the reference
EPOCH = "epoch"  # counts from 1; only train.order_by has it

# The parts of an expression; not subqueries, stars, parameters, or what a later DuckDB adds.
_NODES = {
    *("CONSTANT", "COLUMN_REF", "FUNCTION", "OPERATOR", "COMPARISON", "CONJUNCTION", "BETWEEN", "CASE", "CAST"),
    *("COLLATE", "LAMBDA", "LAMBDA_REF", "TYPE", "WINDOW"),
}
_MACROS = {"if", "nullif", "split_part", "fdiv", "fmod", "geomean", "weighted_avg"}
# Not listed by earlier versions of DuckDB.
_WINDOWS = {
    *("row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile", "lag", "lead"),
    *("first_value", "last_value", "nth_value"),
}
_RANDOM = {"reservoir_quantile"}  # DuckDB calls it deterministic


class Expression:
    """One SQL expression over the examples' columns, evaluated in a DuckDB that can read nothing else."""

    def __init__(self, key: str, sql: str, kind: str) -> None:
        self.key, self._sql, self._kind = key, sql, kind
        self._is_order = key.endswith("order_by")
        value = f"dense_rank() over (order by\n{sql}\n)" if self._is_order else f"(\n{sql}\n)"
        self._query = f"select row_, {value} as value from examples"
        self.names, self.type = self._run_bounded(self._describe)

    def __str__(self) -> str:
        return f"{self.key} ({self._sql.strip()})"

    def evaluate(self, columns: pa.Table, rows: np.ndarray, epoch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the values on these rows, in their order, and which of them are null."""
        value_type = "integer" if self._is_order else "boolean" if self.type == "BOOLEAN" else "double"
        query = f"select row_, cast(value as {value_type}) as value from ({self._query})"

        def compute() -> tuple[np.ndarray, np.ndarray]:
            con = self._open(columns, rows, epoch)
            try:
                result = self._execute(con, query).fetchnumpy()
            except (duckdb.Error, RuntimeError) as error:
                raise self._translate(error) from None
            finally:
                con.close()
            assert len(result["row_"]) == len(rows)
            value = np.ma.asarray(result["value"])[np.argsort(np.asarray(result["row_"]))]
            return value.filled(0), np.ma.getmaskarray(value)

        return self._run_bounded(compute)

    def ranges(self, columns: pa.Table, rows: np.ndarray) -> list[str]:
        """Describe the smallest and largest value of each column that the expression reads."""

        def describe() -> list[str]:
            con, lines = self._open(columns, rows), []
            for name in self.names:
                ends = con.execute(
                    f"select left(min({name})::varchar, 40), left(max({name})::varchar, 40) from examples"
                )
                low, high = ends.fetchall()[0]
                lines.append(f"{name} is null for all" if low is None else f"{name} goes from {low} to {high}")
            return lines

        return self._run_bounded(describe)

    def _run_bounded(self, work: Callable[[], T]) -> T:
        """Run in a process with limits on time and on memory that DuckDB does not count, as `prefcache sql` does."""
        simpler = "Simplify it."
        return query_worker.call(work, query_worker.Bounds(str(self), _SECONDS, simpler, simpler))

    def _describe(self) -> tuple[list[str], str]:
        empty = input_table(self._kind, PREPARED[self._kind].empty_table(), {})
        con = self._open(empty, np.empty(0, np.int64))
        # The whole query is checked, not the expression, which might close a bracket that is not its own.
        names = self._checked_names(con)
        # DuckDB computes an expression of constants to describe it.
        return names, str(self._execute(con, f"describe {self._query}").fetchall()[1][1]).strip('"')

    def _open(self, columns: pa.Table, rows: np.ndarray, epoch: int = 1) -> duckdb.DuckDBPyConnection:
        con = duckdb_connection.connect()
        con.execute("set python_enable_replacements = false")
        con.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
        # With several threads, the last bit of a sum and the order of equal rows would depend on timing.
        con.execute("set threads = 1")
        is_given = np.zeros(len(columns), bool)
        is_given[rows] = True
        con.register("given", columns.append_column("is_given", pa.array(is_given)))
        # As the view `examples` of `prefcache sql` has them.
        fields = drop_ids(PREPARED[self._kind].empty_table()).schema
        selected = [f"{_IN_HEX.get(str(f.type), '{0}').format(f.name)} as {f.name}" for f in fields]
        selected += [*_REFERENCE[self._kind], *(f"{sql} as {name}" for name, sql in _COMPUTED[self._kind].items())]
        selected += [f"{epoch}::bigint as {EPOCH}"] if self._is_order else []
        con.execute(f"create view examples as select {', '.join([*selected, 'row_'])} from given where is_given")
        duckdb_connection.lock(con)
        return con

    def _execute(self, con: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyConnection:
        try:
            return con.execute(query)
        except (duckdb.Error, RuntimeError) as error:
            raise self._translate(error) from None

    def _translate(self, error: Exception) -> BaseException:
        if isinstance(error, duckdb.OutOfMemoryException):
            return ResourceError(f"{self} needs more than {MEMORY_LIMIT} of memory. Simplify it.")
        if isinstance(error, duckdb.BinderException) and "GROUP BY" in str(error):
            return UsageError(
                f"{self} has an aggregate; say over which examples: avg(margin) over (), for all of them."
            )
        if isinstance(error, duckdb.Error):
            return UsageError(f"{self}: {' '.join(str(error).partition('LINE ')[0].split())}")
        return KeyboardInterrupt() if "interrupted" in str(error) else error

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """The answers whose reference log-probs the expression needs."""
        names = {name.removesuffix("_all") for name in self.names}
        reads_both = any(name.startswith("margin") for name in names)
        return tuple(answer for answer in _ANSWERS[self._kind] if reads_both or f"ref_{answer}_logp" in names)

    @property
    def reference_column(self) -> str | None:
        """The first column that the expression reads and that needs the reference."""
        return next((name for name in self.names if name.startswith(_REFERENCE_PREFIXES)), None)

    # -- what it may contain -----------------------------------------------------------------------------------------

    def _checked_names(self, con: duckdb.DuckDBPyConnection) -> list[str]:
        """Return the columns that the expression reads; refuse anything that is not an expression over columns."""
        tree = json.loads(con.execute("select json_serialize_sql($1)", [self._query]).fetchall()[0][0])
        if tree["error"]:
            raise UsageError(f"{self} is not a SQL expression: {tree['error_message']}.")
        value = self._expression_node(tree["statements"])
        functions = _deterministic_functions()
        lambdas = [node["lhs"] for node in _nodes(value) if node.get("class") == "LAMBDA"]
        parameters = {
            name.lower() for side in lambdas for node in _nodes(side) for name in node.get("column_names", ())
        }
        known = [*column_names(self._kind), *([EPOCH] if self._is_order else [])]
        names = []
        for node in _nodes(value):
            if node.get("class", "CONSTANT") not in _NODES:
                what = "a query of its own" if node["class"] == "SUBQUERY" else node["class"].replace("_", " ").lower()
                raise UsageError(
                    f"{self} has {what}; expected an expression over an example's columns. To compare an example with the "
                    "others, use a window: avg(margin) over ()."
                )
            if (function := node.get("function_name", "").lower()) and function not in functions:
                raise UsageError(
                    f"{self}: {function} is not a function that expressions may call; expected deterministic functions of values, "
                    "because every process and every resumed run must compute the same."
                )
            if "column_names" in node and node["column_names"][0].lower() not in parameters:
                names.append(self._column(node["column_names"], known))
        return list(dict.fromkeys(names))

    def _expression_node(self, statements: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the expression's node, once the query around it is known to be intact."""
        node = statements[0]["node"] if len(statements) == 1 else {}
        items, table = node.get("select_list", []), node.get("from_table", {})
        is_intact = node.get("type") == "SELECT_NODE" and len(items) == 2 and table.get("table_name") == "examples"
        clauses = ("where_clause", "group_expressions", "having", "sample", "qualify", "modifiers")
        is_order = self._is_order and items[1:] and items[1].get("type") == "WINDOW_RANK_DENSE"
        if not is_intact or any(node.get(clause) for clause in clauses) or (self._is_order and not is_order):
            what = "an order, such as margin desc, n_prompt" if self._is_order else "one SQL expression"
            raise UsageError(f"{self}: expected {what} and nothing else.")
        value: dict[str, Any] = items[1]
        return value

    def _column(self, path: list[str], known: list[str]) -> str:
        name = path[-1].lower() if len(path) == 1 or path[0].lower() == "examples" else ".".join(path)
        if name in known:
            return name
        for kind in PREPARED:
            if kind != self._kind and name in column_names(kind):
                raise UsageError(f"{self}: {name} is a column of {kind}, and this data holds {self._kind}.")
        if name == EPOCH:
            raise UsageError(f"{self}: only train.order_by has the column {EPOCH}.")
        near = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"the nearest: {', '.join(near)}."
            if near
            else f"the columns: {', '.join(known)}. Put text in single quotes."
        )
        raise UsageError(f"{self}: there is no column {name!r}; {hint}")


def column_names(kind: str) -> list[str]:
    """The columns that an expression may read, for data of this kind."""
    data = drop_ids(PREPARED[kind].empty_table()).column_names
    return [*data, *_REFERENCE[kind], *_COMPUTED[kind]]


def input_table(kind: str, table: pa.Table, reference: Mapping[str, np.ndarray]) -> pa.Table:
    """The table without its token ids, with the reference's log-probs (null where missing) and row numbers."""
    columns = drop_ids(table)
    nothing = np.full(len(table), np.nan)
    for name in _REFERENCE[kind]:
        columns = columns.append_column(name, pa.array(reference.get(name, nothing), pa.float64(), from_pandas=True))
    return columns.append_column("row_", pa.array(np.arange(len(table))))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a parsed expression, whatever this version of DuckDB calls the levels between."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


@functools.cache
def _deterministic_functions() -> frozenset[str]:
    """Functions of their arguments alone; few macros, since some of DuckDB's read the database or the clock."""
    listed = duckdb.connect().execute(
        "select lower(function_name) as name, bool_or(function_type = 'macro') from duckdb_functions() "
        "where function_type in ('scalar', 'aggregate', 'window', 'macro') "
        "group by name having bool_and(stability is not distinct from 'CONSISTENT' or function_type = 'macro')"
    )
    allowed = {
        name
        for name, is_macro in listed.fetchall()
        if not is_macro or name in _MACROS or name.startswith(("list_", "array_"))
    }
    return frozenset((allowed | _WINDOWS) - _RANDOM)
