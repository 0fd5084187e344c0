"""Which examples a reader asks for: from a page's address to SQL and back.

Values become parameters of the query. Only the reader's own condition becomes part of its text; the query is checked as a whole
before it runs, as every query is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from prefcache.pipeline.browsing.browse_table import TEXTS, RunColumn, quote
from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.views.query_check import parse_sql

OUTCOMES = {"right": "{} is true", "wrong": "{} is false", "unvisited": "{} is null"}


@dataclass(frozen=True)
class RangeColumn:
    """A number that an address filters by, as KEY.min and KEY.max."""

    key: str
    title: str
    sql: str
    is_whole: bool = False  # counts, such as tokens


@dataclass(frozen=True)
class Range:
    """The values of a number that are asked for, both ends included."""

    key: str
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run made of the examples that are asked for."""

    run: str
    name: str  # one of OUTCOMES


@dataclass(frozen=True)
class Catalog:
    """What the filters of an experiment may name."""

    kind: str
    sources: Sequence[str]
    splits: Sequence[str]
    runs: Mapping[str, RunColumn]
    ranges: Mapping[str, RangeColumn]
    sortable: Sequence[str]  # columns, and fields of runs as RUN.FIELD


@dataclass(frozen=True)
class Filter:
    """The conditions that an example has to meet, all of them."""

    sources: tuple[str, ...] = ()  # one of these; all if empty
    splits: tuple[str, ...] = ()
    text: str = ""  # part of the prompt or of an answer, in any case
    where: str = ""  # SQL over the columns of BROWSED
    ranges: tuple[Range, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def __bool__(self) -> bool:
        return self != Filter()


def parse_filter(query: Sequence[tuple[str, str]], catalog: Catalog) -> Filter:
    """Read the filter from an address's parameters; others, such as the page's number, are ignored."""
    values: dict[str, list[str]] = {}
    for name, value in query:
        if value.strip():
            values.setdefault(name, []).append(value.strip())
    ranges, outcomes = list[Range](), list[Outcome]()
    for key, column in catalog.ranges.items():
        least, most = (_parse_number(column, values.get(f"{key}.{end}")) for end in ("min", "max"))
        if least is not None or most is not None:
            ranges.append(Range(key, least, most))
    for run in catalog.runs:
        if outcome := values.get(f"outcome.{run}"):
            look_up(OUTCOMES, outcome[-1], f"outcome.{run}")
            outcomes.append(Outcome(run, outcome[-1]))
    for name, known in (("source", catalog.sources), ("split", catalog.splits)):
        for value in values.get(name, ()):
            look_up(dict.fromkeys(known), value, name)
    where = values.get("where", [""])[-1].rstrip("; \n")
    if where:
        _check_condition(where)
    return Filter(
        sources=tuple(dict.fromkeys(values.get("source", ()))),
        splits=tuple(dict.fromkeys(values.get("split", ()))),
        text=values.get("text", [""])[-1],
        where=where,
        ranges=tuple(ranges),
        outcomes=tuple(outcomes),
    )


def to_query(chosen: Filter) -> list[tuple[str, str]]:
    """Write the filter as an address's parameters."""
    return [
        *(("source", source) for source in chosen.sources),
        *(("split", split) for split in chosen.splits),
        *((name, value) for name, value in (("text", chosen.text), ("where", chosen.where)) if value),
        *_range_parameters(chosen.ranges),
        *((f"outcome.{each.run}", each.name) for each in chosen.outcomes),
    ]


def to_condition(chosen: Filter, catalog: Catalog) -> tuple[str, dict[str, Any]]:
    """Write the filter as a SQL condition and its parameters."""
    parts, parameters = ["true"], dict[str, Any]()

    def add(sql: str, *values: Any) -> None:
        names = [f"p{len(parameters) + n}" for n in range(len(values))]
        parameters.update(zip(names, values, strict=True))
        parts.append(sql.format(*(f"${name}" for name in names)))

    for column, names in (("source", chosen.sources), ("split", chosen.splits)):
        if names:
            add(f"{column} in ({', '.join(['{}'] * len(names))})", *names)
    for each in chosen.ranges:
        sql = catalog.ranges[each.key].sql.replace("{", "{{").replace("}", "}}")
        if each.least is not None:
            add(f"{sql} >= {{}}", each.least)
        if each.most is not None:
            add(f"{sql} <= {{}}", each.most)
    for outcome in chosen.outcomes:
        parts.append(OUTCOMES[outcome.name].format(catalog.runs[outcome.run].field("correct")))
    if chosen.text:
        columns = " or ".join(f"contains(lower({name}), lower({{0}}))" for name in TEXTS[catalog.kind])
        add(f"({columns})", chosen.text)
    if chosen.where:
        # On lines of its own, so that a comment ends before the bracket does.
        parts.append(f"(\n{chosen.where}\n)")
    return " and ".join(parts), parameters


def sort_sql(key: str, catalog: Catalog) -> str:
    """Return the SQL of a sortable column, perhaps a field of a run's struct."""
    look_up(dict.fromkeys(catalog.sortable), key, "sort")
    run, dot, name = key.rpartition(".")
    return catalog.runs[run].field(name) if dot else quote(key)


def _check_condition(where: str) -> None:
    """Refuse what is not one expression. One that closes a bracket it has not opened does not parse in both kinds of brackets."""
    con = duckdb.connect()
    for brackets in ("()", "[]"):
        tree = parse_sql(con, f"select {brackets[0]}\n{where}\n{brackets[1]}")
        if tree["error"]:
            raise UsageError(
                f"SQL condition: {tree['error_message']}. Found {where!r}, expected one such as margin < 0."
            )


def _range_parameters(ranges: Sequence[Range]) -> Iterator[tuple[str, str]]:
    for each in ranges:
        for end, value in (("min", each.least), ("max", each.most)):
            if value is not None:
                yield f"{each.key}.{end}", f"{value:.12g}"


def _parse_number(column: RangeColumn, values: list[str] | None) -> float | None:
    if not values:
        return None
    try:
        number = float(values[-1])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{column.title}: found {values[-1]!r}, expected a number.")
    return number
