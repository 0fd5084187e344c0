"""Open an experiment's views: verified sources in, a locked DuckDB out.

What the views read is in the schema `stored`, which queries do not see.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.schema import (
    ANSWERS,
    CACHE,
    EVENTS,
    IMAGES,
    METRICS,
    PREPARED,
    QUARANTINE,
    STEPS,
    THROUGHPUT,
    TOKENS,
)
from prefcache.pipeline.stored import duckdb_connection
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.counted_logps import find_counted_sums
from prefcache.pipeline.stored.prepared import CountedTokens, drop_ids
from prefcache.pipeline.views.view_files import VIEWS, Extension, sort_for_creation

MEMORY_LIMIT = "3GB"
# Facts about each run: its folder, what turns log-probs into rewards, and what people ask about.
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
        ("policy", pa.string()),  # the model it started from
        ("model_id", pa.string()),  # of the reference, as in the view reference
        ("precision", pa.string()),
        ("device", pa.string()),
        ("processes", pa.int64()),
        ("examples", pa.int64()),  # this and the next three: of a finished run
        ("held_out", pa.int64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("settings", pa.string()),  # of `train`, as JSON
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
# Sums over the tokens that count, and over whole answers.
_SUMS = tuple(f"ref_{answer}_logp{which}" for which in ("", "_all") for answer in ANSWERS["pairs"])
# Columns of the steps of earlier versions.
_FORMER_STEPS = [pa.field(name, pa.int32()) for name in ("n_chosen", "n_rejected", "n_completion")]
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
# What queries may use to show the beginning of a text, on one line.
_SHORTEN = r"""create macro shorten(text, most := 60) as
    if(length(text) > most, left(text, most) || '…', text).regexp_replace('\s+', ' ', 'g')"""
_SHORT_ID = 12  # characters of a model_id, as in the names of caches


class BrokenDatabase(UsageError):
    """A query after which the database cannot answer another."""


@dataclass(frozen=True)
class Reference:
    """A cache, every byte of it verified, and the numerics whose rows count, the preferred ones first."""

    cache: Cache
    accepted: Sequence[str]
    used: bool = True  # whether this experiment was scored by it

    @property
    def name(self) -> str:
        return str(self.cache.reference.name)

    @property
    def model_id(self) -> str:
        return short_id(self.cache.reference.model_id)


@dataclass(frozen=True)
class Sources:
    """The verified files and tables behind the views. What a query does not read can be left out."""

    prepared: pa.Table = field(default_factory=PREPARED["pairs"].empty_table)
    images: pa.Table = field(default_factory=IMAGES.empty_table)
    quarantine: Sequence[str] = ()
    references: Sequence[Reference] = ()
    shards: Sequence[str] = ()  # of all references, for the table of all their rows
    runs: pa.Table = field(default_factory=RUNS.empty_table)
    checkpoints: pa.Table = field(default_factory=CHECKPOINTS.empty_table)
    steps: Sequence[str] = ()  # Parquet parts in RUN/steps/
    metrics: Sequence[str] = ()
    events: Sequence[str] = ()
    throughput: Sequence[str] = ()
    tokens: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        return [
            *self.shards,
            *self.quarantine,
            *self.steps,
            *self.metrics,
            *self.events,
            *self.throughput,
            *self.tokens,
        ]


def short_id(model_id: str) -> str:
    return model_id[:_SHORT_ID]


def connect(sources: Sources, extension: Extension | None = None) -> duckdb.DuckDBPyConnection:
    """Open the views over these sources, and the tables of an extension; nothing else can be read afterwards."""
    con = duckdb_connection.connect()
    con.execute("set python_enable_replacements = false")
    con.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
    con.execute("set allowed_paths = $paths", {"paths": sources.files})
    con.execute("create schema stored")
    con.execute("set schema = 'stored'")
    try:
        _store_prepared(con, sources.prepared, sources.images)
        _store_images(con, sources.images)
        _store_scored(con, sources)
        _store_caches(con, sources.references)
        duckdb_connection.register(con, "runs", sources.runs)
        duckdb_connection.register(con, "checkpoints", sources.checkpoints)
        duckdb_connection.define(con, "cached", sources.shards, CACHE)
        duckdb_connection.define(con, "quarantine", sources.quarantine, QUARANTINE)
        duckdb_connection.define(con, "visits", sources.steps, pa.schema([*STEPS, *_FORMER_STEPS]))
        duckdb_connection.define(con, "metrics", sources.metrics, METRICS)
        duckdb_connection.define(con, "events", sources.events, EVENTS)
        duckdb_connection.define(con, "timed", sources.throughput, THROUGHPUT)
        duckdb_connection.define(con, "tokens", sources.tokens, TOKENS)
        con.execute("set schema = 'main'")
        con.execute(_SHORTEN)
        for view in sort_for_creation():
            con.execute(f"create view {view.name} as {view.select}")
        if extension is not None:
            extension.create(con)
    except duckdb.IOException as error:
        raise translate_error(error, sources.files) from None
    duckdb_connection.lock(con)
    return con


def _store_prepared(con: duckdb.DuckDBPyConnection, examples: pa.Table, images: pa.Table) -> None:
    """Store the examples with the columns of both pairs and labels, so that one view serves both."""
    counted = pa.field("n_image_tokens", pa.int64())
    rows = _number_rows(examples).append_column(counted, _count_image_tokens(examples["images"], images))
    duckdb_connection.register(con, "examples", rows)
    columns = pa.unify_schemas([_number_rows(schema.empty_table()).schema for schema in PREPARED.values()])
    columns = columns.append(counted)
    duckdb_connection.register(con, "prepared_columns", columns.empty_table())
    con.execute("create view prepared as select * from prepared_columns union all by name select * from examples")


def _count_image_tokens(prompts: pa.ChunkedArray, images: pa.Table) -> pa.Array:
    """Count the tokens of each prompt that stand for images; NULL if an earlier version prepared them and did not say."""
    shown = pc.take(images["n_tokens"], pc.index_in(pc.list_flatten(prompts), images["image"]))
    counts = np.zeros(len(prompts))
    np.add.at(counts, pc.list_parent_indices(prompts).to_numpy(), shown.cast(pa.float64()).to_numpy())
    return pa.array(counts, from_pandas=True).cast(pa.int64())


def _store_images(con: duckdb.DuckDBPyConnection, images: pa.Table) -> None:
    """Store the facts of the pictures. Their bytes stay out of reach: `select *` would print them."""
    n_bytes = pc.binary_length(images["encoded"])
    duckdb_connection.register(con, "images", images.drop_columns("encoded").append_column("bytes", n_bytes))


def _store_scored(con: duckdb.DuckDBPyConnection, sources: Sources) -> None:
    """Store the pairs with the log-probs of each reference, so that no query has to join keys."""
    is_pairs = "chosen_key" in sources.prepared.column_names
    examples = sources.prepared if is_pairs else PREPARED["pairs"].empty_table()
    keys = [examples[f"{answer}_key"] for answer in ANSWERS["pairs"]]
    counted = [CountedTokens(examples, answer) for answer in ANSWERS["pairs"]]
    pairs = _number_rows(examples)
    columns = pa.schema(
        [
            *pairs.schema,
            *(("reference", pa.string()), ("model_id", pa.string()), ("used", pa.bool_())),
            *((name, pa.float64()) for name in _SUMS),
        ]
    )
    duckdb_connection.register(con, "scored_columns", columns.empty_table())
    branches = ["select * from scored_columns"]
    for n, reference in enumerate(sources.references, 1):
        # The values that training would read, then whole sums.
        whole = reference.cache.logps(keys, reference.accepted)
        sums, _ = find_counted_sums(reference.cache, keys, counted, whole, reference.accepted)
        scored = pairs
        for column, values in zip(_SUMS, [*sums, *whole], strict=True):
            scored = scored.append_column(column, pa.array(values.filled(np.nan), from_pandas=True))
        duckdb_connection.register(con, f"scored_by_{n}", scored)
        name, model_id = map(duckdb_connection.literal, (reference.name, reference.model_id))
        where = "true" if reference.used else "(ref_chosen_logp_all is not null or ref_rejected_logp_all is not null)"
        branches.append(
            f"select {name} as reference, {model_id} as model_id, {reference.used} as used, * from scored_by_{n} where {where}"
        )
    if not any(reference.used for reference in sources.references):
        # Before they are scored, pairs are listed without a margin.
        branches.append("select true as used, * from prepared where chosen_key is not null")
    con.execute(f"create view scored as {' union all by name '.join(branches)}")


def _number_rows(examples: pa.Table) -> pa.Table:
    """Leave out ids, and add each example's position in the prepared data."""
    return drop_ids(examples).append_column("position", pa.array(np.arange(len(examples))))


def _store_caches(con: duckdb.DuckDBPyConnection, references: Sequence[Reference]) -> None:
    caches = [
        {"folder": str(each.cache.folder), "reference": each.name, "model_id": each.model_id} for each in references
    ]
    numerics = [
        {
            "model_id": reference.model_id,
            "numerics_id": numerics_id,
            "engine": record.get("engine"),
            "dtype": record.get("dtype"),
            "numerics": json.dumps(record, sort_keys=True),
            "used": reference.used and numerics_id in reference.accepted,
        }
        for reference in references
        for numerics_id, record in reference.cache.numerics().items()
    ]
    duckdb_connection.register(con, "caches", pa.Table.from_pylist(caches, schema=_CACHES))
    duckdb_connection.register(con, "numerics", pa.Table.from_pylist(numerics, schema=_NUMERICS))


def translate_error(error: Exception, files: Sequence[str]) -> BaseException:
    """Turn an error of DuckDB into ours. `files` are those it read."""
    text = str(error).strip()
    if isinstance(error, duckdb.Error) and (gone := duckdb_connection.find_missing(files)):
        return IntegrityError(
            f"{gone[0]} was removed while the query read it: its shards were merged (prefcache gc), or someone deleted it. "
            "Run the query again."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return ResourceError(
            f"The query needs more than {MEMORY_LIMIT} of memory. Ask for fewer rows or columns at once."
        )
    if isinstance(error, duckdb.InterruptException):
        return KeyboardInterrupt()
    if isinstance(error, duckdb.FatalException | duckdb.InternalException):
        return BrokenDatabase(f"DuckDB failed on this query, which is a bug in DuckDB. Rephrase the query. ({text})")
    if isinstance(error, duckdb.Error):
        return UsageError(f"{text}\nViews: {', '.join(VIEWS)}.")
    return KeyboardInterrupt() if "interrupted" in text else error


def describe(sources: Sources | None = None) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield name, help and columns of every view, each column with its type."""
    for name, columns in describe_columns(connect(sources or Sources())):
        yield name, VIEWS[name].help, columns


def describe_columns(
    con: duckdb.DuckDBPyConnection, names: Iterable[str] = VIEWS
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for name in names:
        columns = con.execute(f"select * from {name} limit 0").description or []
        yield name, [(column[0], str(column[1])) for column in columns]
