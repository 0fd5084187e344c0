"""SQL over prepared data, reference scores and runs, in a DuckDB that can read nothing else.

One view per .sql file here; its first comment is its help. To add a view, add a file. What views are made from is in the schema
`stored`, which queries do not see.
"""

import contextlib
import functools
import json
import re
import resource
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError, ResourceError, UsageError
from pipeline.schema import CACHE, EVENTS, IDS, METRICS, PREPARED, QUARANTINE, STEPS, THROUGHPUT
from pipeline.stored import duck
from pipeline.stored.cache import Cache
from pipeline.views import advice
from pipeline.views.statement import Statement

MEMORY_LIMIT = "3GB"
_BESIDE = 1 << 30  # bytes that DuckDB and Python may take and not count
# What is known of each run: the folder of its parts, what makes rewards of log-probs, and what a person asks about it.
RUNS = pa.schema(
    [
        ("folder", pa.string()),
        ("run", pa.string()),
        ("finished", pa.bool_()),
        ("loss", pa.string()),
        ("beta", pa.float64()),
        ("per_token", pa.bool_()),
        ("learning_rate", pa.float64()),
        ("batch_size", pa.int64()),
        ("epochs", pa.float64()),
        ("seed", pa.int64()),
        ("policy", pa.string()),  # what it started from
        ("model_id", pa.string()),  # of the reference, as in the view reference
        ("precision", pa.string()),
        ("device", pa.string()),
        ("processes", pa.int64()),
        ("examples", pa.int64()),  # these four when it is finished
        ("held_out", pa.int64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("settings", pa.string()),  # those of `train` that shape it, as JSON
    ]
)
CHECKPOINTS = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("num_tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("folder", pa.string()),
    ]
)
_CACHES = pa.schema([("folder", pa.string()), ("reference", pa.string()), ("model_id", pa.string())])
_NUMERICS = pa.schema(
    [
        ("model_id", pa.string()),
        ("numerics_id", pa.string()),
        ("engine", pa.string()),
        ("dtype", pa.string()),
        ("numerics", pa.string()),
        ("used", pa.bool_()),
    ]
)
_SHORT = 12  # characters of a model_id, as in the names of caches


@dataclass(frozen=True)
class Reference:
    """A cache, every byte of it verified, and the numerics whose rows count, in the order in which they do."""

    cache: Cache
    accepted: Sequence[str]
    used: bool = True  # whether it is the one that this experiment was scored by

    @property
    def name(self) -> str:
        return str(self.cache.reference["name"])

    @property
    def model_id(self) -> str:
        return short_id(self.cache.reference["model_id"])


@dataclass(frozen=True)
class Sources:
    """Verified files and tables, from which the views are made. What a query does not read can be left out."""

    prepared: pa.Table = field(default_factory=PREPARED["pairs"].empty_table)
    quarantine: Sequence[str] = ()
    references: Sequence[Reference] = ()
    runs: pa.Table = field(default_factory=RUNS.empty_table)
    checkpoints: pa.Table = field(default_factory=CHECKPOINTS.empty_table)
    steps: Sequence[str] = ()  # Parquet parts in RUN/steps/
    metrics: Sequence[str] = ()
    events: Sequence[str] = ()
    throughput: Sequence[str] = ()

    @property
    def cached(self) -> list[str]:
        return [shard for reference in self.references for shard in reference.cache.shards]

    @property
    def files(self) -> list[str]:
        return [*self.cached, *self.quarantine, *self.steps, *self.metrics, *self.events, *self.throughput]


class Result:
    """The answer to a query, read as far as it is wanted."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        statement: Statement,
        parameters: Mapping[str, Any] | None,
        files: Sequence[str],
    ) -> None:
        self._con, self._statement, self._parameters, self._files = con, statement, parameters, files
        self._cursor = con.execute(statement.sql, parameters)
        self.columns = [column[0] for column in self._cursor.description or []]
        self.n_rows = 0  # that were read

    def rows(self) -> Iterator[tuple[Any, ...]]:
        # Answers stream: an error may come with the last block.
        try:
            while block := self._cursor.fetchmany(1024):
                self.n_rows += len(block)
                yield from block
        except (duckdb.Error, RuntimeError) as error:
            raise _translated(error, self._files) from None

    def arrow(self) -> pa.RecordBatchReader:
        """The answer by columns, instead of rows()."""
        with warnings.catch_warnings():
            # That each batch is copied, which is little beside writing it.
            warnings.simplefilter("ignore", UserWarning)
            return self._cursor.to_arrow_reader()

    def batches(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            for batch in reader:
                self.n_rows += len(batch)
                yield batch
        except (duckdb.Error, pa.ArrowException, RuntimeError, OSError) as error:
            raise _translated(error, self._files) from None

    def why_empty(self) -> list[str]:
        """When all is read, and there was nothing: which condition left no row."""
        return [] if self.n_rows else advice.why_empty(self._con, self._statement, self._parameters)


def short_id(model_id: str) -> str:
    return model_id[:_SHORT]


# -- the database ----------------------------------------------------------------------------------------------------


def connect(sources: Sources) -> duckdb.DuckDBPyConnection:
    con = duck.connect()
    con.execute("set python_enable_replacements = false")
    con.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
    con.execute("set allowed_paths = $paths", {"paths": sources.files})
    con.execute("create schema stored")
    con.execute("set schema = 'stored'")
    try:
        _store(con, sources)
        con.execute("set schema = 'main'")
        _create_views(con)
    except duckdb.IOException as error:
        raise _translated(error, sources.files) from None
    duck.lock(con)
    return con


def _store(con: duckdb.DuckDBPyConnection, sources: Sources) -> None:
    """What the views read, in the schema that is set. Each is opened, and none is read."""
    _store_prepared(con, sources)
    caches = [
        {"folder": str(each.cache.folder), "reference": each.name, "model_id": each.model_id}
        for each in sources.references
    ]
    numerics = [row for each in sources.references for row in _numerics(each)]
    duck.register(con, "caches", pa.Table.from_pylist(caches, schema=_CACHES))
    duck.register(con, "numerics", pa.Table.from_pylist(numerics, schema=_NUMERICS))
    duck.register(con, "runs", sources.runs)
    duck.register(con, "checkpoints", sources.checkpoints)
    duck.define(con, "cached", sources.cached, CACHE)
    duck.define(con, "quarantine", sources.quarantine, QUARANTINE)
    duck.define(con, "visits", sources.steps, STEPS)
    duck.define(con, "metrics", sources.metrics, METRICS)
    duck.define(con, "events", sources.events, EVENTS)
    duck.define(con, "timed", sources.throughput, THROUGHPUT)


def _store_prepared(con: duckdb.DuckDBPyConnection, sources: Sources) -> None:
    """Examples; and pairs with what each reference says of them, so that no query has to join keys."""
    examples = _without_ids(sources.prepared)
    duck.register(con, "examples", examples)
    # Pairs have the columns of labels and the other way round, empty, so that one view serves both.
    every = [_without_ids(schema.empty_table()).schema for schema in PREPARED.values()]
    duck.register(con, "prepared_columns", pa.unify_schemas(every).empty_table())
    con.execute("create view prepared as select * from prepared_columns union all by name select * from examples")
    pairs = examples if "chosen_key" in examples.column_names else PREPARED["pairs"].empty_table()
    duck.register(con, "scored_columns", pa.schema([*_without_ids(pairs).schema, *_SCORES]).empty_table())
    branches = ["select * from scored_columns"]
    for reference in sources.references:
        table = f"scored_by_{len(branches)}"
        duck.register(con, table, _scored(_without_ids(pairs), reference))
        said = f"{duck.literal(reference.name)} as reference, {duck.literal(reference.model_id)} as model_id"
        known = "true" if reference.used else "(ref_chosen_logp is not null or ref_rejected_logp is not null)"
        branches.append(f"select {said}, {reference.used} as used, * from {table} where {known}")
    if not any(reference.used for reference in sources.references):
        # Before they are scored, pairs have no margin, and are there.
        branches.append("select true as used, * from prepared where chosen_key is not null")
    con.execute(f"create view scored as {' union all by name '.join(branches)}")


_SCORES = [
    *(("reference", pa.string()), ("model_id", pa.string()), ("used", pa.bool_())),
    *(("ref_chosen_logp", pa.float64()), ("ref_rejected_logp", pa.float64())),
]


def _scored(pairs: pa.Table, reference: Reference) -> pa.Table:
    """The pairs beside the values that training reads."""
    sums = reference.cache.logps([pairs["chosen_key"], pairs["rejected_key"]], reference.accepted)
    for name, values in zip(("ref_chosen_logp", "ref_rejected_logp"), sums, strict=True):
        pairs = pairs.append_column(name, pa.array(values.filled(np.nan), from_pandas=True))
    return pairs


def _without_ids(table: pa.Table) -> pa.Table:
    return table.select([each.name for each in table.schema if each.type != IDS])


def _numerics(reference: Reference) -> Iterator[dict[str, Any]]:
    for numerics_id, record in reference.cache.numerics().items():
        yield {
            "model_id": reference.model_id,
            "numerics_id": numerics_id,
            "engine": record.get("engine"),
            "dtype": record.get("dtype"),
            "numerics": json.dumps(record, sort_keys=True),
            "used": reference.used and numerics_id in reference.accepted,
        }


def _create_views(con: duckdb.DuckDBPyConnection) -> None:
    """A view may read another: one whose turn has not come waits for the next round."""
    waiting = dict(_selects())
    while waiting:
        before = len(waiting)
        for name, select in list(waiting.items()):
            try:
                con.execute(f"create view {name} as {select}")
                del waiting[name]
            except duckdb.CatalogException:
                if before == len(waiting) and name == list(waiting)[-1]:
                    raise


# -- questions -------------------------------------------------------------------------------------------------------


def ask(
    con: duckdb.DuckDBPyConnection, query: str, files: Sequence[str] = (), parameters: Mapping[str, Any] | None = None
) -> Result:
    """One SELECT, or an error that names what would have been right. `files`: those behind the views."""
    statement = Statement(con, query, names())
    try:
        return Result(con, statement, parameters, files)
    except (duckdb.Error, RuntimeError) as error:
        if isinstance(error, duckdb.BinderException):
            known = {name: [column for column, _ in columns] for name, columns in _columns(con)}
            if said := advice.missing_column(str(error), statement, known):
                raise UsageError(said) from None
        raise _translated(error, files) from None


def behind(query: str) -> set[str]:
    """Tables of the schema `stored` that a query reads; UsageError where it is no SELECT over the views."""
    waiting, found = list(Statement(duckdb.connect(), query, names()).views), set[str]()
    while waiting:
        select = dict(_selects())[waiting.pop()]
        found |= set(re.findall(r"\bstored\.(\w+)", select))
        waiting += [name for name in names() if re.search(rf"(?<!\.)\b(from|join) {name}\b", select)]
    return found


def _translated(error: Exception, files: Sequence[str]) -> BaseException:
    """DuckDB's error as ours."""
    text = str(error).strip()
    if isinstance(error, duckdb.Error) and (gone := duck.missing(files)):
        return IntegrityError(
            f"{gone[0]} is gone: its shards were merged (prefcache gc), or it was removed, while the query was being answered. "
            "Ask again."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return _too_large()
    if isinstance(error, duckdb.InterruptException):
        return KeyboardInterrupt()
    if isinstance(error, duckdb.Error):
        return UsageError(f"{text}\nViews: {', '.join(names())}.")
    return KeyboardInterrupt() if "interrupted" in text else error


def _too_large() -> ResourceError:
    return ResourceError(f"The query needs more than {MEMORY_LIMIT} of memory. Ask for fewer rows or columns at once.")


@contextlib.contextmanager
def limited(con: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """A query within it, and the reading of its answer, end after so many seconds and beyond the limit of memory."""
    done, expired = threading.Event(), threading.Event()

    def interrupt() -> None:
        if not done.wait(seconds):
            expired.set()
            # Again and again: nothing may run at this very moment.
            while not done.wait(0.05):
                con.interrupt()

    watch = threading.Thread(target=interrupt, daemon=True)
    watch.start()
    try:
        with _limited_memory():
            yield
    except KeyboardInterrupt:
        if not expired.is_set():
            raise
        raise ResourceError(
            f"The query took more than {seconds:g} s and was ended. Ask for less, or give it more time (--timeout)."
        ) from None
    except MemoryError:
        raise _too_large() from None
    finally:
        done.set()
        watch.join()


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """DuckDB does not count every byte: one function may make gigabytes of text. The system does. Mapped files are not counted."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + int(MEMORY_LIMIT.removesuffix("GB")) * 10**9 + _BESIDE
    soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


# -- what there is ---------------------------------------------------------------------------------------------------


def describe(sources: Sources | None = None) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Name, help and columns of every view, each column with its type."""
    for name, columns in _columns(connect(sources or Sources())):
        yield name, _help(name), columns


def _columns(con: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for name in names():
        columns = con.execute(f"select * from {name} limit 0").description or []
        yield name, [(column[0], str(column[1])) for column in columns]


def names() -> list[str]:
    return [name for name, _ in _selects()]


def _help(name: str) -> str:
    """The first comment of a view's file."""
    return dict(_selects())[name].partition("\n")[0].removeprefix("--").strip()


@functools.cache
def _selects() -> tuple[tuple[str, str], ...]:
    files = sorted(Path(__file__).parent.glob("*.sql"))
    return tuple((file.stem, file.read_text(encoding="utf-8")) for file in files)
