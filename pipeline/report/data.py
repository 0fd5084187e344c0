"""What the report says of the data, from the views and the manifest of its preparation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from pipeline.report.intervals import Estimate, share
from pipeline.schema import HELD_OUT, TRAIN
from pipeline.stored.prepared import DONE

_SOURCES = 20  # listed; there may be thousands
_PER_REASON = 2  # records shown of each reason
LENGTHS = {"pairs": ("prompt", "chosen", "rejected"), "labels": ("prompt", "completion")}


@dataclass(frozen=True)
class Source:
    name: str
    n: dict[str, int]  # by split
    tokens: dict[str, float]  # of prompts and answers, on average


@dataclass(frozen=True)
class Bias:
    """Whether the chosen answer is the longer one."""

    longer: Estimate
    difference: np.ndarray  # in tokens, chosen less rejected


@dataclass(frozen=True)
class Reason:
    """Why records are in quarantine, and the first of them."""

    name: str
    n: int
    records: list[dict[str, Any]]  # source, line, detail, raw


@dataclass(frozen=True)
class Data:
    kind: str
    formats: list[str]
    records: int
    n: dict[str, int]  # by split
    sources: list[Source]
    n_sources: int
    lengths: dict[str, np.ndarray]
    bias: Bias | None
    desirable: Estimate | None  # of labels
    quarantined: list[Reason]
    notes: list[str]


def read(con: duckdb.DuckDBPyConnection, manifest: Mapping[str, Any]) -> Data:
    kind = manifest["kind"]
    sources = _sources(con, LENGTHS[kind])
    done = [f"{n:,} {DONE[name]}" for name, n in manifest["done"].items() if n and name in DONE]
    if split := manifest["boundaries"].get("split"):
        done.append(f"{split:,} where the tokenizer would merge prompt and answer; the text was cut there")
    lengths = con.execute(f"select {', '.join(f'n_{name} as {name}' for name in LENGTHS[kind])} from examples")
    return Data(
        kind,
        list(dict.fromkeys(reading["format"] for reading in manifest["formats"])),
        manifest["records"] + manifest["further"],
        {split: sum(each.n[split] for each in sources) for split in (TRAIN, HELD_OUT)},
        sources[:_SOURCES],
        len(sources),
        {name: np.ma.compressed(values) for name, values in lengths.fetchnumpy().items()},
        _bias(con) if kind == "pairs" else None,
        _desirable(con) if kind == "labels" else None,
        _quarantined(con),
        done,
    )


def _sources(con: duckdb.DuckDBPyConnection, lengths: tuple[str, ...]) -> list[Source]:
    means = ", ".join(f"avg(n_{name})" for name in lengths)
    rows = con.execute(
        f"select source, count(*) filter (split = '{TRAIN}'), count(*) filter (split = '{HELD_OUT}'), {means} from examples "
        "group by source order by count(*) desc, source"
    ).fetchall()
    return [
        Source(name, {TRAIN: train, HELD_OUT: held_out}, dict(zip(lengths, tokens, strict=True)))
        for name, train, held_out, *tokens in rows
    ]


def _bias(con: duckdb.DuckDBPyConnection) -> Bias | None:
    difference = con.execute("select n_chosen - n_rejected as difference from examples").fetchnumpy()["difference"]
    differ = difference[difference != 0]
    # Pairs of equal length say nothing of which is preferred.
    return Bias(share(differ > 0), difference) if len(differ) else None


def _desirable(con: duckdb.DuckDBPyConnection) -> Estimate | None:
    labels = con.execute("select label from examples").fetchnumpy()["label"]
    return share(labels) if len(labels) else None


def _quarantined(con: duckdb.DuckDBPyConnection) -> list[Reason]:
    counted = con.execute("select reason, count(*) from quarantine group by reason order by count(*) desc, reason")
    counts = dict(counted.fetchall())
    rows = con.execute(
        "select reason, source, line, detail, raw from quarantine "
        "qualify row_number() over (partition by reason order by source, line) <= $n order by reason, source, line",
        {"n": _PER_REASON},
    ).fetchall()
    found: dict[str, list[dict[str, Any]]] = {}
    for reason, *record in rows:
        found.setdefault(reason, []).append(dict(zip(("source", "line", "detail", "raw"), record, strict=True)))
    return [Reason(reason, n, found[reason]) for reason, n in counts.items()]
