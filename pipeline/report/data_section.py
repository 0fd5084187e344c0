"""Read what the report shows of the data, from the views and the manifest of its preparation."""

from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import numpy as np

from prefcache.pipeline.intervals import Estimate
from prefcache.pipeline.report.confidence_intervals import share
from prefcache.pipeline.stored.prepared import DONE
from prefcache.pipeline.stored.records import PreparedManifest
from prefcache.pipeline.visible_text import count

_MOST_SOURCES = 20  # there may be thousands
_RECORDS_PER_REASON = 2
LENGTHS = {"pairs": ("prompt", "chosen", "rejected"), "labels": ("prompt", "completion")}


@dataclass(frozen=True)
class Source:
    name: str
    n: dict[str, int]  # by split
    tokens: dict[str, float]  # mean length of prompts and answers


@dataclass(frozen=True)
class LengthBias:
    """Whether the chosen answer is the longer one."""

    longer: Estimate  # among pairs whose answers differ in length
    difference: np.ndarray  # in tokens that count, chosen minus rejected


@dataclass(frozen=True)
class QuarantinedRecord:
    source: str
    line: int
    detail: str
    raw: str


@dataclass(frozen=True)
class Reason:
    """Why records are in quarantine, with the first of them."""

    name: str
    n: int
    records: list[QuarantinedRecord]


@dataclass(frozen=True)
class Data:
    kind: str
    formats: list[str]
    records: int
    n: dict[str, int]  # by split
    sources: list[Source]
    n_sources: int
    lengths: dict[str, np.ndarray]
    bias: LengthBias | None
    desirable: Estimate | None  # of labels
    quarantined: list[Reason]
    notes: list[str]
    leaked: int  # evaluation data whose prompt is also trained on

    @property
    def n_quarantined(self) -> int:
        return sum(reason.n for reason in self.quarantined)


def read(con: duckdb.DuckDBPyConnection, manifest: PreparedManifest) -> Data:
    kind = manifest.kind
    sources = _read_sources(con, manifest.splits, LENGTHS[kind])
    notes = [f"{n:,} {DONE[name]}" for name, n in manifest.done.items() if n and name in DONE]
    if split := manifest.boundaries.get("split"):
        notes.append(f"{split:,} where the tokenizer would merge prompt and answer; the text was cut there")
    notes += [*_describe_counted(con, LENGTHS[kind][1:]), *_describe_images(con)]
    columns = ", ".join(f"n_{name} as {name}" for name in LENGTHS[kind])
    lengths = con.execute(
        f"select {columns}, n_chosen_counted - n_rejected_counted as difference, label from examples"
    ).fetchnumpy()
    difference, labels = lengths.pop("difference"), lengths.pop("label")
    differing = difference[difference != 0]
    return Data(
        kind,
        list(dict.fromkeys(reading.format for reading in manifest.formats)),
        manifest.records + manifest.further,
        {split: sum(each.n[split] for each in sources) for split in manifest.splits},
        sources[:_MOST_SOURCES],
        len(sources),
        {name: np.ma.compressed(values) for name, values in lengths.items()},
        LengthBias(share(differing > 0), difference) if kind == "pairs" and len(differing) else None,
        share(labels) if kind == "labels" and len(labels) else None,
        _read_quarantine(con),
        notes,
        manifest.done.get("leaked", 0),
    )


def _describe_counted(con: duckdb.DuckDBPyConnection, answers: tuple[str, ...]) -> Iterator[str]:
    """Say how much of the answers counts that do not count whole."""
    for name in answers:
        n, share_counted = con.execute(
            f"select count(*), sum(n_{name}_counted) / sum(n_{name}) from examples where n_{name}_counted < n_{name}"
        ).fetchall()[0]
        if n:
            yield f"{n:,} {name} answers count in part, {share_counted:.0%} of their tokens (prepare.train_on)"


def _describe_images(con: duckdb.DuckDBPyConnection) -> Iterator[str]:
    n, n_examples = con.execute(
        "select (select count(*) from images), count_if(n_images > 0) from examples"
    ).fetchall()[0]
    if n:
        yield f"{count(n_examples, 'prompt has', 'prompts have')} pictures, {count(n, 'different one', 'different ones')}"


def _read_sources(con: duckdb.DuckDBPyConnection, splits: tuple[str, ...], lengths: tuple[str, ...]) -> list[Source]:
    counts = ", ".join(f"count(*) filter (split = '{split}')" for split in splits)
    means = ", ".join(f"avg(n_{name})" for name in lengths)
    rows = con.execute(
        f"select source, {counts}, {means} from examples group by source order by count(*) desc, source"
    ).fetchall()
    return [
        Source(name, dict(zip(splits, numbers, strict=False)), dict(zip(lengths, numbers[len(splits) :], strict=True)))
        for name, *numbers in rows
    ]


def _read_quarantine(con: duckdb.DuckDBPyConnection) -> list[Reason]:
    rows = con.execute(
        "select reason, count(*) over (partition by reason) as n, source, line, detail, raw from quarantine "
        "qualify row_number() over (partition by reason order by source, line) <= $most order by n desc, reason, source, line",
        {"most": _RECORDS_PER_REASON},
    ).fetchall()
    reasons: dict[str, Reason] = {}
    for name, n, *record in rows:
        reasons.setdefault(name, Reason(name, n, [])).records.append(QuarantinedRecord(*record))
    return list(reasons.values())
