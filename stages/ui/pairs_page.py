"""The list of examples: its filters, its order, its histograms, and the ticks from which selections are made."""

import itertools
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from prefcache.pipeline.browsing.filters import Filter, parse_filter, to_query
from prefcache.pipeline.browsing.queries import Order
from prefcache.pipeline.errors import PrefcacheError
from prefcache.ui import histogram_svg, pages
from prefcache.ui.reader import PAGE_ROWS, Reader

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


def show(reader: Reader, request: Request) -> Response:
    query = request.query_params.multi_items()
    values = _group(query)
    error, rows, chosen, order, page = "", [], Filter(), Order(), 1
    columns = _choose_columns(reader, values)
    try:
        chosen, order, page = parse_filter(query, reader.catalog), _parse_order(values), _parse_page(values)
        if order.key not in columns and order.key != "position":
            columns = [*columns, order.key]
        rows = reader.page(chosen, order, columns, page)
    except PrefcacheError as problem:
        error = str(problem)
    context = {
        "values": values,
        "chosen": chosen,
        "filter_query": to_query(chosen),
        "order": order,
        "columns": columns,
        "titles": {column: name_column(column) for column in [*columns, *reader.catalog.sortable]},
        "rows": rows,
        "page": page,
        "has_more": len(rows) == PAGE_ROWS,
        "histograms": _list_histogram_keys(reader),
        "error": error,
    }
    return pages.render("pairs", section="/pairs", status=400 if error else 200, reader=reader, **context)


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


def _choose_columns(reader: Reader, values: dict[str, list[str]]) -> list[str]:
    runs = [run for run in values.get("run", reader.runs) if run in reader.catalog.runs]
    fields = (f"{run}.{'margin' if reader.kind == 'pairs' else 'completion_reward'}" for run in runs)
    return [*_COLUMNS[reader.kind], *itertools.islice(fields, _MOST_RUNS)]


def _list_histogram_keys(reader: Reader) -> list[str]:
    return [each.column.key for each in reader.bins]


def _parse_order(values: dict[str, list[str]]) -> Order:
    return Order(values.get("sort", ["position"])[-1], values.get("order", ["asc"])[-1] == "desc")


def _parse_page(values: dict[str, list[str]]) -> int:
    text = values.get("page", ["1"])[-1]
    return min(int(text), _MOST_PAGES) if text.isdecimal() and int(text) > 0 else 1
