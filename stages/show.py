"""show: one example token by token, as its reference and a trained policy see the answers."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import identity
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.identity import Reference
from pipeline.preparing import encoder
from pipeline.preparing.encoder import Encoder
from pipeline.progress import Progress
from pipeline.schema import ANSWERS, Sequence
from pipeline.stored import artifact
from pipeline.stored.cache import open_scored
from pipeline.stored.prepared import Prepared
from pipeline.training.runlog import PROVENANCE
from pipeline.training.token_logps import token_logps


def run(config: Config, progress: Progress, example: str) -> dict[str, Any]:
    """The answers' tokens with the log-prob that each model gives them: None where there is none."""
    prepared = Prepared(config.prepared)
    row = _row(prepared.table(), example)
    (found,) = row.to_pylist()
    answers = [name for name in ANSWERS[prepared.kind] if found[f"{name}_ids"] is not None]
    reference = _of_reference(config, row, answers)
    policy = _of_policy(config, found, answers, progress)
    pieces = Encoder(encoder.load(_tokenizer(config)))
    shown = [_answer(name, pieces, found[f"{name}_ids"], policy.get(name), reference.get(name)) for name in answers]
    facts = {name: found.get(name) for name in ("example_id", "split", "source", "line", "prompt", "label")}
    return {**facts, "run": str(config.run) if policy else None, "scored": bool(reference), "answers": shown}


def _row(table: pa.Table, example: str) -> pa.Table:
    """The one example whose id begins so."""
    found = table.filter(pc.starts_with(table["example_id"], example))
    if len(found) == 1:
        return found
    if len(found):
        some = ", ".join(found["example_id"].slice(0, 3).to_pylist())
        raise UsageError(
            f"{len(found):,} examples have an id that begins with {example!r}: {some}, ... Give more of it."
        )
    near = difflib.get_close_matches(example, table["example_id"].slice(0, 100_000).to_pylist(), n=1, cutoff=0.8)
    raise UsageError(
        f"No example has the id {example!r}{f'; the nearest is {near[0]}' if near else ''}. Ids are in every view: "
        'prefcache sql "select example_id, prompt from examples".'
    )


def _of_reference(config: Config, row: pa.Table, answers: list[str]) -> dict[str, np.ndarray]:
    """As cached; nothing where it has not been scored."""
    if (found := open_scored(config.scored, every_byte=False)) is None:
        return {}
    manifest, cache = found
    keys = [row[f"{name}_key"] for name in answers]
    sums = cache.logps(keys, manifest["accepted_numerics"])
    lists = token_logps(cache, keys, sums, manifest["accepted_numerics"])
    # An answer without a finite log-prob has no list.
    return {name: each[0] for name, each in zip(answers, lists, strict=True) if len(each[0])}


def _of_policy(config: Config, row: Mapping[str, Any], answers: list[str], progress: Progress) -> dict[str, np.ndarray]:
    """Computed now, by the plain forward in float32; nothing where the run has no model yet."""
    trained = config.run / "model"
    if not trained.is_dir():
        return {}
    # These take seconds to load.
    import torch
    from transformers.utils import logging

    from pipeline.model import weights
    from pipeline.model.logprobs import plain_logps

    logging.disable_progress_bar()
    progress.say(f"show: computing with {trained}")
    policy = _trained(config.run)
    model = weights.whole(policy, "float32", identity.attention_kernel(policy.folder, "sdpa"), "cpu")
    if policy.adapter is not None:
        model = weights.with_frozen_adapter(model, policy.adapter, "cpu")
    prompt = np.asarray(row["prompt_ids"], np.int32)
    with torch.inference_mode():
        return {
            name: plain_logps(model.eval(), Sequence(prompt, np.asarray(row[f"{name}_ids"], np.int32))).numpy()
            for name in answers
        }


def _trained(run: Path) -> Reference:
    """As it was trained: an adapter beside its model's own weights, quantised if they were."""
    if not identity.is_adapter(run / "model"):
        return Reference(run / "model")
    facts = artifact.unseal(run / PROVENANCE, f"Move {run} away.")
    return replace(identity.find_adapter(run / "model"), quantization=facts["quantization"])


def _tokenizer(config: Config) -> Path:
    """The run's, where it is whole: then no reference has to be at hand."""
    trained = config.run / "model"
    finished = trained.is_dir() and artifact.read_manifest(config.run) is not None
    return trained if finished else identity.find_reference(config).tokenizer


def _answer(
    name: str, encoder: Encoder, ids: list[int], policy: np.ndarray | None, reference: np.ndarray | None
) -> dict[str, Any]:
    ratio = policy - reference if policy is not None and reference is not None else None
    values = {"policy": policy, "reference": reference, "log_ratio": ratio}
    texts = encoder.pieces(ids)
    tokens = [
        {"id": number, "text": text, **at}
        for number, text, at in zip(ids, texts, _by_token(values, len(ids)), strict=True)
    ]
    sums = {f"{key}_sum": None if each is None else float(each.sum(dtype=np.float64)) for key, each in values.items()}
    return {"name": name, "n_tokens": len(ids), **sums, "tokens": tokens}


def _by_token(values: Mapping[str, np.ndarray | None], n: int) -> Iterator[dict[str, float | None]]:
    for i in range(n):
        yield {key: None if each is None else float(each[i]) for key, each in values.items()}
