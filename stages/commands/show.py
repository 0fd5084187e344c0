"""show: one example token by token, as its reference and a trained policy see the answers."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.command_results import ShowAnswer, ShowResult, ShowToken
from prefcache.pipeline import identity, model_files
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.tokenizer_facts import load_facts
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import ANSWERS, TokenSequence
from prefcache.pipeline.spans import counted_positions
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Provenance, RunManifest
from prefcache.pipeline.stored.scored import open_scored
from prefcache.pipeline.stored.token_logps import token_logps
from prefcache.pipeline.training.run_log import PROVENANCE


def run(config: Config, progress: Progress, example: str) -> ShowResult:
    """Return the answers' tokens with the log-prob that each model gives them; None for a model that is missing."""
    prepared = Prepared(config.prepared)
    example_row = _find_example(prepared.table(), example)
    (row,) = example_row.to_pylist()
    answers = [name for name in ANSWERS[prepared.kind] if row[f"{name}_ids"] is not None]
    reference = _read_reference(config, example_row, answers)
    policy = _compute_policy(config, row, answers, progress)
    # A finished run has a tokenizer of its own, so that the reference need not be available.
    is_finished = (config.run / "model").is_dir() and RunManifest.find(config.run) is not None
    tokenizer = config.run / "model" if is_finished else identity.find_reference(config).tokenizer
    encoder = Encoder(load_facts(tokenizer))
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


def _read_reference(config: Config, row: pa.Table, answers: list[str]) -> dict[str, np.ndarray]:
    """Read cached log-probs; {} if the data has not been scored."""
    if (scored := open_scored(config.scored, every_byte=False)) is None:
        return {}
    manifest, cache = scored
    keys = [row[f"{name}_key"] for name in answers]
    sums = cache.logps(keys, manifest.accepted_numerics)
    lists = token_logps(cache, keys, sums, manifest.accepted_numerics)
    # An answer without a finite log-prob has no list.
    return {name: logps[0] for name, logps in zip(answers, lists, strict=True) if len(logps[0])}


def _compute_policy(
    config: Config, row: Mapping[str, Any], answers: list[str], progress: Progress
) -> dict[str, np.ndarray]:
    """Compute log-probs by the plain forward in float32; {} if the run has no model yet."""
    folder = config.run / "model"
    if not folder.is_dir():
        return {}
    # These take seconds to load.
    import torch
    from transformers.utils import logging

    from prefcache.pipeline.model import weights
    from prefcache.pipeline.model.attention import choose_kernel
    from prefcache.pipeline.model.logprobs import plain_logps

    logging.disable_progress_bar()
    progress.say(f"show: computing with {folder}")
    policy = Reference(folder)
    if model_files.is_adapter(folder):
        # On its base model, quantized as it was in training.
        provenance = Provenance.read(config.run / PROVENANCE, f"Move {config.run} away.")
        policy = replace(identity.find_adapter(folder), quantization=provenance.quantization)
    model = weights.load_base(policy, "float32", choose_kernel(policy.folder, "sdpa"), "cpu")
    if policy.adapter is not None:
        model = weights.load_frozen_adapter(model, policy.adapter, "cpu")
    prompt = np.asarray(row["prompt_ids"], np.int32)
    with torch.inference_mode():
        return {
            name: plain_logps(model.eval(), TokenSequence(prompt, np.asarray(row[f"{name}_ids"], np.int32))).numpy()
            for name in answers
        }


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
