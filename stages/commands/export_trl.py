"""export --for trl: rows that TRL takes as they are, each checked to give the ids that were scored.

A row of which TRL would make other ids is left out, counted and named with its reason: its log-probs would be looked up in vain.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prefcache.command_results import TrlExportResult
from prefcache.pipeline import identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing import prepared_inputs, record_outcomes
from prefcache.pipeline.preparing.part_worker import PartWorker, Quarantine
from prefcache.pipeline.preparing.record_outcomes import Outcomes
from prefcache.pipeline.preparing.resolved_config import resolve_config
from prefcache.pipeline.preparing.sources import Chunk, DataSource, Line
from prefcache.pipeline.preparing.trl_rows import Mismatch, TrlRow, TrlRows, TrlTokens, messages_column, takes_text
from prefcache.pipeline.preparing.truncation import TruncatedExample
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import ANSWERS, IDS, sequence_key
from prefcache.pipeline.stored import overwrite_guard, row_writers
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.scored import require_scored

_KIND = ".parquet"
_OTHER_NOW = "prepare makes something else of them now than when they were prepared"
_BLOCK_ROWS = 1024


def run(
    config: Config, output: Path, progress: Progress, force: bool = False, path: str | None = None
) -> TrlExportResult:
    """Write the scored examples; `path` is the config's file, which is never overwritten."""
    if row_writers.file_kind(output) != _KIND:
        raise UsageError(f"{output}: --for trl writes {_KIND}, in which `datasets` finds messages as they were.")
    overwrite_guard.refuse_overwrite(output, overwrite_guard.Inputs.from_config(config, path), force=force)
    prepared = Prepared(config.prepared)
    if prepared.manifest.images:
        raise UsageError(
            f"{config.prepared} has prompts with images, which --for trl does not write: TRL reads no ids that a row with images "
            "brings. Without --for, export adds the scores to the records."
        )
    scored, cache = require_scored(config, prepared, every_byte=False)
    if reason := prepared_inputs.explain_if_stale(config):
        raise UsageError(
            f"--for trl renders the data again, as it was prepared, but {reason}. Prepare and score again, or set back what differs."
        )
    sources = record_outcomes.reopen_sources(config, prepared)
    tokenizer = identity.find_reference(config).tokenizer
    worker = PartWorker(resolve_config(config.prepare, tokenizer, sources, Progress(quiet=True)))
    trl = TrlRows(worker.resolved, worker.renderer, tokenizer, _takes_text(worker, sources))
    exporter = _Exporter(prepared, cache, scored.accepted_numerics, worker, trl)
    n_bytes, n_read = sum(source.estimate_bytes() for source in sources), 0
    with row_writers.open_columns(output, exporter.schema) as file, progress.count("export", None, "rows") as counter:
        tables = []
        for number, source in enumerate(sources):
            for chunk in source.chunks():
                table = exporter.export(number, chunk)
                n_read += chunk.n_bytes
                counter.estimate(n_read / max(n_bytes, 1))
                counter.add(len(table))
                if exporter.has_kl:
                    tables.append(table)
                else:
                    file.write_table(table)
        exporter.finish()
        kl = _KlOrder(pa.concat_tables(tables), prepared, config) if exporter.has_kl else None
        if kl and not config.prepare.kl_batch_size:
            progress.warn(
                "KTOTrainer makes other mismatched answers than prepare has made. Set prepare.kl_batch_size to TRL's "
                "per_device_train_batch_size, prepare and score; a loss that needs none (apo_zero_unpaired) is not affected"
            )
        for table in kl.blocks() if kl else ():
            file.write_table(table)
    settings: dict[str, Any] = {"max_length": config.prepare.max_length}
    if prepared.kind == "pairs":
        settings["truncation_mode"] = "keep_start"
    if kl:
        settings |= kl.settings
    return TrlExportResult(
        output=output,
        cache=cache.place,
        rows=exporter.n_rows,
        left_out=dict(exporter.left_out.most_common()),
        first=exporter.first,
        quarantined=prepared.manifest.quarantined,
        columns=exporter.schema.names,
        settings=settings,
        chat_template=config.prepare.chat_template if config.prepare.template == "chat" else None,
        kl_scored=kl.count_scored(cache, scored.accepted_numerics) if kl else None,
    )


def _takes_text(worker: PartWorker, sources: Sequence[DataSource]) -> bool:
    """Return whether the file's rows are text, as the data's first example is."""
    lines = ((n, line) for n, source in enumerate(sources) for chunk in source.chunks() for line in chunk.lines())
    examples = (each for n, line in lines for each in worker.read_examples(line, n, Quarantine()))
    first = next(examples, None)
    return first is not None and takes_text(worker.renderer, first.rendered)


class _Found(NamedTuple):
    """A prepared example with the messages that it was prepared from."""

    row: int  # of the table of examples
    line: Line
    truncated: TruncatedExample


class _Exporter:
    """Finds the prepared examples of a chunk in the data, and makes rows of those that pass the check."""

    def __init__(
        self, prepared: Prepared, cache: Cache, accepted: Sequence[str], worker: PartWorker, trl: TrlRows
    ) -> None:
        self._worker, self._trl, self._examples = worker, trl, prepared.table()
        self._answers = [name for name in ANSWERS[prepared.kind] if name != "kl"]
        self._labels = prepared.kind == "labels"
        self.has_kl = self._labels and self._examples["kl_key"].null_count < len(self._examples)
        self._outcomes = Outcomes(prepared, self._examples, copies=True)
        self._keys = [self._examples[f"{name}_key"] for name in self._answers]
        self._is_missing = [np.ma.getmaskarray(sums) for sums in cache.logps(self._keys, accepted)]
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # by reason, the first record that was left out for it
        self.n_rows = 0
        turns = pa.string() if trl.as_text else messages_column([]).type
        fields = [(name, turns) for name in ("prompt", *self._answers)]
        fields += [("label", pa.bool_())] if self._labels else []
        fields += [] if trl.as_text else [("tools", pa.string()), ("chat_template_kwargs", pa.json_())]
        fields += [(f"{name}_ids", IDS) for name in ("prompt", *self._answers)]
        self.schema = pa.schema([*fields, ("prefcache_example", pa.string()), ("prefcache_split", pa.string())])

    def export(self, source: int, chunk: Chunk) -> pa.Table:
        found, rows = [], []
        for each in self._find(source, chunk):
            try:
                self._refuse_missing(each.row)
                rows.append(self._trl.make_row(each.truncated))
                found.append(each)
            except Mismatch as mismatch:
                self._leave_out(each.line, str(mismatch))
        checked = self._trl.check(rows, [each.truncated for each in found])
        good: list[tuple[_Found, TrlRow, TrlTokens]] = []
        for each, row, tokens in zip(found, rows, checked, strict=True):
            if isinstance(tokens, Mismatch):
                self._leave_out(each.line, str(tokens))
            else:
                good.append((each, row, tokens))
        self.n_rows += len(good)
        return self._make_table(good)

    def _find(self, source: int, chunk: Chunk) -> Iterator[_Found]:
        by_line: dict[int, tuple[Line, list[TruncatedExample]]] = {}
        for line, truncated in self._worker.repeat(source, chunk):
            by_line.setdefault(line.number, (line, []))[1].append(truncated)
        outcomes = self._outcomes.find([line for line, _ in by_line.values()])
        for (line, examples), outcome in zip(by_line.values(), outcomes, strict=True):
            rows: dict[tuple[bytes, ...], list[int]] = {}
            for row in outcome.examples:
                rows.setdefault(tuple(key[row].as_py() for key in self._keys), []).append(row)
            for truncated in examples:
                tokens = truncated.tokens
                keys = tuple(sequence_key(tokens.prompt, ids) for ids in tokens.answers)
                yield from (_Found(row, line, truncated) for row in rows.pop(keys, ()))

    def _refuse_missing(self, row: int) -> None:
        for name, is_missing in zip(self._answers, self._is_missing, strict=True):
            if is_missing[row]:
                raise Mismatch(f"no finite log-prob of the {name} answer")

    def _leave_out(self, line: Line, reason: str) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, f"{line.source}, line {line.number}")

    def _make_table(self, good: Sequence[tuple[_Found, TrlRow, TrlTokens]]) -> pa.Table:
        def turns(values: list[Any]) -> pa.Array:
            return pa.array(values, pa.string()) if self._trl.as_text else messages_column(values)

        at = pa.array([each.row for each, _, _ in good], pa.int64())
        columns = [turns([row.prompt for _, row, _ in good])]
        columns += [turns([row.answers[n] for _, row, _ in good]) for n in range(len(self._answers))]
        columns += [self._examples["label"].take(at)] if self._labels else []
        if not self._trl.as_text:
            columns.append(pa.array([row.tools for _, row, _ in good], pa.string()))
            columns.append(pa.array([row.template_kwargs for _, row, _ in good], pa.string()).cast(pa.json_()))
        columns.append(pa.array([tokens.prompt for _, _, tokens in good], IDS))
        columns += [pa.array([tokens.answers[n] for _, _, tokens in good], IDS) for n in range(len(self._answers))]
        columns += [self._examples[name].take(at) for name in ("example_id", "split")]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def finish(self) -> None:
        """Count the examples that the data did not give again; refuse to write a file without rows."""
        if n_lost := len(self._examples) - self.n_rows - self.left_out.total():
            self.left_out[_OTHER_NOW] += n_lost
        if not self.n_rows:
            reasons = "; ".join(f"{n:,} {reason}" for reason, n in self.left_out.most_common())
            raise DataError(f"TRL would make other ids of all {len(self._examples):,} examples: {reasons}.")


# -- KTO's mismatched answers ----------------------------------------------------------------------------------------


class _KlOrder:
    """Labelled rows in an order in which KTOTrainer makes the mismatched answers that were scored.

    It gives each prompt the answer of the row before, and the first of a batch that of the last. With prepare.kl_batch_size, prepare
    has chosen answers in rings of that many; each ring becomes a batch. Rings that lost a row come last.
    """

    def __init__(self, table: pa.Table, prepared: Prepared, config: Config) -> None:
        self._n_batch, self._max_length = config.prepare.kl_batch_size, config.prepare.max_length
        examples = prepared.table().select(["example_id", "kl_of"]).to_pydict()
        partners = dict(zip(examples["example_id"], examples["kl_of"], strict=True))
        ids, splits = table["prefcache_example"].to_pylist(), table["prefcache_split"].to_pylist()
        self._splits = []
        for split in prepared.manifest.splits:
            rows = [row for row, each in enumerate(splits) if each == split]
            ordered = order_rings([ids[row] for row in rows], partners, self._n_batch or 0)
            self._splits.append(np.array([rows[n] for n in ordered], np.int64))
        self._table = table
        self.settings = {"per_device_train_batch_size": self._n_batch} if self._n_batch else {}

    def blocks(self) -> Iterator[pa.Table]:
        order = np.concatenate(self._splits)
        for begin in range(0, len(order), _BLOCK_ROWS):
            yield self._table.take(pa.array(order[begin : begin + _BLOCK_ROWS]))

    def count_scored(self, cache: Cache, accepted: Sequence[str]) -> int:
        """Count the rows whose mismatched answer, as KTOTrainer makes it, is in the cache."""
        if not self._n_batch:
            return 0
        keys = []
        for order in self._splits:
            for begin in range(0, len(order), self._n_batch):
                batch = self._table.take(pa.array(order[begin : begin + self._n_batch]))
                prompts, answers = batch["prompt_ids"].to_pylist(), batch["completion_ids"].to_pylist()
                for prompt, answer in zip(prompts, [answers[-1], *answers[:-1]], strict=True):
                    keys.append(sequence_key(prompt, answer[: self._max_length - len(prompt)]))
        (sums,) = cache.logps([pa.chunked_array([pa.array(keys, pa.binary(16))])], accepted)
        return int((~np.ma.getmaskarray(sums)).sum())


def order_rings(ids: Sequence[str], partners: dict[str, str | None], n: int) -> list[int]:
    """Order rows so that each follows the one whose answer it gets: first the rings of `n` rows, then the rest."""
    places = {name: row for row, name in enumerate(ids)}
    rings: list[int] = []
    rest: list[int] = []
    seen: set[int] = set()
    for start in range(len(ids)):
        if start in seen:
            continue
        walk: list[int] = []
        row: int | None = start
        while row is not None and row not in seen:
            walk.append(row)
            seen.add(row)
            row = places.get(partners[ids[row]] or "")
        (rings if row == start and len(walk) == n else rest).extend(reversed(walk))
    return rings + rest
