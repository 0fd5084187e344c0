"""Which examples are trained on, how much each counts and in what order: train.only, where, weight and order_by.

train.only is a file (only.py). Each of the others is a SQL expression over one table, `examples`, with a row per example of the training split and the reference's log-probs
beside the data's own columns. A config may come from elsewhere, so an expression is as safe as `prefcache sql` and narrower: it
reads columns, with any deterministic function or window over them, and nothing else. Deterministic, because every process of a
run and every resumption of it has to find the same examples in the same order. The held-out split is never touched: runs that
choose differently stay comparable.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pipeline.config import Train
from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.schema import IDS, KEY, PREPARED
from pipeline.stored import duck
from pipeline.training.only import Only
from pipeline.views import MEMORY_LIMIT

# Beside the data's own columns: what is computed of them and of the reference's log-probs.
_REFERENCE = {"pairs": ("ref_chosen_logp", "ref_rejected_logp"), "labels": ("ref_completion_logp",)}
_COMPUTED = {
    "pairs": {
        "margin": "ref_chosen_logp - ref_rejected_logp",
        "margin_per_token": "ref_chosen_logp / n_chosen - ref_rejected_logp / n_rejected",
        "length_difference": "n_chosen - n_rejected",
        "score_gap": "chosen_score - rejected_score",
    },
    "labels": {},
}
_OF_REFERENCE = ("ref_", "margin")  # how the names of columns begin that the reference gives
EPOCH = "epoch"  # counts from 1; only train.order_by has it

# What an expression is made of. Neither subqueries nor stars and parameters, nor what a later DuckDB invents.
_NODES = {
    *("CONSTANT", "COLUMN_REF", "FUNCTION", "OPERATOR", "COMPARISON", "CONJUNCTION", "BETWEEN", "CASE", "CAST"),
    *("COLLATE", "LAMBDA", "LAMBDA_REF", "TYPE", "WINDOW"),
}
_MACROS = {"if", "nullif", "split_part", "fdiv", "fmod", "geomean", "weighted_avg"}
# Earlier versions of DuckDB do not list these.
_WINDOWS = {
    *("row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile", "lag", "lead"),
    *("first_value", "last_value", "nth_value"),
}
_RANDOM = {"reservoir_quantile"}  # DuckDB calls it deterministic
_NUMBER = r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|BOOLEAN|DECIMAL\(.*\)"


@dataclass(frozen=True)
class Choice:
    """Rows of the training split, ascending, and what is known of each. Shape of weight and of every entry of ranks: rows."""

    rows: np.ndarray
    weight: np.ndarray | None = None  # 1 on average
    ranks: tuple[np.ndarray, ...] = ()  # equal where train.order_by says nothing; of each epoch, or one for all
    said: tuple[str, ...] = ()


class Selection:
    """The file and the three expressions of a run, checked before anything is loaded."""

    def __init__(self, train: Train, kind: str) -> None:
        self._kind = kind
        given = {"where": train.where, "weight": train.weight, "order_by": train.order_by}
        self._expressions = {
            name: _Expression(f"train.{name}", sql, kind) for name, sql in given.items() if sql is not None
        }
        self._only = Only(train.only) if train.only is not None else None
        self._n_epochs = math.ceil(train.epochs)
        if (where := self._expressions.get("where")) and where.type != "BOOLEAN":
            raise UsageError(f"{where} is of type {where.type}; expected a condition, such as margin > 0.")
        if (weight := self._expressions.get("weight")) and not re.fullmatch(_NUMBER, weight.type):
            raise UsageError(f"{weight} is of type {weight.type}; expected a number for each example.")

    def __bool__(self) -> bool:
        return bool(self._expressions) or self._only is not None

    @property
    def identity(self) -> dict[str, str]:
        """What stands for keys of the config in what a run is known by: not a file's name, but what is in it."""
        return {} if self._only is None else {"only": self._only.id}

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """Answers whose log-probs the cache has to give, whatever the loss reads."""
        names = {name for expression in self._expressions.values() for name in expression.names}
        both = any(name.startswith("margin") for name in names)
        return tuple(
            name.removeprefix("ref_").removesuffix("_logp") for name in _REFERENCE[self._kind] if both or name in names
        )

    @property
    def reader(self) -> str:
        """Who reads the reference: `train.where reads margin`."""
        return next(
            f"{expression.key} reads {name}"
            for expression in self._expressions.values()
            for name in expression.names
            if name.startswith(_OF_REFERENCE)
        )

    def choose(self, table: pa.Table, reference: Mapping[str, np.ndarray], rows: np.ndarray) -> Choice:
        """Of the training split's table, among `rows`, on which the objective has all that it reads.

        `reference` has `ref_X_logp` of the answers that are read, nan where there is none.
        """
        if not len(rows):
            return Choice(rows)
        given, said = _given(self._kind, table, reference), []
        if self._only:
            rows, found = self._only.among(table, rows)
            said.append(found)
        if where := self._expressions.get("where"):
            chosen, unknown = where.values(given, rows)
            n, n_unknown = len(rows), int(unknown.sum())
            chosen = chosen.astype(bool) & ~unknown
            if not chosen.any():
                raise DataError(_none_chosen(where, given, rows, n_unknown))
            null = f"; it is null for {n_unknown:,}" if n_unknown else ""
            rows = rows[chosen]
            said.append(f"train: {len(rows):,} of {n:,} train examples chosen by train.where{null}")
        weights = None
        if weight := self._expressions.get("weight"):
            weights = _checked(weight, *weight.values(given, rows), table, rows)
            visited = weights > 0
            if not visited.any():
                raise DataError(f"{weight} is 0 for all {len(rows):,} examples that could be trained on. Change it.")
            if not visited.all():
                said.append(f"train: {int((~visited).sum()):,} of them weigh 0 by train.weight and are not visited")
            rows, weights = rows[visited], _averaging_1(weights[visited])
        ranks = self._ranks(given, rows)
        return Choice(rows, weights, ranks, tuple(said))

    def _ranks(self, given: pa.Table, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        order = self._expressions.get("order_by")
        if order is None:
            return ()
        n_epochs = self._n_epochs if EPOCH in order.names else 1
        found: list[np.ndarray] = []
        # All of them now: what fails in the third epoch is found before the first.
        for epoch in range(1, n_epochs + 1):
            ranks, _ = order.values(given, rows, epoch)
            ranks = ranks.astype(np.int32)
            found.append(found[-1] if found and np.array_equal(found[-1], ranks) else ranks)
        return tuple(found)


class _Expression:
    """One expression: its names are those of columns, and it runs in a DuckDB that reads nothing else."""

    def __init__(self, key: str, sql: str, kind: str) -> None:
        self.key, self._sql, self._kind = key, sql, kind
        self._is_order = key.endswith("order_by")
        value = f"dense_rank() over (order by\n{sql}\n)" if self._is_order else f"(\n{sql}\n)"
        self._query = f"select row_, {value} as value from examples"
        empty = _given(kind, PREPARED[kind].empty_table(), {})
        con = self._open(empty, np.empty(0, np.int64))
        # The whole query is looked at, not the expression, which might close a bracket that is not its own.
        self.names = self._checked_names(con)
        described = self._run(con, f"describe {self._query}").fetchall()
        self.type: str = described[1][1].strip('"')

    def __str__(self) -> str:
        return f"{self.key} ({self._sql.strip()})"

    def values(self, given: pa.Table, rows: np.ndarray, epoch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Of these rows, in their order: the values, and which of them are null."""
        as_ = "integer" if self._is_order else "boolean" if self.type == "BOOLEAN" else "double"
        query = f"select row_, cast(value as {as_}) as value from ({self._query})"
        con = self._open(given, rows, epoch)
        try:
            found = self._run(con, query).fetchnumpy()
        except (duckdb.Error, RuntimeError) as error:
            raise self._translated(error) from None
        finally:
            con.close()
        assert len(found["row_"]) == len(rows)
        order = np.argsort(np.asarray(found["row_"]))
        value = np.ma.asarray(found["value"])[order]
        return value.filled(0), np.ma.getmaskarray(value)

    def ranges(self, given: pa.Table, rows: np.ndarray) -> list[str]:
        """From where to where the columns go that it reads."""
        con, found = self._open(given, rows), []
        for name in self.names:
            ends = con.execute(f"select left(min({name})::varchar, 40), left(max({name})::varchar, 40) from examples")
            low, high = ends.fetchall()[0]
            found.append(f"{name} is null for all" if low is None else f"{name} goes from {low} to {high}")
        return found

    def _open(self, given: pa.Table, rows: np.ndarray, epoch: int = 1) -> duckdb.DuckDBPyConnection:
        con = duck.connect()
        con.execute("set python_enable_replacements = false")
        con.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
        # With several, the last bit of a sum and the order of equal rows would depend on which of them was first.
        con.execute("set threads = 1")
        is_given = np.zeros(len(given), bool)
        is_given[rows] = True
        con.register("given", given.append_column("is_given", pa.array(is_given)))
        more = [f"{sql} as {name}" for name, sql in _COMPUTED[self._kind].items()]
        more += [f"{epoch}::bigint as {EPOCH}"] if self._is_order else []
        kept = ", ".join([*_data_columns(self._kind), *_REFERENCE[self._kind], *more, "row_"])
        con.execute(f"create view examples as select {kept} from given where is_given")
        duck.lock(con)
        return con

    def _run(self, con: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyConnection:
        try:
            return con.execute(query)
        except (duckdb.Error, RuntimeError) as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> BaseException:
        if isinstance(error, duckdb.OutOfMemoryException):
            return ResourceError(f"{self} needs more than {MEMORY_LIMIT} of memory. Say it in a simpler way.")
        if isinstance(error, duckdb.BinderException) and "GROUP BY" in str(error):
            return UsageError(
                f"{self} has an aggregate; say over which examples: avg(margin) over (), for all of them."
            )
        if isinstance(error, duckdb.Error):
            return UsageError(f"{self}: {' '.join(str(error).partition('LINE ')[0].split())}")
        return KeyboardInterrupt() if "interrupted" in str(error) else error

    # -- what it may be made of --------------------------------------------------------------------------------------

    def _checked_names(self, con: duckdb.DuckDBPyConnection) -> list[str]:
        """The columns that it reads. Whatever is no expression over columns is refused."""
        tree = json.loads(con.execute("select json_serialize_sql($1)", [self._query]).fetchall()[0][0])
        if tree["error"]:
            raise UsageError(f"{self} is no SQL expression: {tree['error_message']}.")
        value = self._only_value(tree["statements"])
        functions, own = _deterministic(), _lambda_parameters(value)
        known = [*column_names(self._kind), *([EPOCH] if self._is_order else [])]
        names = []
        for node in _nodes(value):
            if node.get("class", "CONSTANT") not in _NODES:
                what = "a query of its own" if node["class"] == "SUBQUERY" else node["class"].replace("_", " ").lower()
                raise UsageError(
                    f"{self} has {what}; expected an expression over an example's columns. To compare an example with the "
                    "others, take a window: avg(margin) over ()."
                )
            if (function := node.get("function_name", "").lower()) and function not in functions:
                raise UsageError(
                    f"{self}: {function} is no function here; expected deterministic functions of values, for every process "
                    "and every resumed run has to find the same."
                )
            if "column_names" in node and node["column_names"][0].lower() not in own:
                names.append(self._column(node["column_names"], known))
        return list(dict.fromkeys(names))

    def _only_value(self, statements: list[dict[str, Any]]) -> dict[str, Any]:
        """What stands in the expression's place, where the query is still the one that was written around it."""
        node = statements[0]["node"] if len(statements) == 1 else {}
        items, table = node.get("select_list", []), node.get("from_table", {})
        plain = node.get("type") == "SELECT_NODE" and len(items) == 2 and table.get("table_name") == "examples"
        more = ("where_clause", "group_expressions", "having", "sample", "qualify", "modifiers")
        is_order = self._is_order and items[1:] and items[1].get("type") == "WINDOW_RANK_DENSE"
        if not plain or any(node.get(part) for part in more) or (self._is_order and not is_order):
            what = "an order, such as margin desc, n_prompt" if self._is_order else "one SQL expression"
            raise UsageError(f"{self}: expected {what}, and nothing beside it.")
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
        hint = f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(known)}"
        quoted = " Text stands in single quotes." if not near else ""
        raise UsageError(f"{self}: there is no column {name!r}; {hint}.{quoted}")


def column_names(kind: str) -> list[str]:
    """What an expression may name, for data of this kind."""
    data = [field.name for field in PREPARED[kind] if field.type != IDS]
    return [*data, *_REFERENCE[kind], *_COMPUTED[kind]]


def _data_columns(kind: str) -> list[str]:
    """As the view `examples` of `prefcache sql` has them."""
    fields = [field for field in PREPARED[kind] if field.type != IDS]
    return [f"lower(hex({f.name})) as {f.name}" if f.type == KEY else f.name for f in fields]


def _given(kind: str, table: pa.Table, reference: Mapping[str, np.ndarray]) -> pa.Table:
    """The table's columns but for token ids, the reference's log-probs (null where there is none), and the number of each row."""
    given = table.select([field.name for field in PREPARED[kind] if field.type != IDS])
    nothing = np.full(len(table), np.nan)
    for name in _REFERENCE[kind]:
        given = given.append_column(name, pa.array(reference.get(name, nothing), pa.float64(), from_pandas=True))
    return given.append_column("row_", pa.array(np.arange(len(table))))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every node of a parsed expression, whatever the version of DuckDB calls what lies between."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _lambda_parameters(tree: Any) -> set[str]:
    sides = [node["lhs"] for node in _nodes(tree) if node.get("class") == "LAMBDA"]
    return {name.lower() for side in sides for node in _nodes(side) for name in node.get("column_names", ())}


@functools.cache
def _deterministic() -> frozenset[str]:
    """Functions of values alone. Of DuckDB's macros, some of which look at the database or the clock, a few."""
    found = duckdb.connect().execute(
        "select lower(function_name) as name, bool_or(function_type = 'macro') from duckdb_functions() "
        "where function_type in ('scalar', 'aggregate', 'window', 'macro') "
        "group by name having bool_and(stability is not distinct from 'CONSISTENT' or function_type = 'macro')"
    )
    known = {
        name
        for name, is_macro in found.fetchall()
        if not is_macro or name in _MACROS or name.startswith(("list_", "array_"))
    }
    return frozenset((known | _WINDOWS) - _RANDOM)


# -- where there is nothing, or nothing right ------------------------------------------------------------------------


def _none_chosen(where: _Expression, given: pa.Table, rows: np.ndarray, n_unknown: int) -> str:
    n = len(rows)
    null = f" For {n_unknown:,} of them it is null, which is not true." if n_unknown else ""
    ranges = "; ".join(where.ranges(given, rows))
    return f"{where} chooses none of {n:,} train examples.{null} Loosen it{f': {ranges}' if ranges else ''}."


def _checked(
    weight: _Expression, values: np.ndarray, is_null: np.ndarray, table: pa.Table, rows: np.ndarray
) -> np.ndarray:
    is_wrong = is_null | ~np.isfinite(values) | (values < 0)
    if is_wrong.any():
        first = int(np.flatnonzero(is_wrong)[0])
        found = "null" if is_null[first] else f"{values[first]:g}"
        example_id = table["example_id"][int(rows[first])].as_py()
        raise DataError(
            f"{weight} is {found} for example {example_id}, one of {int(is_wrong.sum()):,} such; expected a number that is not "
            "negative. Say what these weigh (coalesce(..., 1)), or leave them out (train.where)."
        )
    return values


def _averaging_1(weights: np.ndarray) -> np.ndarray:
    """So that a factor common to all weights, and how many examples there are, change nothing.

    A step's loss is the sum of these weights times losses over the number of its examples, as without weights, and not over
    the sum of its own weights: that would cancel whatever the step's examples have in common. Steps of one example would not be
    weighed at all, nor sources that are trained on one after the other.
    """
    scaled = weights / weights.max()  # a sum of the largest numbers would overflow
    found: np.ndarray = scaled / scaled.mean()
    return found
