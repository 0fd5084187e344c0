"""Which examples are trained on, how much each counts and in what order: train.only, where, weight and order_by.

train.only names a file (example_filter.py). The others are SQL expressions over one table, `examples`: a row per example of the
training split, with the reference's log-probs next to the data's own columns. A config may come from anywhere, so an expression is
as safe as `prefcache sql` and narrower: it reads columns, through deterministic functions and windows, and nothing else. They must
be deterministic because every process of a run, and every resumption, has to choose the same examples in the same order. The
held-out split is never filtered, so runs with different selections stay comparable.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import DataError, ResourceError, UsageError
from prefcache.pipeline.schema import IMAGE_IDS, KEY, PREPARED
from prefcache.pipeline.stored import duckdb_connection
from prefcache.pipeline.stored.prepared import drop_ids
from prefcache.pipeline.training.example_filter import ExampleFilter
from prefcache.pipeline.views import MEMORY_LIMIT, query_worker

T = TypeVar("T")
_SECONDS = 600.0  # an expression's time limit

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
_NUMBER = r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|BOOLEAN|DECIMAL\(.*\)"


@dataclass(frozen=True)
class Choice:
    """The chosen rows of the training split, ascending. `weight` and each entry of `ranks` have one value per row."""

    rows: np.ndarray
    weight: np.ndarray | None = None  # 1 on average
    ranks: tuple[np.ndarray, ...] = ()  # by train.order_by, with ties; one entry per epoch, or one for all
    said: tuple[str, ...] = ()


class Selection:
    """A run's file and expressions, checked before anything is loaded."""

    def __init__(self, train: Train, kind: str) -> None:
        self._kind = kind
        given = {"where": train.where, "weight": train.weight, "order_by": train.order_by}
        self._expressions = {
            name: _Expression(f"train.{name}", sql, kind) for name, sql in given.items() if sql is not None
        }
        self._filter = ExampleFilter(train.only) if train.only is not None else None
        self._train = train
        if (where := self._expressions.get("where")) and where.type != "BOOLEAN":
            raise UsageError(f"{where} is of type {where.type}; expected a condition, such as margin > 0.")
        if (weight := self._expressions.get("weight")) and not re.fullmatch(_NUMBER, weight.type):
            raise UsageError(f"{weight} is of type {weight.type}; expected a number for each example.")

    def __bool__(self) -> bool:
        return bool(self._expressions) or self._filter is not None

    @property
    def identity(self) -> dict[str, str]:
        """What identifies a run in place of a config key: the content of train.only's file, not its path."""
        return {} if self._filter is None else {"only": self._filter.id}

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """The answers whose reference log-probs the expressions need, whatever the loss reads."""
        names = {name.removesuffix("_all") for expression in self._expressions.values() for name in expression.names}
        both = any(name.startswith("margin") for name in names)
        return tuple(answer for answer in _ANSWERS[self._kind] if both or f"ref_{answer}_logp" in names)

    @property
    def readers(self) -> dict[str, str]:
        """The keys whose expressions need the reference, and the first of its columns that each reads."""
        reads = {
            expression.key: [name for name in expression.names if name.startswith(_REFERENCE_PREFIXES)]
            for expression in self._expressions.values()
        }
        return {key: names[0] for key, names in reads.items() if names}

    def choose(self, table: pa.Table, reference: Mapping[str, np.ndarray], rows: np.ndarray) -> Choice:
        """Choose among `rows` of the training split's table, on which the objective has all that it reads.

        `reference` has `ref_X_logp` and `ref_X_logp_all` of the answers that are read, nan where missing.
        """
        if not len(rows):
            return Choice(rows)
        columns, notes = _input_table(self._kind, table, reference), []
        if self._filter:
            rows, note = self._filter.apply(table, rows)
            notes.append(note)
        if where := self._expressions.get("where"):
            is_true, is_null = where.evaluate(columns, rows)
            chosen, n_null = is_true.astype(bool) & ~is_null, int(is_null.sum())
            if not chosen.any():
                null = f" For {n_null:,} of them it is null, which is not true." if n_null else ""
                ranges = "; ".join(where.ranges(columns, rows))
                raise DataError(
                    f"{where} chooses none of {len(rows):,} train examples.{null} Loosen it{f': {ranges}' if ranges else ''}."
                )
            null = f"; it is null for {n_null:,}" if n_null else ""
            notes.append(f"train: {int(chosen.sum()):,} of {len(rows):,} train examples chosen by train.where{null}")
            rows = rows[chosen]
        weights = None
        if weight := self._expressions.get("weight"):
            weights, is_null = weight.evaluate(columns, rows)
            _refuse_negative(weight, weights, is_null, table, rows)
            is_visited = weights > 0
            if not is_visited.any():
                raise DataError(f"{weight} is 0 for all {len(rows):,} examples that could be trained on. Change it.")
            if n_skipped := int((~is_visited).sum()):
                notes.append(f"train: {n_skipped:,} of them weigh 0 by train.weight and are not visited")
            rows, weights = rows[is_visited], _normalize(weights[is_visited])
        ranks: list[np.ndarray] = []
        if order := self._expressions.get("order_by"):
            # All epochs now, so that what fails in the third is found before the first.
            for epoch in range(1, self._count_epochs(len(rows)) + 1 if EPOCH in order.names else 2):
                values = order.evaluate(columns, rows, epoch)[0].astype(np.int32)
                ranks.append(ranks[-1] if ranks and np.array_equal(ranks[-1], values) else values)
        return Choice(rows, weights, tuple(ranks), tuple(notes))

    def _count_epochs(self, n_examples: int) -> int:
        """Count the passes over the examples that a run begins."""
        if self._train.max_steps is None:
            return math.ceil(self._train.epochs)
        return -(-self._train.max_steps // -(-n_examples // self._train.batch_size))


class _Expression:
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
        empty = _input_table(self._kind, PREPARED[self._kind].empty_table(), {})
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


def _input_table(kind: str, table: pa.Table, reference: Mapping[str, np.ndarray]) -> pa.Table:
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


def _refuse_negative(
    weight: "_Expression", values: np.ndarray, is_null: np.ndarray, table: pa.Table, rows: np.ndarray
) -> None:
    is_wrong = is_null | ~np.isfinite(values) | (values < 0)
    if is_wrong.any():
        first = int(np.flatnonzero(is_wrong)[0])
        value = "null" if is_null[first] else f"{values[first]:g}"
        example_id = table["example_id"][int(rows[first])].as_py()
        raise DataError(
            f"{weight} is {value} for example {example_id}, one of {int(is_wrong.sum()):,} such; expected a number that is not "
            "negative. Give these a weight (coalesce(..., 1)), or leave them out (train.where)."
        )


def _normalize(weights: np.ndarray) -> np.ndarray:
    """Scale weights to a mean of 1, so that neither a common factor nor the number of examples matters.

    A step's loss divides the weighted sum by the number of its examples, as without weights. Dividing by the sum of the step's own
    weights would cancel what its examples have in common: steps of one example would have no weights at all, nor would sources
    that are trained on one after the other.
    """
    scaled = weights / weights.max()  # a sum of the largest numbers would overflow
    normalized: np.ndarray = scaled / scaled.mean()
    return normalized
