"""show: one example token by token, as its reference and a trained policy see the answers."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache import example_tokens
from prefcache.command_results import ShowAnswer, ShowResult, ShowToken
from prefcache.pipeline import identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import ANSWERS
from prefcache.pipeline.spans import counted_positions
from prefcache.pipeline.stored.prepared import Prepared


def run(config: Config, progress: Progress, example: str) -> ShowResult:
    """Return the answers' tokens with the log-prob that each model gives them; None for a model that is missing."""
    prepared = Prepared(config.prepared)
    example_row = _find_example(prepared.table(), example)
    (row,) = example_row.to_pylist()
    answers = [name for name in ANSWERS[prepared.kind] if row[f"{name}_ids"] is not None]
    reference = example_tokens.read_reference(config.scored, example_row, answers)
    policy = _compute_policy(config, row, answers, progress)
    has_tokenizer = example_tokens.has_own_tokenizer(config.run)
    tokenizer = config.run / example_tokens.MODEL if has_tokenizer else identity.find_reference(config).tokenizer
    encoder = example_tokens.load_encoder(tokenizer)
    return ShowResult(
        example_id=row["example_id"],
        split=row["split"],
        source=row["source"],
        line=row["line"],
        prompt=row["prompt"],
        label=row.get("label"),
        run=config.run if policy else None,
        scored=bool(reference),
        answers=[
            _combine(name, encoder, row[f"{name}_ids"], row[f"{name}_spans"], policy.get(name), reference.get(name))
            for name in answers
        ],
    )


def _find_example(table: pa.Table, example: str) -> pa.Table:
    """Return the one row whose id begins with `example`."""
    rows = table.filter(pc.starts_with(table["example_id"], example))
    if len(rows) == 1:
        return rows
    if len(rows):
        some = ", ".join(rows["example_id"].slice(0, 3).to_pylist())
        raise UsageError(
            f"{len(rows):,} examples have an id that begins with {example!r}: {some}, ... Give more of it."
        )
    near = difflib.get_close_matches(example, table["example_id"].slice(0, 100_000).to_pylist(), n=1, cutoff=0.8)
    raise UsageError(
        f"No example has the id {example!r}{f'; the nearest is {near[0]}' if near else ''}. To list ids: "
        'prefcache sql "select example_id, prompt from examples".'
    )


def _compute_policy(
    config: Config, row: Mapping[str, Any], answers: list[str], progress: Progress
) -> example_tokens.Logps:
    """Compute the policy's log-probs; {} if the run has no model yet."""
    folder = config.run / example_tokens.MODEL
    if not folder.is_dir():
        return {}
    progress.say(f"show: computing with {folder}")
    model = example_tokens.load_policy(config.run)
    ids, image_ids = {name: row[f"{name}_ids"] for name in answers}, row["images"] or []
    images = example_tokens.open_images(config.run, image_ids)
    return example_tokens.compute_logps(model, row["prompt_ids"], ids, image_ids, images)


def _combine(
    name: str,
    encoder: Encoder,
    ids: list[int],
    spans: list[int],
    policy: np.ndarray | None,
    reference: np.ndarray | None,
) -> ShowAnswer:
    counted = counted_positions(np.array(spans, np.int32))
    counts = np.isin(np.arange(len(ids)), counted).tolist()
    ratio = policy - reference if policy is not None and reference is not None else None
    models = (policy, reference, ratio)
    logps = [[None] * len(ids) if each is None else each.tolist() for each in models]
    sums = [None if each is None else float(each[counted].sum(dtype=np.float64)) for each in models]
    tokens = [ShowToken(*token) for token in zip(ids, encoder.token_texts(ids), *logps, counts, strict=True)]
    return ShowAnswer(
        name=name,
        n_tokens=len(ids),
        n_counted=len(counted),
        policy_sum=sums[0],
        reference_sum=sums[1],
        log_ratio_sum=sums[2],
        tokens=tokens,
    )
