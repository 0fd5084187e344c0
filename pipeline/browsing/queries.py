"""The queries behind a page of examples: a page of rows, their count, their positions, and histograms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefcache.pipeline.browsing.browse_table import BROWSED, NUMBERS
from prefcache.pipeline.browsing.filters import Catalog, Filter, RangeColumn, sort_sql, to_condition

_MOST_BINS = 40
_EDGES = 0.005  # the share of values at each end that the outermost bins hold


@dataclass(frozen=True)
class Query:
    sql: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Bins:
    """Equally wide bins; the first also counts what is below `start`, and the last what is above the end."""

    column: RangeColumn
    start: float
    width: float
    n: int

    @property
    def end(self) -> float:
        return self.start + self.n * self.width


def make_bins(column: RangeColumn, low: float, high: float) -> Bins:
    """Divide the values between two quantiles into bins; each bin of whole numbers holds as many of them."""
    if column.is_whole:
        low, high = math.floor(low), math.ceil(high)
        width = math.ceil((high - low + 1) / _MOST_BINS)
        return Bins(column, low - 0.5, width, math.ceil((high - low + 1) / width))
    if not high > low:
        return Bins(column, low - 0.5, 1.0, 1)
    return Bins(column, low, (high - low) / _MOST_BINS, _MOST_BINS)


def list_rows(
    chosen: Filter, catalog: Catalog, table: str, columns: Sequence[str], order: "Order", limit: int, offset: int
) -> Query:
    """Select the positions and these columns of a page of rows."""
    condition, parameters = to_condition(chosen, catalog)
    selected = ", ".join(["position", *(sort_sql(name, catalog) for name in columns)])
    sql = f"select {selected} from {table} where {condition} order by {order.to_sql(catalog)} limit {limit} offset {offset}"
    return Query(sql, parameters)


def list_positions(chosen: Filter, catalog: Catalog, table: str) -> Query:
    condition, parameters = to_condition(chosen, catalog)
    return Query(f"select position from {table} where {condition}", parameters)


@dataclass(frozen=True)
class Order:
    key: str = "position"
    is_descending: bool = False

    def to_sql(self, catalog: Catalog) -> str:
        direction = "desc" if self.is_descending else "asc"
        first = "" if self.key == "position" else f"{sort_sql(self.key, catalog)} {direction} nulls last, "
        return f"{first}position" + (" desc" if self.key == "position" and self.is_descending else "")


def find_edges(columns: Sequence[RangeColumn]) -> Query:
    """Select, for each column, where its bins start and end: the quantiles near its ends, or null if it has no values."""
    parts = [
        f"select {n} as n, quantile_cont({column.sql}, [{_EDGES}, {1 - _EDGES}]) as edges "
        f"from {NUMBERS} where isfinite({column.sql}::double)"
        for n, column in enumerate(columns)
    ]
    return Query(f"{' union all '.join(parts)} order by n", {})


def count_bins(chosen: Filter, catalog: Catalog, table: str, bins: Sequence[Bins]) -> Query:
    """Count the rows, as bin 0 of histogram -1, and those in each bin of each histogram, in one pass over the table."""
    condition, parameters = to_condition(chosen, catalog)
    values = "".join(f", ({each.column.sql})::double as value_{n}" for n, each in enumerate(bins))
    parts = ["select -1 as n, 0 as bin, count(*) as n_rows from chosen"]
    for n, each in enumerate(bins):
        at = f"least(greatest(floor((value_{n} - {each.start!r}) / {each.width!r}), 0), {each.n - 1})::int"
        parts.append(f"select {n}, {at} as bin, count(*) from chosen where isfinite(value_{n}) group by bin")
    rows = f"select position{values} from {table} where {condition}"
    return Query(f"with chosen as materialized ({rows}) {' union all '.join(parts)}", parameters)


def tables_for(chosen: Filter) -> Sequence[str]:
    """The tables that a filter can be asked of, the fastest first. A condition may read numbers only, which DuckDB knows."""
    if chosen.text:
        return (BROWSED,)
    return (NUMBERS, BROWSED) if chosen.where else (NUMBERS,)
