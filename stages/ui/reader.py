"""Read an experiment for the pages: lists, counts and histograms of its examples under a filter, and their texts.

Filters that may take long, searches through all texts and conditions of the reader's own, are asked of a process of their own, so
that they do not hold up the others.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache import view_sources
from prefcache.commands.query import Database
from prefcache.pipeline.browsing import browse_table, queries
from prefcache.pipeline.browsing.browse_table import NUMBERS, TEXTS, RunColumn
from prefcache.pipeline.browsing.filters import Catalog, Filter, RangeColumn
from prefcache.pipeline.browsing.queries import Bins, Order, Query
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import TRAIN
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.views import query_worker
from prefcache.ui.image_reader import ImageReader, ShownImage
from prefcache.ui.questioner import Questioner
from prefcache.ui.token_reader import TokenReader

PAGE_ROWS = 50
MOST_RUN_HISTOGRAMS = 4
# For one query. By numbers, millions of pairs take less than one; a search through their texts takes tens.
_QUICK_SECONDS, _SLOW_SECONDS = 20.0, 120.0
_RANGES = {
    "pairs": {
        "margin": ("reference margin", "margin"),
        "margin_per_token": ("reference margin per token", "margin_per_token"),
        "length_difference": ("length difference", "length_difference"),
        "score_gap": ("gap of the grades", "score_gap"),
        "n_prompt": ("prompt tokens", "n_prompt"),
        "n_images": ("images of the prompt", "n_images"),
        "n_chosen": ("chosen tokens that count", "n_chosen_counted"),
        "n_rejected": ("rejected tokens that count", "n_rejected_counted"),
    },
    "labels": {
        "n_prompt": ("prompt tokens", "n_prompt"),
        "n_images": ("images of the prompt", "n_images"),
        "n_completion": ("answer tokens that count", "n_completion_counted"),
    },
}
# The numbers of the data that have a histogram.
_HISTOGRAMS = {"pairs": ("margin", "margin_per_token", "length_difference"), "labels": ("n_completion",)}


@dataclass(frozen=True)
class Row:
    """An example in a list."""

    position: int
    example_id: str
    source: str
    split: str
    texts: Mapping[str, str]  # the prompt and the answers
    images: Sequence[ShownImage]  # of the prompt
    values: Mapping[str, Any]  # of the columns that were asked for


@dataclass(frozen=True)
class Histogram:
    """How many rows are in each bin, of all and of those under a filter."""

    bins: Bins
    all_counts: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True)
class Counts:
    """How many rows a filter leaves, and how many in each bin of each histogram."""

    n: int
    bins: Sequence[Sequence[int]]


class Reader:
    """An experiment as it was when it was opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prepared = Prepared(folder / "prepared")
        self.kind = prepared.kind
        self.splits = prepared.manifest.splits
        self.examples: pa.Table = prepared.table()
        self.runs = [path.name for path in view_sources.list_runs(folder)]
        extension = browse_table.make_extension(self.kind, self.runs)
        self._quick, self._slow = (
            _QueryProcess(lambda: Database(folder, extension, prepared), seconds)
            for seconds in (_QUICK_SECONDS, _SLOW_SECONDS)
        )
        self.tokens, self.questions = TokenReader(folder), Questioner(folder)
        self.images = ImageReader(prepared.images())
        self._find_table = lru_cache(256)(self._try_tables)
        self._counts = lru_cache(256)(self._count)

    def open(self) -> None:
        """Make the table of numbers, which takes a while if the experiment is large, so that pages do not wait for it."""
        self.tokens.open()
        self.bins  # noqa: B018  # cached

    def close(self) -> None:
        self._quick.close()
        self._slow.close()
        self.tokens.close()
        self.questions.close()

    @cached_property
    def catalog(self) -> Catalog:
        """What filters may name. Reading it opens the experiment, which takes a while if it is large."""
        numbers = self._quick
        columns = numbers.columns(f"select * from {NUMBERS} limit 0")
        sources = numbers.rows(Query(f"select distinct source from {NUMBERS} order by source", {}))
        taken = numbers.columns(f"select * from {browse_table.VIEWS[self.kind]} limit 0")
        runs = {column.run: column for column in browse_table.name_columns(self.kind, self.runs, taken)}
        structs = {column.name for column in runs.values()}
        fields = [f"{run}.{field}" for run in runs for field in browse_table.RUN_FIELDS[self.kind]]
        return Catalog(
            kind=self.kind,
            sources=[source for (source,) in sources],
            splits=self.splits,
            runs=runs,
            ranges={column.key: column for column in self._list_ranges(runs.values(), columns)},
            sortable=[*(name for name in columns if name not in structs), *fields],
        )

    @property
    def n_examples(self) -> int:
        return len(self.examples)

    def page(self, chosen: Filter, order: Order, columns: Sequence[str], page: int) -> list[Row]:
        """Return a page of rows, the first of which is page 1."""
        table = self._find_table(chosen)
        offset = (page - 1) * PAGE_ROWS
        query = queries.list_rows(chosen, self.catalog, table, columns, order, PAGE_ROWS, offset)
        rows = self._process(chosen).rows(query)
        texts = self.read_texts([position for position, *_ in rows])
        return [
            replace(text, values=dict(zip(columns, values, strict=True)))
            for text, (_, *values) in zip(texts, rows, strict=True)
        ]

    def read_texts(self, positions: Sequence[int]) -> list[Row]:
        """Return the examples at these positions. Only their own texts are read from the mapped files."""
        names = TEXTS[self.kind]
        examples = self.examples.select(["example_id", "source", "split", "images", *names])

        def read_row(position: int) -> Row:
            # A slice, since `take` would first join the chunks of each column, which for texts may be many gigabytes.
            (row,) = examples.slice(position, 1).to_pylist()
            texts = {name: row[name] or "" for name in names}
            images = self.images.list(row["images"])
            return Row(position, row["example_id"], row["source"], row["split"], texts, images, {})

        return [read_row(position) for position in positions]

    def may_take_long(self, chosen: Filter) -> bool:
        """Tell whether the filter searches all texts or has a condition of the reader's own."""
        return bool(chosen.text or chosen.where)

    def count(self, chosen: Filter) -> int:
        return self._count_once(chosen).n

    def find(self, example_id: str) -> int | None:
        """Return the position of an example; None if there is none of this id."""
        position = pc.index(self.examples["example_id"], example_id).as_py()
        return None if position < 0 else int(position)

    def ask(self, query: Query) -> list[tuple[Any, ...]]:
        """Answer a query that reads numbers, of examples or of the runs' visits."""
        return self._quick.rows(query)

    def histograms(self, chosen: Filter) -> list[Histogram]:
        """Return the histograms that have values: those of the data, then the rewards of the first runs."""
        counts = (self._count_once(each).bins for each in (Filter(), chosen))
        return [Histogram(*each) for each in zip(self.bins, *counts, strict=True)]

    def list_ids(self, chosen: Filter) -> pa.ChunkedArray:
        """Return the example_id of every row under the filter, in the order of the data."""
        table = self._find_table(chosen)
        is_chosen = np.zeros(self.n_examples, bool)
        is_chosen[self._process(chosen).column(queries.list_positions(chosen, self.catalog, table)).to_numpy()] = True
        return self.examples["example_id"].filter(pa.array(is_chosen))

    def list_known(self, ids: Sequence[str]) -> pa.ChunkedArray:
        """Return those of `ids` that are examples, in the order of the data; UsageError if one is not."""
        column = self.examples["example_id"]
        known = column.filter(pc.is_in(column, pa.array(ids, pa.string())))
        if unknown := set(ids) - set(known.to_pylist()):
            raise UsageError(
                f"There is no example {min(unknown)!r} in {self.folder}. Choose one from the list of its examples."
            )
        return known

    def list_other_ids(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return the training examples that are not among `ids`."""
        table = self.examples.select(["example_id", "split"])
        is_other = pc.and_(
            pc.equal(table["split"], TRAIN), pc.invert(pc.is_in(table["example_id"], ids.combine_chunks()))
        )
        return table["example_id"].filter(is_other)

    def _list_ranges(self, runs: Iterable[RunColumn], columns: Sequence[str]) -> Iterator[RangeColumn]:
        absent = {"score_gap"} if not self._has_grades else set[str]()
        absent |= {"n_images"} if not len(self.images.stored) else set()
        for key, (title, column) in _RANGES[self.kind].items():
            if key not in absent and column in columns:
                yield RangeColumn(key, title, column, is_whole=column.startswith(("n_", "length_")))
        for run in runs:
            yield RangeColumn(
                f"reward.{run.run}", f"reward {'margin ' if self.kind == 'pairs' else ''}of {run.run}", run.reward
            )

    @property
    def _has_grades(self) -> bool:
        names = [column for column in self.examples.column_names if column.endswith("_score")]
        return any(self.examples[name].null_count < len(self.examples) for name in names)

    def _count_once(self, chosen: Filter) -> Counts:
        """A page asks for the count and for the histograms at the same time: the second waits for what the first computes."""
        with self._process(chosen).counting:
            return self._counts(chosen)

    def _count(self, chosen: Filter) -> Counts:
        table = self._find_table(chosen)
        n_rows, counts = 0, [[0] * bins.n for bins in self.bins]
        for n, at, n_in_bin in self._process(chosen).rows(queries.count_bins(chosen, self.catalog, table, self.bins)):
            if n < 0:
                n_rows = n_in_bin
            else:
                counts[n][at] = n_in_bin
        return Counts(n_rows, counts)

    def _try_tables(self, chosen: Filter) -> str:
        """Find the first table that has the columns of the filter's own condition; the last one's error if none has."""
        *candidates, last = queries.tables_for(chosen)
        for table in candidates:
            with contextlib.suppress(UsageError):
                self._bind(chosen, table)
                return table
        self._bind(chosen, last)
        return last

    def _bind(self, chosen: Filter, table: str) -> None:
        """Let DuckDB check the query without computing anything."""
        self._process(chosen).rows(queries.list_rows(chosen, self.catalog, table, [], Order(), 0, 0))

    def _process(self, chosen: Filter) -> "_QueryProcess":
        return self._slow if self.may_take_long(chosen) else self._quick

    @cached_property
    def bins(self) -> list[Bins]:
        """The bins of every histogram that has values, the same under any filter."""
        runs = [f"reward.{run}" for run in self.runs[:MOST_RUN_HISTOGRAMS]]
        columns = [self.catalog.ranges[key] for key in (*_HISTOGRAMS[self.kind], *runs) if key in self.catalog.ranges]
        edges = self._quick.rows(queries.find_edges(columns))
        return [queries.make_bins(columns[n], *ends) for n, ends in edges if ends and ends[0] is not None]


class _QueryProcess:
    """A process with the experiment's tables, asked one query at a time."""

    def __init__(self, database: Callable[[], query_worker.Database], seconds: float) -> None:
        self._worker, self._lock = query_worker.Worker(database), threading.Lock()
        self.counting = threading.Lock()
        advice = "Filter by numbers instead of texts, or simplify the condition."
        self._bounds = query_worker.Bounds("The query", seconds, advice, advice)

    def rows(self, query: Query) -> list[tuple[Any, ...]]:
        with self._ask(query) as answer:
            return list(answer.rows())

    def column(self, query: Query) -> pa.ChunkedArray:
        """Return the first column of the answer."""
        with self._ask(query) as answer:
            columns = answer.arrow()
            return pa.Table.from_batches(list(answer.batches(columns)), columns.schema).column(0)

    def columns(self, sql: str) -> list[str]:
        with self._ask(Query(sql, {})) as answer:
            list(answer.rows())
            return answer.columns

    def close(self) -> None:
        with self._lock:
            self._worker.close()

    @contextlib.contextmanager
    def _ask(self, query: Query) -> Iterator[query_worker.Answer]:
        with self._lock, self._worker.ask(query.sql, query.parameters or None, self._bounds) as answer:
            yield answer
