"""What the report says of the reference: whether it agrees with the data, and how exactly it was computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from pipeline.report.intervals import Estimate, share
from pipeline.schema import HELD_OUT, TRAIN

_BIN = 0.25  # nats
_BINS = 80  # the last one has all that is below
TOKEN_EDGES = -_BIN * np.arange(_BINS, -1, -1)


@dataclass(frozen=True)
class Agreement:
    """How often the answer that the data prefers is the likelier one."""

    split: str
    pairs: int
    whole: Estimate  # by the log-prob of the whole answer
    per_token: Estimate


@dataclass(frozen=True)
class Reference:
    name: str
    model_id: str
    sequences: int
    failed: int
    numerics: Mapping[str, Mapping[str, str]]
    parity: Mapping[str, Any] | None
    margins: np.ndarray  # of pairs
    agreements: list[Agreement]
    answers: dict[str, np.ndarray]  # log-prob per token of each answer, by what it is
    tokens: dict[str, np.ndarray]  # counts of single tokens' log-probs, between TOKEN_EDGES


def read(con: duckdb.DuckDBPyConnection, manifest: Mapping[str, Any], kind: str) -> Reference:
    pairs = _pairs(con) if kind == "pairs" else {}
    return Reference(
        manifest["reference"]["name"],
        manifest["reference"]["model_id"],
        manifest["sequences"],
        manifest["failed"],
        manifest["numerics"],
        manifest["parity"],
        pairs.get("margin", np.empty(0)),
        _agreements(pairs),
        _answers(con, kind),
        _tokens(con, kind),
    )


def _pairs(con: duckdb.DuckDBPyConnection) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = con.execute(
        "select split, margin, margin_per_token from pairs where used and margin is not null order by example_id"
    ).fetchnumpy()
    return found


def _agreements(pairs: Mapping[str, np.ndarray]) -> list[Agreement]:
    found = []
    for split in (TRAIN, HELD_OUT):
        of_split = pairs["split"] == split if pairs else np.zeros(0, bool)
        if of_split.any():
            whole, per_token = (share(pairs[name][of_split] > 0) for name in ("margin", "margin_per_token"))
            found.append(Agreement(split, int(of_split.sum()), whole, per_token))
    return found


# The sequences of answers, by what the data thinks of them. One that stands in several examples counts each time.
_ANSWERS = {
    "pairs": (
        "select 'chosen' as answer, chosen_key as key from examples union all "
        "select 'rejected', rejected_key from examples"
    ),
    "labels": "select if(label, 'desirable', 'undesirable') as answer, completion_key as key from examples",
}


def _answers(con: duckdb.DuckDBPyConnection, kind: str) -> dict[str, np.ndarray]:
    found = con.execute(
        f"with answers as ({_ANSWERS[kind]}) select answer, logp_per_token from answers join reference using (key) "
        "where used and logp_per_token is not null order by answer, logp_per_token"
    ).fetchnumpy()
    return {str(name): found["logp_per_token"][found["answer"] == name] for name in np.unique(found["answer"])}


def _tokens(con: duckdb.DuckDBPyConnection, kind: str) -> dict[str, np.ndarray]:
    rows = con.execute(
        f"with answers as ({_ANSWERS[kind]}), "
        "tokens as (select answer, unnest(logps) as logp from answers join reference using (key) where used) "
        "select answer, least(floor(-logp / $width)::int, $last) as below, count(*) from tokens "
        "where isfinite(logp) group by all order by all",
        {"width": _BIN, "last": _BINS - 1},
    ).fetchall()
    found: dict[str, np.ndarray] = {}
    for answer, below, n in rows:
        # Rounding may put a certain token a hair above 0.
        found.setdefault(answer, np.zeros(_BINS))[_BINS - 1 - max(0, below)] += n
    return found
