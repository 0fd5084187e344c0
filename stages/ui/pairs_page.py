"""The list of examples: its filters, its order, its histograms, and the ticks from which selections are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefcache.pipeline.browsing.browse_table import RUN_FIELDS
from prefcache.pipeline.browsing.filters import Filter, parse_filter, to_query
from prefcache.pipeline.browsing.queries import Order
from prefcache.pipeline.errors import PrefcacheError
from prefcache.ui import histogram_svg, pages
from prefcache.ui.reader import PAGE_ROWS, Reader, Row

_COLUMNS = {
    "pairs": ("n_chosen_counted", "n_rejected_counted", "margin", "margin_per_token"),
    "labels": ("n_completion_counted",),
}
_TITLES = {
    "n_chosen_counted": "chosen tokens that count",
    "n_rejected_counted": "rejected tokens that count",
    "n_completion_counted": "answer tokens that count",
    "margin": "reference margin",
    "margin_per_token": "reference margin per token",
    "position": "data order",
}
_MOST_RUNS = 3  # with a column in the list
_MOST_PAGES = 20_000


@dataclass(frozen=True)
class _Asked:
    """What the address of a list asks for."""

    chosen: Filter
    order: Order
    page: int
    columns: list[str]

    @property
    def query(self) -> list[tuple[str, str]]:
        """The parameters of the same list, without the page."""
        direction = "desc" if self.order.is_descending else "asc"
        return [*to_query(self.chosen), ("sort", self.order.key), ("order", direction)]


def show(reader: Reader, request: Request) -> Response:
    """Show the form and the list. A list that may take long is loaded by the page itself."""
    query = request.query_params.multi_items()
    asked, error, rows = _Asked(Filter(), Order(), 1, _choose_columns(reader)), "", list[Row]()
    try:
        asked = _parse(reader, query)
        is_later = reader.may_take_long(asked.chosen) and "wait" not in request.query_params
        rows = [] if is_later else _list_rows(reader, asked)
    except PrefcacheError as problem:
        error, is_later = str(problem), False
    context: dict[str, Any] = {
        "values": _group(query),
        "asked": asked,
        "filter_query": to_query(asked.chosen),
        "titles": {column: name_column(column) for column in [*asked.columns, *reader.catalog.sortable]},
        "rows": rows,
        "is_later": is_later,
        "has_more": len(rows) == PAGE_ROWS,
        "histograms": [bins.column.key for bins in reader.bins],
        "error": error,
    }
    return pages.render("pairs", section="/pairs", status=400 if error else 200, reader=reader, **context)


def show_rows(reader: Reader, request: Request) -> Response:
    """Show only the list, for a page that waits for it."""
    asked = _parse(reader, request.query_params.multi_items())
    rows = _list_rows(reader, asked)
    titles = {column: name_column(column) for column in asked.columns}
    context: dict[str, Any] = {"asked": asked, "filter_query": to_query(asked.chosen), "titles": titles, "rows": rows}
    return pages.render("rows", reader=reader, has_more=len(rows) == PAGE_ROWS, **context)


def show_count(reader: Reader, request: Request) -> Response:
    chosen = parse_filter(request.query_params.multi_items(), reader.catalog)
    return pages.render("count", n=reader.count(chosen), reader=reader, is_filtered=bool(chosen))


def show_histograms(reader: Reader, request: Request) -> Response:
    chosen = parse_filter(request.query_params.multi_items(), reader.catalog)
    ranges = {each.key: each for each in chosen.ranges}
    drawn = [histogram_svg.draw(each, ranges.get(each.bins.column.key)) for each in reader.histograms(chosen)]
    return pages.render("histograms", histograms=drawn)


def name_column(column: str) -> str:
    """Return the title of a column, or of a run's field, such as `trained.margin`."""
    return _TITLES.get(column) or column.replace("_", " ").replace(".", ": ")


def _group(query: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the values of each parameter as they were typed, to fill the form with."""
    values: dict[str, list[str]] = {}
    for name, value in query:
        values.setdefault(name, []).append(value)
    return values


def _choose_columns(reader: Reader) -> list[str]:
    reward, *_ = RUN_FIELDS[reader.kind]
    return [*_COLUMNS[reader.kind], *(f"{run}.{reward}" for run in reader.runs[:_MOST_RUNS])]


def _parse(reader: Reader, query: Sequence[tuple[str, str]]) -> _Asked:
    values = _group(query)
    order, columns = _parse_order(values), _choose_columns(reader)
    if order.key not in columns and order.key != "position":
        columns = [*columns, order.key]
    return _Asked(parse_filter(query, reader.catalog), order, _parse_page(values), columns)


def _list_rows(reader: Reader, asked: _Asked) -> list[Row]:
    return reader.page(asked.chosen, asked.order, asked.columns, asked.page)


def _parse_order(values: dict[str, list[str]]) -> Order:
    return Order(values.get("sort", ["position"])[-1], values.get("order", ["asc"])[-1] == "desc")


def _parse_page(values: dict[str, list[str]]) -> int:
    text = values.get("page", ["1"])[-1]
    if not text.isdecimal():
        return 1
    # Python refuses to read thousands of digits.
    return max(1, min(int(text), _MOST_PAGES)) if len(text) < 10 else _MOST_PAGES
