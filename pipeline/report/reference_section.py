"""Read what the report shows of the reference: whether it agrees with the data, and how exactly it was computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np

from prefcache.pipeline.intervals import Estimate
from prefcache.pipeline.report.confidence_intervals import share
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.stored.records import Parity, ScoredManifest

_BIN = 0.25  # nats
_BINS = 80  # the last one includes everything below
TOKEN_EDGES = -_BIN * np.arange(_BINS, -1, -1)
# The sequences of answers, by the data's judgement. One that occurs in several examples counts each time.
_ANSWERS = {
    "pairs": (
        "select 'chosen' as answer, chosen_key as key from examples union all "
        "select 'rejected', rejected_key from examples"
    ),
    "labels": "select if(label, 'desirable', 'undesirable') as answer, completion_key as key from examples",
}


@dataclass(frozen=True)
class Agreement:
    """How often the answer that the data prefers is the likelier one."""

    split: str
    pairs: int
    summed: Estimate  # by the sum of the log-probs that count
    per_token: Estimate


@dataclass(frozen=True)
class Reference:
    name: str
    model_id: str
    sequences: int
    failed: int
    numerics: Mapping[str, Mapping[str, str]]
    parity: Parity | None
    margins: np.ndarray  # of pairs
    agreements: list[Agreement]
    answers: dict[str, np.ndarray]  # log-prob per token of each answer, by the data's judgement
    tokens: dict[str, np.ndarray]  # counts of single tokens' log-probs, between TOKEN_EDGES


def read(con: duckdb.DuckDBPyConnection, manifest: ScoredManifest, kind: str) -> Reference:
    pairs = con.execute(
        "select split, margin, margin_per_token from pairs where used and margin is not null order by example_id"
    ).fetchnumpy()
    agreements = []
    known = [TRAIN, HELD_OUT]
    for split in [*known, *sorted({*pairs["split"].tolist()} - {*known})]:
        in_split = pairs["split"] == split
        if in_split.any():
            summed, per_token = (share(pairs[name][in_split] > 0) for name in ("margin", "margin_per_token"))
            agreements.append(Agreement(split, int(in_split.sum()), summed, per_token))
    return Reference(
        manifest.reference.name,
        manifest.reference.model_id,
        manifest.sequences,
        manifest.failed,
        manifest.numerics,
        manifest.parity,
        np.asarray(pairs["margin"]),
        agreements,
        _read_answers(con, kind),
        _count_tokens(con, kind),
    )


def _read_answers(con: duckdb.DuckDBPyConnection, kind: str) -> dict[str, np.ndarray]:
    columns = con.execute(
        f"with answers as ({_ANSWERS[kind]}) select answer, logp_per_token from answers join reference using (key) "
        "where used and logp_per_token is not null order by answer, logp_per_token"
    ).fetchnumpy()
    return {str(name): columns["logp_per_token"][columns["answer"] == name] for name in np.unique(columns["answer"])}


def _count_tokens(con: duckdb.DuckDBPyConnection, kind: str) -> dict[str, np.ndarray]:
    rows = con.execute(
        f"with answers as ({_ANSWERS[kind]}), "
        "tokens as (select answer, unnest(logps) as logp from answers join reference using (key) where used) "
        "select answer, least(floor(-logp / $width)::int, $last) as below, count(*) from tokens "
        "where isfinite(logp) group by all order by all",
        {"width": _BIN, "last": _BINS - 1},
    ).fetchall()
    counts: dict[str, np.ndarray] = {}
    for answer, below, n in rows:
        # Rounding may put a certain token slightly above 0.
        counts.setdefault(answer, np.zeros(_BINS))[_BINS - 1 - max(0, below)] += n
    return counts
