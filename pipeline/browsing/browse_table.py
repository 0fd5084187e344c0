"""The numbers of every example in one DuckDB table, so that filtering, sorting and counting read no texts.

NUMBERS has the columns of the view `pairs` (of `examples`, for labels) that are numbers, and one struct per run with what the run
made of the example, such as `trained.margin` and `trained.correct`. BROWSED is a view with the texts as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb

from prefcache.pipeline.stored import duckdb_connection
from prefcache.pipeline.views import Extension

NUMBERS, BROWSED = "numbers", "browsed"
MOST_RUNS = 24  # with a column; a condition reads the others from the view `rewards`

VIEWS = {"pairs": "pairs", "labels": "examples"}  # of the examples, by kind
TEXTS = {"pairs": ("prompt", "chosen", "rejected"), "labels": ("prompt", "completion")}
_ROWS = {"pairs": " where used", "labels": ""}  # of the view: one for each example
# Columns that are texts, or say nothing about one example.
_NO_NUMBERS = {
    *("example_id", "prompt", "chosen", "rejected", "completion", "images", "line", "boundary", "kl_of"),
    *("reference", "model_id", "used"),
    *("chosen_key", "rejected_key", "completion_key", "kl_key"),
}
_OF_OTHER_KIND = {"pairs": ("completion", "kl"), "labels": ("chosen", "rejected", "n_common")}
_ENUMS = ("source", "split")  # stored as numbers
# What a run made of an example: columns of the view `rewards`, first the reward to look at first.
RUN_FIELDS = {
    "pairs": ("margin", "chosen_reward", "rejected_reward", "correct"),
    "labels": ("completion_reward", "correct"),
}


@dataclass(frozen=True)
class RunColumn:
    """A run's struct in the table."""

    run: str
    name: str  # the run's, unless a column of the examples has it
    kind: str

    @property
    def reward(self) -> str:
        """The SQL of its reward: the margin of a pair's answers, or that of a label's only answer."""
        return self.field(RUN_FIELDS[self.kind][0])

    def field(self, name: str) -> str:
        return f"{quote(self.name)}.{name}"


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def make_extension(kind: str, runs: Sequence[str]) -> Extension:
    """Describe the tables for examples of this kind and the first of these runs."""
    return Extension(
        names=(NUMBERS, BROWSED),
        views=frozenset({VIEWS[kind], *(("rewards",) if runs else ())}),
        create=lambda con: _create(con, kind, runs),
    )


def name_columns(kind: str, runs: Sequence[str], taken: Iterable[str]) -> list[RunColumn]:
    """Name the runs' columns so that none has the name of one that the examples have. DuckDB ignores case."""
    names = {name.lower() for name in taken}
    columns = []
    for run in runs[:MOST_RUNS]:
        name = run
        while name.lower() in names:
            name = f"run_{name}"
        names.add(name.lower())
        columns.append(RunColumn(run, name, kind))
    return columns


def list_columns(con: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """Return the types of a table's columns by their names."""
    return {str(name): str(type_) for name, type_, *_ in con.execute(f"describe {table}").fetchall()}


def _create(con: duckdb.DuckDBPyConnection, kind: str, runs: Sequence[str]) -> None:
    view, rows = VIEWS[kind], _ROWS[kind]
    all_columns = list_columns(con, view)
    others = _OF_OTHER_KIND[kind]
    numbers = [
        name
        for name in all_columns
        if name not in _NO_NUMBERS and not name.removeprefix("n_").removeprefix("cut_").startswith(others)
    ]
    for name in _ENUMS:
        con.execute(f"create type {name}_name as enum (select distinct {name} from {view} where {name} is not null)")
    selected = [f"{name}::{name}_name as {name}" if name in _ENUMS else name for name in numbers]
    columns = name_columns(kind, runs, all_columns)
    # One pass over the rewards, whatever the number of runs.
    of_runs = [f"{_pack(column)} as {quote(column.name)}" for column in columns]
    rewards = f"select example_id, {', '.join(of_runs)} from rewards group by example_id"
    joined = f" left join ({rewards}) using (example_id)" if columns else ""
    names = [*numbers, *(quote(column.name) for column in columns)]
    con.execute(
        f"create table {NUMBERS} as select {', '.join(names)} "
        f"from (select example_id, {', '.join(selected)} from {view}{rows}){joined}"
    )
    of_runs = [f"{NUMBERS}.{quote(column.name)}" for column in columns]
    con.execute(
        f"create view {BROWSED} as select {', '.join([f'{view}.*', *of_runs])} "
        f"from {view} join {NUMBERS} using (position){rows}"
    )


def _pack(column: RunColumn) -> str:
    run = duckdb_connection.literal(column.run)
    fields = (f"{name} := any_value({name}) filter (where run = {run})" for name in RUN_FIELDS[column.kind])
    return f"struct_pack({', '.join(fields)})"
