"""export: the user's rows as they came, with the reference's log-probs beside them."""

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import pool
from pipeline.config import Config
from pipeline.errors import IdentityError, UsageError
from pipeline.preparing import records
from pipeline.preparing.formats import get_format
from pipeline.preparing.records import Batch, Outcome, Outcomes
from pipeline.progress import Progress
from pipeline.schema import CACHE, OK
from pipeline.stored import artifact, claims, duck, rowfiles
from pipeline.stored.cache import Cache, open_scored, refuse_other_reference, vouched_for
from pipeline.stored.prepared import Prepared

STATUS = "prefcache_status"
# Under TRL's names, which its collators read.
_SUMS = {
    "pairs": {"ref_chosen_logps": "chosen", "ref_rejected_logps": "rejected"},
    "labels": {"ref_logps": "completion", "ref_KL_logps": "kl"},
}
_TOKENS = {
    "pairs": {"ref_chosen_token_logps": "chosen", "ref_rejected_token_logps": "rejected"},
    "labels": {"ref_token_logps": "completion", "ref_KL_token_logps": "kl"},
}
_COUNTS = {
    "pairs": {"n_prompt_tokens": "n_prompt", "n_chosen_tokens": "n_chosen", "n_rejected_tokens": "n_rejected"},
    "labels": {"n_prompt_tokens": "n_prompt", "n_completion_tokens": "n_completion", "n_KL_tokens": "n_kl"},
}
# What of an example its record may not show: which answers were taken.
_SHOWN = {"pairs": ("chosen", "rejected"), "labels": ("completion", "label")}
_NUMBER = {"pairs": "prefcache_pair", "labels": "prefcache_answer"}
_LEFT_OUT = "left out: a duplicate, or by the weight of its source"
_KEPT_SECONDS = 7 * 24 * 3600.0


def run(config: Config, output: Path, per_token: bool, progress: Progress) -> dict[str, Any]:
    kind = rowfiles.kind_of(output)
    artifact.refuse_unwritable(output)
    prepared = Prepared(config.prepared)
    opened = records.reopen(config, prepared)
    _refuse_to_overwrite(output, [file for source in opened for file in source.files])
    scored, cache = _scored(config, prepared, per_token)
    with vouched_for(config.scored):
        values = Values(prepared, cache, scored["accepted_numerics"], per_token)
    rows = _Rows(prepared, values)
    # JSON Lines alone need no columns that are the same in every row.
    types = {} if kind == ".jsonl" else records.types_of(records.batches(opened))
    _refuse_taken(types, values.schema)
    batches = records.batches(opened)
    if kind in rowfiles.BY_COLUMNS:
        _write_columns(output, types, rows, batches, progress)
    else:
        _write_rows(output, [*types, *values.schema.names], rows, batches, progress)
    n_usable = rows.statuses[OK]
    return {
        "output": str(output),
        "cache": str(cache.folder),
        "rows": rows.statuses.total(),
        "scored": n_usable,
        "without": {status: n for status, n in sorted(rows.statuses.items()) if status != OK},
        "columns": values.schema.names,
    }


def check_output(output: Path) -> None:
    """That this is a kind of file that is written, in a place for it, before any work goes into it."""
    rowfiles.kind_of(output)
    artifact.refuse_unwritable(output)


def check_data(config: Config, output: Path, per_token: bool) -> None:
    """That nothing in the data is called as what will stand beside it, nor is the data the output, before anything is
    scored."""
    prepared = Prepared(config.prepared)
    schema = _schema(prepared, prepared.table(), per_token)
    opened = records.reopen(config, prepared)
    _refuse_to_overwrite(output, [file for source in opened for file in source.files])
    for source in opened:
        for batch in islice(records.batches([source]), 1):
            _refuse_taken(batch.names, schema)


def _refuse_to_overwrite(output: Path, files: list[Path]) -> None:
    if any(output.exists() and output.samefile(file) for file in files):
        raise UsageError(f"{output} is the data itself. Name another file for the output.")


def _scored(config: Config, prepared: Prepared, per_token: bool) -> tuple[dict[str, Any], Cache]:
    # Token lists are read by DuckDB, which trusts what it reads.
    found = open_scored(config.scored, every_byte=per_token)
    if found is None:
        raise UsageError(
            f"{config.prepared} has not been scored: there is no {config.scored}. Score first (make score)."
        )
    if found[0]["inputs"]["prepared"] != prepared.id:
        raise IdentityError(
            f"{config.scored} belongs to other data than {config.prepared} holds now. Score it (make score)."
        )
    refuse_other_reference(config, found[0])
    return found


# -- without a config ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def standalone(config: Config, progress: Progress) -> Iterator[Config]:
    """The config with a working folder in place of `out`, for as long as the block lasts.

    It lies in the cache, under a name that says data, model and how they are prepared: so the same command finds it
    again and prepares nothing, and changed data takes the place of what was. What was not used for a week is removed.
    A second command of that name waits: what they prepare may differ, as it does from standard input.
    """
    if pool.share()[1] > 1:
        raise UsageError(
            "WORLD_SIZE is set, and --input is the work of one process. For several, prepare and score with a config, "
            "then `prefcache export`."
        )
    asked = [str(Path.cwd()), config.model, config.adapter, config.prepare.model_dump(mode="json", exclude={"workers"})]
    root = Path(config.cache) / ".standalone"
    folder = root / artifact.checksum_bytes(artifact.canonical_json(asked))[:16]
    root.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder, progress):
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        _remove_unused(root)
        yield config.model_copy(update={"out": str(folder)})


@contextlib.contextmanager
def _alone_in(folder: Path, progress: Progress) -> Iterator[None]:
    claim = claims.path_of(folder.parent, folder.name)
    with claims.claimed(claim, wait=False) as is_mine:
        if is_mine:
            yield
            return
    progress.say("score: waits for another command that scores the same --input")
    with claims.claimed(claim, wait=True):
        yield


def _remove_unused(root: Path) -> None:
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        gone = contextlib.suppress(FileNotFoundError)
        with gone, claims.claimed(claims.path_of(root, folder.name), wait=False) as is_free:
            if is_free and folder.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


# -- values ----------------------------------------------------------------------------------------------------------


class Values:
    """What is put beside a record, for each row of the prepared examples."""

    def __init__(self, prepared: Prepared, cache: Cache, accepted: list[str], per_token: bool) -> None:
        self.kind = prepared.kind
        self.examples = prepared.table()
        self.answers = _answers(self.kind, self.examples)
        keys = [self.examples[f"{answer}_key"] for answer in self.answers]
        found = cache.logps(keys, accepted)
        self._sums = [pa.array(np.ma.getdata(each), mask=np.ma.getmaskarray(each)) for each in found]
        self._failed = [
            np.ma.getmaskarray(each) & key.is_valid().to_numpy() for each, key in zip(found, keys, strict=True)
        ]
        counts = _counts(self.kind, self.answers).values()
        self._counts = [self.examples[column].combine_chunks() for column in counts]
        self._shown = _not_shown(prepared)
        self._numbered = _is_numbered(prepared)
        self._tokens = _TokenLists(self.examples, cache, accepted, self.answers) if per_token else None
        self.schema = _schema(prepared, self.examples, per_token)

    def beside(self, rows: list["Row"]) -> pa.Table:
        at = pa.array([row.example for row in rows], pa.int64())
        columns = [each.take(at) for each in self._sums]
        columns += [each.take(at) for each in self._counts]
        if "kl" in self.answers:
            columns.append(_taken(self.examples["kl_ids"], at))
        if self._tokens:
            columns += self._tokens.take(rows)
        columns += [_taken(self.examples[name], at) for name in self._shown]
        columns += [pa.array([row.number for row in rows], pa.int32())] if self._numbered else []
        statuses = pa.array([row.status for row in rows], pa.string())
        return pa.Table.from_arrays([*columns, statuses], schema=self.schema)

    def status(self, example: int) -> str:
        """ok, or which answer has no log-prob."""
        for answer, failed in zip(self.answers, self._failed, strict=True):
            if failed[example]:
                return f"failed: no finite log-prob of the {answer} answer"
        return OK


def _taken(column: pa.ChunkedArray, at: pa.Array) -> Any:
    """Rows that lie close together, without a look at the rest of the column."""
    if at.null_count == len(at):
        return pa.nulls(len(at), column.type)
    first, last = pc.min(at).as_py(), pc.max(at).as_py()
    return column.slice(first, last - first + 1).combine_chunks().take(pc.subtract(at, first))


def _answers(kind: str, examples: pa.Table) -> tuple[str, ...]:
    """Those that have log-probs: mismatched ones only where prepare has made some."""
    has_kl = kind == "labels" and examples["kl_key"].null_count < len(examples)
    return tuple(answer for answer in _SUMS[kind].values() if answer != "kl" or has_kl)


def _counts(kind: str, answers: tuple[str, ...]) -> dict[str, str]:
    wanted = ("n_prompt", *(f"n_{answer}" for answer in answers))
    return {name: column for name, column in _COUNTS[kind].items() if column in wanted}


def _is_numbered(prepared: Prepared) -> bool:
    """Whether a record may have become several rows."""
    return bool(prepared.manifest["further"])


def _schema(prepared: Prepared, examples: pa.Table, per_token: bool) -> pa.Schema:
    """What stands beside a record."""
    kind = prepared.kind
    answers = _answers(kind, examples)
    fields = [(name, pa.float64()) for name, answer in _SUMS[kind].items() if answer in answers]
    fields += [(name, pa.int32()) for name in _counts(kind, answers)]
    if "kl" in answers:
        # Which answer it was: TRL takes another example's.
        fields.append(("KL_completion_ids", pa.list_(pa.int32())))
    if per_token:
        fields += [(name, pa.list_(pa.float32())) for name, answer in _TOKENS[kind].items() if answer in answers]
    fields += [(f"prefcache_{name}", examples.schema.field(name).type) for name in _not_shown(prepared)]
    fields += [(_NUMBER[kind], pa.int32())] if _is_numbered(prepared) else []
    return pa.schema([*fields, (STATUS, pa.string())])


def _not_shown(prepared: Prepared) -> tuple[str, ...]:
    """The answers, as columns of prepared, where a record does not say which of its answers were taken."""
    formats = [get_format(each["format"]) for each in prepared.manifest["formats"]]
    shown = _SHOWN[prepared.kind]
    told = all(set(shown) <= {*each.columns, *each.optional} for each in formats)
    return () if told and not prepared.manifest["further"] else shown


class _TokenLists:
    """Every token's log-prob, in a table of DuckDB's that goes to the disk where it is too large for memory."""

    def __init__(self, examples: pa.Table, cache: Cache, accepted: list[str], answers: tuple[str, ...]) -> None:
        self._answers = answers
        order = np.lexsort((examples["line"].to_numpy(), records.codes_of(examples["source"])[0]))
        self._place = np.empty(len(order), np.int64)
        self._place[order] = np.arange(len(order))
        wanted = pa.table({"place": self._place, **{f"{answer}_key": examples[f"{answer}_key"] for answer in answers}})
        self._con = self._joined(wanted, cache, accepted)
        self._refuse_sums_only()

    def _joined(self, wanted: pa.Table, cache: Cache, accepted: list[str]) -> duckdb.DuckDBPyConnection:
        con = duck.connect()
        duck.define(con, "cached", cache.shards, CACHE)
        con.register("wanted", wanted)
        keys = ", ".join(name for name in wanted.column_names if name != "place")
        try:
            con.execute(_USABLE.format(keys=keys), {"accepted": accepted, "ok": OK})
        except duckdb.Error:
            if not duck.missing(cache.shards):
                raise
            # Merged since the cache was opened; what took their place has the same rows.
            cache = cache.reopened()
            cache.refuse_damage()
            return self._joined(wanted, cache, accepted)
        lists = ", ".join(f"{answer}.logps as {answer}" for answer in self._answers)
        joins = " ".join(f"left join usable as {answer} on {answer}.key = {answer}_key" for answer in self._answers)
        con.execute(f"create temp table lists as select place, {lists} from wanted {joins} order by place")
        return con

    def _refuse_sums_only(self) -> None:
        ((n,),) = self._con.execute("select count(*) from usable where logps is null").fetchall()
        if n:
            raise UsageError(
                f"Of {n:,} sequences the cache keeps the sums only (score.logps=false, or imported). Leave --per-token "
                "out, or score them into another place (--set cache=FOLDER)."
            )

    def take(self, rows: list["Row"]) -> list[pa.ChunkedArray]:
        places = [None if row.example is None else int(self._place[row.example]) for row in rows]
        known = [place for place in places if place is not None]
        between = "select * from lists where place between $low and $high order by place"
        bounds = {"low": min(known, default=-1), "high": max(known, default=-1)}
        found = self._con.sql(between, params=bounds).to_arrow_table()
        at = np.searchsorted(found["place"].to_numpy(), np.array([-1 if place is None else place for place in places]))
        chosen = pa.array(at, mask=np.array([place is None for place in places], bool))
        return [found[answer].take(chosen).cast(pa.list_(pa.float32())) for answer in self._answers]


# The row whose sum is served: see Cache.logps.
_USABLE = """
create temp table usable as
select key, logps from cached
where (status = $ok or starts_with(status, $ok || ':')) and list_contains($accepted, numerics_id)
    and key in (select unnest([{keys}]) from wanted)
qualify row_number() over (partition by key order by list_position($accepted, numerics_id), logp_sum, logps is null) = 1
"""


# -- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row to be written."""

    record: int  # its place in the batch
    example: int | None  # the row of the prepared examples whose values stand beside it
    number: int | None  # which of several of one record
    status: str


class _Rows:
    """Which rows a batch becomes: one for each example, one for each reason why there is none."""

    def __init__(self, prepared: Prepared, values: Values) -> None:
        self.values = values
        self._outcomes = Outcomes(prepared, values.examples)
        self.statuses: Counter[str] = Counter()

    def of(self, batch: Batch) -> list[Row]:
        rows = [
            row for record, outcome in enumerate(self._outcomes.of(batch.lines)) for row in self._rows(record, outcome)
        ]
        self.statuses.update(row.status if row.status == OK else row.status.partition(": ")[0] for row in rows)
        return rows

    def _rows(self, record: int, outcome: Outcome) -> Iterator[Row]:
        several = len(outcome.examples) + len(outcome.reasons) > 1
        for number, example in enumerate(outcome.examples, 1):
            yield Row(record, example, number if several else None, self.values.status(example))
        for reason in outcome.reasons:
            yield Row(record, None, None, reason)
        if not outcome.examples and not outcome.reasons:
            yield Row(record, None, None, _LEFT_OUT)


def _refuse_taken(names: Container[str], schema: pa.Schema) -> None:
    if taken := [column for column in schema.names if column in names]:
        raise UsageError(f"The data has columns of these names already: {', '.join(taken)}. Drop or rename them first.")


def _write_columns(
    output: Path, types: records.Types, rows: _Rows, batches: Iterator[Batch], progress: Progress
) -> None:
    own = [(name, kind or pa.string()) for name, kind in types.items()]
    schema = pa.schema([*own, *rows.values.schema])
    with rowfiles.by_columns(output, schema) as out, progress.count("export", None, "rows") as counter:
        for batch in batches:
            found = rows.of(batch)
            mine = batch.as_table(types).take(pa.array([row.record for row in found], pa.int64()))
            beside = rows.values.beside(found)
            out.write_table(pa.Table.from_arrays([*mine.columns, *beside.columns], schema=schema))
            counter.add(len(found))


def _write_rows(output: Path, columns: list[str], rows: _Rows, batches: Iterator[Batch], progress: Progress) -> None:
    with rowfiles.by_rows(output, columns) as out, progress.count("export", None, "rows") as counter:
        for batch in batches:
            found = rows.of(batch)
            _refuse_taken(batch.names, rows.values.schema)
            beside = rows.values.beside(found).to_pylist()
            out.write([batch.dicts[row.record] | values for row, values in zip(found, beside, strict=True)])
            counter.add(len(found))
