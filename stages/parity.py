"""parity: two engines or dtypes over the same sequences, and how far they are apart."""

import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import identity
from pipeline.config import Config, Score
from pipeline.errors import UsageError, named
from pipeline.preparing import encoder
from pipeline.progress import Progress
from pipeline.schema import Sequence
from pipeline.scoring.engines import ENGINES, engine_module
from pipeline.stored.prepared import Prepared, Sequences, answers_of

PLAIN = "plain"
_WORST = 5
_LONGEST = 4  # one in so many examples is there for its length
# What may follow an engine's name, each at most once and in any order.
_SETTINGS = {
    value: key
    for key in ("dtype", "attention", "rows")
    for value in typing.get_args(Score.model_fields[key].annotation)
    if value != "auto"
}


@dataclass(frozen=True)
class Side:
    """What computes: `transformers:bfloat16:eager`, say."""

    name: str
    engine: str | None  # None: the plain forward
    settings: dict[str, str]


def parse(text: str) -> Side:
    """ENGINE[:DTYPE][:ATTENTION][:ROWS], or `plain`."""
    name, *parts = text.split(":")
    if name == PLAIN:
        if parts:
            raise UsageError(f"{text}: plain is the one-by-one float32 forward and takes nothing after its name.")
        return Side(text, None, {})
    named({engine: engine for engine in (*ENGINES, PLAIN)}, name, "parity.engine")
    settings: dict[str, str] = {}
    for part in parts:
        if part not in _SETTINGS or _SETTINGS[part] in settings:
            known = ", ".join(_SETTINGS)
            raise UsageError(
                f"{text}: {part!r} is not what may follow an engine's name, or stands there twice. Expected some of {known}; "
                "for example transformers:bfloat16:eager."
            )
        settings[_SETTINGS[part]] = part
    return Side(text, name, settings)


def run(config: Config, a: str, b: str, n: int, progress: Progress) -> dict[str, Any]:
    sides = parse(a), parse(b)
    prepared = Prepared(config.prepared)
    reference = identity.find_reference(config)
    examples = prepared.table()
    slots = sample(examples, n)
    sequences = Sequences(examples)
    chosen = [sequences[slot] for slot in slots]
    # One after the other: never two models in memory.
    found = [_scores(config, reference, side, chosen, progress) for side in sides]
    pieces = encoder.Encoder(encoder.load(reference.tokenizer)).pieces
    return {
        "a": a,
        "b": b,
        "numerics": [numerics for _, numerics in found],
        **compared([scores for scores, _ in found]),
        **margins(slots, [scores for scores, _ in found]),
        "worst": _worst(examples, slots, chosen, [scores for scores, _ in found], pieces),
    }


def sample(examples: pa.Table, n: int) -> list[int]:
    """Slots of about `n` sequences: whole examples, the longest ones and random ones, none of them twice."""
    names = answers_of(examples)
    sides = [(side, name) for side, name in enumerate(names) if examples[f"{name}_key"].null_count < len(examples)]
    n_rows = min(len(examples), -(-n // len(sides)))
    n_tokens = np.zeros(len(examples), np.int64)
    for _, name in sides:
        n_tokens = np.maximum(n_tokens, examples[f"n_{name}"].fill_null(0).to_numpy())
    n_tokens += examples["n_prompt"].to_numpy()
    longest = np.argsort(-n_tokens, kind="stable")[: n_rows // _LONGEST]
    # Keys are hashes: the smallest are a random sample.
    first = pa.array(range(len(examples))).take(pc.sort_indices(examples[f"{names[0]}_key"]))
    rows = list(dict.fromkeys([*longest.tolist(), *first.to_pylist()]))[:n_rows]
    return [2 * row + side for row in rows for side, name in sides if examples[f"{name}_key"][row].is_valid]


def _scores(
    config: Config, reference: identity.Reference, side: Side, sequences: list[Sequence], progress: Progress
) -> tuple[list[np.ndarray], dict[str, Any]]:
    if side.engine is None:
        from pipeline.scoring.engines.loading import plain_scores

        progress.say(f"parity: {len(sequences)} sequences by the plain forward")
        return plain_scores(reference, sequences), {"engine": PLAIN, "dtype": "float32"}
    score = Score.model_validate(config.score.model_dump() | {"engine": side.engine, "ray": None} | side.settings)
    module = engine_module(side.engine)
    progress.say(f"parity: {len(sequences)} sequences by {side.name}")
    numerics: dict[str, Any] = module.numerics(reference, score)
    engine = module.load(reference, score)
    try:
        return engine.score(sequences), numerics | engine.facts
    finally:
        engine.close()


# -- how far apart ---------------------------------------------------------------------------------------------------


def compared(scores: list[list[np.ndarray]]) -> dict[str, Any]:
    """The deviation of tokens and of whole sequences. Tokens of which a side has no finite value are counted apart."""
    a, b = (np.concatenate(each).astype(np.float64) for each in scores)
    finite = np.isfinite(a) & np.isfinite(b)
    apart = (a - b)[finite]
    sums = np.array([x.sum(dtype=np.float64) - y.sum(dtype=np.float64) for x, y in zip(*scores, strict=True)])
    return {
        "sequences": len(sums),
        "tokens": len(a),
        "not_finite": int((~finite).sum()),
        "token": _quantiles(np.abs(apart)),
        "sequence": _quantiles(np.abs(sums[np.isfinite(sums)])),
        "bias": float(apart.mean()) if len(apart) else None,
    }


def _quantiles(deviation: np.ndarray) -> dict[str, float | None]:
    if not len(deviation):
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.quantile(deviation, [0.5, 0.99])
    return {"p50": float(p50), "p99": float(p99), "max": float(deviation.max())}


def margins(slots: list[int], scores: list[list[np.ndarray]]) -> dict[str, int]:
    """How many examples have both answers in the sample, and of how many the other answer is the likelier one."""
    sums = [{slot: logps.sum(dtype=np.float64) for slot, logps in zip(slots, each, strict=True)} for each in scores]
    rows = [slot // 2 for slot in slots if slot % 2 == 0 and slot + 1 in sums[0]]
    a, b = (np.array([each[2 * row] - each[2 * row + 1] for row in rows]) for each in sums)
    return {"pairs": len(rows), "flipped": int((np.sign(a) != np.sign(b)).sum())}


def _worst(
    examples: pa.Table, slots: list[int], sequences: list[Sequence], scores: list[list[np.ndarray]], pieces: Any
) -> list[dict[str, Any]]:
    """The tokens that are furthest apart; first those of which one side has no finite value."""
    apart = [np.nan_to_num(np.abs(x - y), nan=np.inf) for x, y in zip(*scores, strict=True)]
    flat = [(deviation, i, t) for i, each in enumerate(apart) for t, deviation in enumerate(each.tolist())]
    rows = []
    for _, i, t in sorted(flat, key=lambda each: (-each[0], each[1:]))[:_WORST]:
        row, side = divmod(slots[i], 2)
        rows.append(
            {
                "example_id": examples["example_id"][row].as_py(),
                "answer": answers_of(examples)[side],
                "position": t,
                "token": pieces(sequences[i].completion_ids[: t + 1].tolist())[t],
                "a": float(scores[0][i][t]),
                "b": float(scores[1][i][t]),
            }
        )
    return rows
