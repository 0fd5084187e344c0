"""parity: how far apart two engines or dtypes are on the same sequences."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.command_results import Deviations, Margins, ParityResult, Quantiles, WorstToken
from prefcache.pipeline import identity
from prefcache.pipeline.config import Config, Score, engine_names
from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.preparing import tokenizer_facts
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.stored.prepared import Prepared, Sequences, answer_names

PLAIN = "plain"
_N_WORST = 5
_ONE_IN_LONGEST = 4  # of the sampled examples, this share are the longest ones
# What may follow an engine's name, each key at most once and in any order.
_SETTINGS = {
    value: key
    for key in ("dtype", "attention", "rows")
    for value in typing.get_args(Score.model_fields[key].annotation)
    if value != "auto"
}


@dataclass(frozen=True)
class Side:
    """One way to compute, such as `transformers:bfloat16:eager`."""

    name: str
    engine: str | None  # None: the plain forward
    settings: dict[str, str]


def parse(text: str) -> Side:
    """Parse ENGINE[:DTYPE][:ATTENTION][:ROWS], or `plain`."""
    name, *parts = text.split(":")
    if name == PLAIN:
        if parts:
            raise UsageError(f"{text}: plain is the one-by-one float32 forward and takes nothing after its name.")
        return Side(text, None, {})
    look_up(dict.fromkeys((*engine_names(), PLAIN)), name, "parity.engine")
    known = {value: key for value, key in _SETTINGS.items() if key in find_engine(name).settings}
    settings: dict[str, str] = {}
    for part in parts:
        if part not in known or known[part] in settings:
            raise UsageError(
                f"{text}: {part!r} is not a setting of engine {name}, or a second value for the same one. Expected some of "
                f"{', '.join(known)}; for example {name}:{next(iter(known))}."
            )
        settings[known[part]] = part
    return Side(text, name, settings)


def run(config: Config, a: str, b: str, n: int, progress: Progress) -> ParityResult:
    sides = parse(a), parse(b)
    prepared, reference = Prepared(config.prepared), identity.find_reference(config)
    examples, images = prepared.table(), prepared.prompt_images(reference.processor)
    slots = sample_slots(examples, n)
    by_slot = Sequences(examples)
    sequences = [by_slot[slot] for slot in slots]
    # One after the other: never two models in memory.
    (scores_a, numerics_a), (scores_b, numerics_b) = [
        _score(config, reference, side, sequences, images, progress) for side in sides
    ]
    split_tokens = Encoder(tokenizer_facts.load_facts(reference.tokenizer)).token_texts
    return ParityResult(
        a=a,
        b=b,
        numerics=[numerics_a, numerics_b],
        deviations=measure_deviations(scores_a, scores_b),
        margins=count_flipped_margins(slots, scores_a, scores_b),
        worst=_find_worst(examples, slots, sequences, scores_a, scores_b, split_tokens),
    )


def sample_slots(examples: pa.Table, n: int) -> list[int]:
    """Return the slots of about `n` distinct sequences: whole examples, the longest ones and random ones."""
    names = answer_names(examples)
    sides = [(side, name) for side, name in enumerate(names) if examples[f"{name}_key"].null_count < len(examples)]
    n_rows = min(len(examples), -(-n // len(sides)))
    n_tokens = np.zeros(len(examples), np.int64)
    for _, name in sides:
        n_tokens = np.maximum(n_tokens, examples[f"n_{name}"].fill_null(0).to_numpy())
    n_tokens += examples["n_prompt"].to_numpy()
    longest = np.argsort(-n_tokens, kind="stable")[: n_rows // _ONE_IN_LONGEST]
    # Keys are hashes: the smallest are a random sample.
    random = pa.array(range(len(examples))).take(pc.sort_indices(examples[f"{names[0]}_key"]))
    rows = list(dict.fromkeys([*longest.tolist(), *random.to_pylist()]))[:n_rows]
    return [2 * row + side for row in rows for side, name in sides if examples[f"{name}_key"][row].is_valid]


def _score(
    config: Config,
    reference: identity.Reference,
    side: Side,
    sequences: list[TokenSequence],
    images: PromptImages | None,
    progress: Progress,
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return the log-probs of one side, and how they were computed."""
    if side.engine is None:
        from prefcache.pipeline.scoring.baseline import score_plainly

        progress.say(f"parity: {len(sequences)} sequences by the plain forward")
        return score_plainly(reference, sequences, images), {"engine": PLAIN, "dtype": "float32"}
    score = Score.model_validate(config.score.model_dump() | {"engine": side.engine, "ray": None} | side.settings)
    spec = find_engine(side.engine)
    progress.say(f"parity: {len(sequences)} sequences by {side.name}")
    numerics: dict[str, Any] = spec.numerics(reference, score)
    engine = spec.load(reference, score, images)
    try:
        return engine.score(sequences), numerics | engine.facts
    finally:
        engine.close()


# -- how far apart ---------------------------------------------------------------------------------------------------


def measure_deviations(scores_a: Sequence[np.ndarray], scores_b: Sequence[np.ndarray]) -> Deviations:
    """Compare tokens and whole sequences; tokens without a finite value on both sides are only counted."""
    a, b = (np.concatenate(scores).astype(np.float64) for scores in (scores_a, scores_b))
    is_finite = np.isfinite(a) & np.isfinite(b)
    differences = (a - b)[is_finite]
    sums = np.subtract(_sum_answers(scores_a), _sum_answers(scores_b))
    return Deviations(
        sequences=len(sums),
        tokens=len(a),
        not_finite=int((~is_finite).sum()),
        token=_quantiles(np.abs(differences)),
        sequence=_quantiles(np.abs(sums[np.isfinite(sums)])),
        bias=float(differences.mean()) if len(differences) else None,
    )


def _sum_answers(scores: Sequence[np.ndarray]) -> list[float]:
    return [float(logps_T.sum(dtype=np.float64)) for logps_T in scores]


def _quantiles(deviation: np.ndarray) -> Quantiles:
    if not len(deviation):
        return Quantiles(None, None, None)
    p50, p99 = np.quantile(deviation, [0.5, 0.99])
    return Quantiles(float(p50), float(p99), float(deviation.max()))


def count_flipped_margins(
    slots: Sequence[int], scores_a: Sequence[np.ndarray], scores_b: Sequence[np.ndarray]
) -> Margins:
    """Count the examples with both answers in the sample, and those whose likelier answer differs between the sides."""
    rows = sorted({slot // 2 for slot in slots if slot % 2 == 0} & {slot // 2 for slot in slots if slot % 2})
    signs = []
    for scores in (scores_a, scores_b):
        sums = dict(zip(slots, _sum_answers(scores), strict=True))
        signs.append(np.sign([sums[2 * row] - sums[2 * row + 1] for row in rows]))
    return Margins(len(rows), int((signs[0] != signs[1]).sum()))


def _find_worst(
    examples: pa.Table,
    slots: Sequence[int],
    sequences: Sequence[TokenSequence],
    scores_a: Sequence[np.ndarray],
    scores_b: Sequence[np.ndarray],
    split_tokens: Callable[[list[int]], Sequence[str]],
) -> list[WorstToken]:
    """Return the tokens that are furthest apart, beginning with those without a finite value on one side."""
    deviations = [np.nan_to_num(np.abs(a - b), nan=np.inf) for a, b in zip(scores_a, scores_b, strict=True)]
    flat = [(-deviation, i, t) for i, each in enumerate(deviations) for t, deviation in enumerate(each.tolist())]
    worst = []
    for _, i, t in sorted(flat)[:_N_WORST]:
        row, side = divmod(slots[i], 2)
        worst.append(
            WorstToken(
                example_id=examples["example_id"][row].as_py(),
                answer=answer_names(examples)[side],
                position=t,
                token=split_tokens(sequences[i].completion_ids[: t + 1].tolist())[t],
                a=float(scores_a[i][t]),
                b=float(scores_b[i][t]),
            )
        )
    return worst
