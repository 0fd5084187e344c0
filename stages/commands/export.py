"""export: the user's rows as they came, with the reference's log-probs next to them."""

from collections import Counter
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.command_results import ExportResult
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import record_outcomes
from prefcache.pipeline.preparing.formats import get_format
from prefcache.pipeline.preparing.record_outcomes import Batch, Outcomes
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import CACHE, HELD_OUT, OK, TRAIN
from prefcache.pipeline.stored import duckdb_connection, overwrite_guard, row_writers
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.counted_logps import find_counted_sums
from prefcache.pipeline.stored.prepared import CountedTokens, Prepared
from prefcache.pipeline.stored.scored import require_scored

STATUS = "prefcache_status"
SPLIT = "prefcache_split"
_LEFT_OUT = "left out: a duplicate, or by the weight of its source"


def run(
    config: Config, output: Path, per_token: bool, progress: Progress, force: bool = False, path: str | None = None
) -> ExportResult:
    """Write the rows of the config's data; `path` is the config's file, which is never overwritten."""
    kind = row_writers.file_kind(output)
    check_output(config, output, force, path)
    prepared = Prepared(config.prepared)
    sources = record_outcomes.reopen_sources(config, prepared)
    # Token lists are read by DuckDB, which checks no checksums.
    scored, cache = require_scored(config, prepared, every_byte=per_token)
    if per_token:
        cache.fetch_shards()
        cache.refuse_damage()
    columns = _AddedColumns(prepared, per_token)
    values = _Values(columns, cache, scored.accepted_numerics)
    if columns.n_partial:
        progress.say(
            f"export: {columns.n_partial:,} answers have tokens that do not count (prepare.train_on). "
            f"{', '.join(answer.sum for answer in columns.answers)} are of whole answers, as TRL adds them up; "
            f"{', '.join(answer.counted_sum for answer in columns.answers)} are of the tokens that count, and empty where the cache "
            "keeps sums only"
        )
    expander = _Expander(Outcomes(prepared, columns.examples), values)
    # JSON Lines alone needs no columns that are the same in every row.
    n_records = prepared.manifest.records
    batches = record_outcomes.count_records(record_outcomes.read_batches(sources), "find the columns", n_records)
    types = {} if kind == ".jsonl" else record_outcomes.common_types(batches)
    _refuse_taken(types, columns.schema)
    batches = record_outcomes.read_batches(sources)
    with progress.count("export", n_records, "records") as counter:
        if kind in row_writers.BY_COLUMNS:
            schema = pa.schema([*((name, dtype or pa.string()) for name, dtype in types.items()), *columns.schema])
            with row_writers.open_columns(output, schema) as file:
                for batch in batches:
                    rows = expander.expand(batch)
                    own = batch.as_table(types).take(pa.array([row.record for row in rows], pa.int64()))
                    added = values.take(rows)
                    file.write_table(pa.Table.from_arrays([*own.columns, *added.columns], schema=schema))
                    counter.add(len(batch.lines))
        else:
            with row_writers.open_rows(output, [*types, *columns.schema.names]) as lines:
                for batch in batches:
                    rows = expander.expand(batch)
                    _refuse_taken(batch.names, columns.schema)
                    pairs = zip(rows, values.take(rows).to_pylist(), strict=True)
                    lines.write([batch.dicts[row.record] | added for row, added in pairs])
                    counter.add(len(batch.lines))
    return ExportResult(
        output=output,
        cache=cache.place,
        rows=expander.statuses.total(),
        scored=expander.statuses[OK],
        without={status: n for status, n in sorted(expander.statuses.items()) if status != OK},
        columns=columns.schema.names,
    )


def check_output(config: Config, output: Path, force: bool, path: str | None = None) -> None:
    """Refuse an unsupported kind of file, or a place that must not be written, before any work goes into it."""
    row_writers.file_kind(output)
    overwrite_guard.refuse_overwrite(output, overwrite_guard.Inputs.from_config(config, path), force=force)


def check_data(config: Config, per_token: bool) -> None:
    """Refuse data with a column of the same name as an added one, before anything is scored."""
    prepared = Prepared(config.prepared)
    schema = _AddedColumns(prepared, per_token).schema
    for source in record_outcomes.reopen_sources(config, prepared):
        for batch in islice(record_outcomes.read_batches([source]), 1):
            _refuse_taken(batch.names, schema)


def _refuse_taken(names: Container[str], schema: pa.Schema) -> None:
    if taken := [column for column in schema.names if column in names]:
        raise UsageError(f"The data already has columns of these names: {', '.join(taken)}. Drop or rename them first.")


# -- columns ---------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """An answer of an example, and the columns of its values.

    The sums have the names of TRL's own, and like those they are of whole answers. TRL 1.16 does not read them from a data set: see
    export_trl.py. Where some tokens do not count, two more columns have the sum and the number of those that do.
    """

    name: str
    sum: str
    token_logps: str
    n_tokens: str

    @property
    def counted_sum(self) -> str:
        return self.sum.replace("_logps", "_counted_logps")

    @property
    def n_counted(self) -> str:
        return self.n_tokens.replace("_tokens", "_counted_tokens")


_ANSWERS = {
    "pairs": (
        _Answer("chosen", "ref_chosen_logps", "ref_chosen_token_logps", "n_chosen_tokens"),
        _Answer("rejected", "ref_rejected_logps", "ref_rejected_token_logps", "n_rejected_tokens"),
    ),
    "labels": (
        _Answer("completion", "ref_logps", "ref_token_logps", "n_completion_tokens"),
        _Answer("kl", "ref_KL_logps", "ref_KL_token_logps", "n_KL_tokens"),
    ),
}
# What tells which answers of a record an example was made from.
_TOLD_BY = {"pairs": ("chosen", "rejected"), "labels": ("completion", "label")}
_NUMBER = {"pairs": "prefcache_pair", "labels": "prefcache_answer"}


class _AddedColumns:
    """The columns that are added to the data's own."""

    def __init__(self, prepared: Prepared, per_token: bool) -> None:
        kind, self.examples, self.per_token = prepared.kind, prepared.table(), per_token
        # Mismatched answers have log-probs only where prepare has made some.
        self.has_kl = kind == "labels" and self.examples["kl_key"].null_count < len(self.examples)
        self.answers = [answer for answer in _ANSWERS[kind] if answer.name != "kl" or self.has_kl]
        self.is_numbered = bool(prepared.manifest.further)  # a record may have become several rows
        formats = [get_format(entry.format) for entry in prepared.manifest.formats]
        is_told = all(set(_TOLD_BY[kind]) <= {*each.columns, *each.optional} for each in formats)
        self.repeated = () if is_told and not self.is_numbered else _TOLD_BY[kind]
        self.counted = [CountedTokens(self.examples, answer.name) for answer in self.answers]
        self.n_partial = sum(int(each.is_partial.sum()) for each in self.counted)
        self.counts = {"n_prompt_tokens": "n_prompt"} | {a.n_tokens: f"n_{a.name}" for a in self.answers}
        fields = [(answer.sum, pa.float64()) for answer in self.answers]
        if self.n_partial:
            fields += [(answer.counted_sum, pa.float64()) for answer in self.answers]
            self.counts |= {answer.n_counted: f"n_{answer.name}_counted" for answer in self.answers}
        fields += [(name, pa.int32()) for name in self.counts]
        if self.has_kl:
            # The mismatched answer that prepare chose: TRL would choose another one.
            fields.append(("KL_completion_ids", pa.list_(pa.int32())))
        if per_token:
            fields += [(answer.token_logps, pa.list_(pa.float32())) for answer in self.answers]
        # Records of several sets: whoever trains on the rows must be able to leave out those for evaluation.
        self.has_sets = bool(set(prepared.manifest.splits) - {TRAIN, HELD_OUT})
        fields += [(SPLIT, pa.string())] if self.has_sets else []
        fields += [(f"prefcache_{name}", self.examples.schema.field(name).type) for name in self.repeated]
        fields += [(_NUMBER[kind], pa.int32())] if self.is_numbered else []
        self.schema = pa.schema([*fields, (STATUS, pa.string())])


class Row(NamedTuple):
    """A row to be written."""

    record: int  # its place in the batch
    example: int | None  # the row of the prepared examples whose values it gets
    number: int | None  # which of several of one record
    status: str


class _Values:
    """The values of the added columns."""

    def __init__(self, columns: _AddedColumns, cache: Cache, accepted: Sequence[str]) -> None:
        self._columns, examples = columns, columns.examples
        keys = [examples[f"{answer.name}_key"] for answer in columns.answers]
        sums = cache.logps(keys, accepted)
        counted = find_counted_sums(cache, keys, columns.counted, sums, accepted)[0] if columns.n_partial else []
        self._sums = [pa.array(np.ma.getdata(each), mask=np.ma.getmaskarray(each)) for each in (*sums, *counted)]
        self._failed = [
            np.ma.getmaskarray(sums_B) & key.is_valid().to_numpy() for sums_B, key in zip(sums, keys, strict=True)
        ]
        self._counts = [examples[name].combine_chunks() for name in columns.counts.values()]
        names = tuple(answer.name for answer in columns.answers)
        self._token_lists = _TokenLists(examples, cache, accepted, names) if columns.per_token else None

    def take(self, rows: Sequence[Row]) -> pa.Table:
        examples = self._columns.examples
        at = pa.array([row.example for row in rows], pa.int64())
        arrays = [column.take(at) for column in (*self._sums, *self._counts)]
        if self._columns.has_kl:
            arrays.append(_take_nearby(examples["kl_ids"], at))
        if self._token_lists:
            arrays += self._token_lists.take(rows)
        arrays += [_take_nearby(examples["split"], at)] if self._columns.has_sets else []
        arrays += [_take_nearby(examples[name], at) for name in self._columns.repeated]
        arrays += [pa.array([row.number for row in rows], pa.int32())] if self._columns.is_numbered else []
        statuses = pa.array([row.status for row in rows], pa.string())
        return pa.Table.from_arrays([*arrays, statuses], schema=self._columns.schema)

    def status(self, example: int) -> str:
        """Return ok, or which answer has no log-prob."""
        for answer, failed in zip(self._columns.answers, self._failed, strict=True):
            if failed[example]:
                return f"failed: no finite log-prob of the {answer.name} answer"
        return OK


def _take_nearby(column: pa.ChunkedArray, at: pa.Array) -> Any:
    """Take rows that lie close together, without reading the rest of the column."""
    if at.null_count == len(at):
        return pa.nulls(len(at), column.type)
    first, last = pc.min(at).as_py(), pc.max(at).as_py()
    return column.slice(first, last - first + 1).combine_chunks().take(pc.subtract(at, first))


# The row whose sum is served: see Cache.logps.
_USABLE = """
create temp table usable as
select key, logps from cached
where (status = $ok or starts_with(status, $ok || ':')) and list_contains($accepted, numerics_id)
    and key in (select unnest([{keys}]) from wanted)
qualify row_number() over (partition by key order by list_position($accepted, numerics_id), logp_sum, logps is null) = 1
"""


class _TokenLists:
    """Every token's log-prob, in a DuckDB table that spills to the disk if it is too large for memory."""

    def __init__(self, examples: pa.Table, cache: Cache, accepted: Sequence[str], answers: Sequence[str]) -> None:
        self._answers = answers
        order = np.lexsort((examples["line"].to_numpy(), record_outcomes.dictionary_codes(examples["source"])[0]))
        self._place = np.empty(len(order), np.int64)
        self._place[order] = np.arange(len(order))
        wanted = pa.table({"place": self._place, **{f"{answer}_key": examples[f"{answer}_key"] for answer in answers}})
        self._con = self._join(wanted, cache, accepted)
        ((n,),) = self._con.execute("select count(*) from usable where logps is null").fetchall()
        if n:
            raise UsageError(
                f"The cache keeps only the sums of {n:,} sequences (score.logps=false, or imported). Leave --per-token out, or "
                "score them into another place (--set cache=FOLDER)."
            )

    def _join(self, wanted: pa.Table, cache: Cache, accepted: Sequence[str]) -> duckdb.DuckDBPyConnection:
        con = duckdb_connection.connect()
        duckdb_connection.define(con, "cached", cache.shards, CACHE)
        con.register("wanted", wanted)
        keys = ", ".join(f"{answer}_key" for answer in self._answers)
        try:
            con.execute(_USABLE.format(keys=keys), {"accepted": list(accepted), "ok": OK})
        except duckdb.Error:
            if not duckdb_connection.find_missing(cache.shards):
                raise
            # gc has merged shards since the cache was opened; their replacements have the same rows.
            cache = cache.reopen()
            cache.refuse_damage()
            return self._join(wanted, cache, accepted)
        lists = ", ".join(f"{answer}.logps as {answer}" for answer in self._answers)
        joins = " ".join(f"left join usable as {answer} on {answer}.key = {answer}_key" for answer in self._answers)
        con.execute(f"create temp table lists as select place, {lists} from wanted {joins} order by place")
        return con

    def take(self, rows: Sequence[Row]) -> list[pa.ChunkedArray]:
        places = np.array([-1 if row.example is None else int(self._place[row.example]) for row in rows])
        known = places[places >= 0]
        bounds = {"low": int(known.min()), "high": int(known.max())} if len(known) else {"low": -1, "high": -1}
        between = "select * from lists where place between $low and $high order by place"
        lists = self._con.sql(between, params=bounds).to_arrow_table()
        at = pa.array(np.searchsorted(lists["place"].to_numpy(), places), mask=places < 0)
        return [lists[answer].take(at).cast(pa.list_(pa.float32())) for answer in self._answers]


class _Expander:
    """Expands a batch into rows: one for each example, one for each reason why there is none."""

    def __init__(self, outcomes: Outcomes, values: _Values) -> None:
        self._outcomes, self._values = outcomes, values
        self.statuses: Counter[str] = Counter()

    def expand(self, batch: Batch) -> list[Row]:
        rows: list[Row] = []
        for record, outcome in enumerate(self._outcomes.find(batch.lines)):
            has_several = len(outcome.examples) + len(outcome.reasons) > 1
            for number, example in enumerate(outcome.examples, 1):
                rows.append(Row(record, example, number if has_several else None, self._values.status(example)))
            reasons = outcome.reasons or ([] if outcome.examples else [_LEFT_OUT])
            rows += [Row(record, None, None, reason) for reason in reasons]
        self.statuses.update(row.status if row.status == OK else row.status.partition(": ")[0] for row in rows)
        return rows
