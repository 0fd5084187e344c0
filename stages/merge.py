"""merge: an adapter's weights added to its model's own, which makes a model that needs no PEFT."""

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from pipeline import identity
from pipeline.errors import IntegrityError, UsageError
from pipeline.identity import Reference
from pipeline.model import weights
from pipeline.model.forward import ROUNDING
from pipeline.model.logprobs import plain_logps
from pipeline.progress import Progress
from pipeline.schema import ANSWERS, Sequence
from pipeline.stored import artifact
from pipeline.stored.prepared import Prepared
from pipeline.training.runlog import PROVENANCE

SAMPLE = 8  # examples whose log-probs are compared
# Of the adapter's own effect on a token, in the mean, so much may be lost before it is worth a warning.
_LOST = 0.1

logging.set_verbosity_error()
logging.disable_progress_bar()


def run(folder: Path, output: Path | None, dtype: str | None, progress: Progress) -> dict[str, Any]:
    """Of a run, or of any adapter's folder."""
    adapter = _adapter(folder)
    output = output or folder / "merged"
    if output.exists():
        raise UsageError(f"{output} is there already. Name another place (--output), or delete it.")
    reference = identity.find_adapter(adapter)
    dtype = dtype or identity.saved_dtype(reference.folder)
    if quantization := _quantization(folder):
        progress.warn(
            f"{adapter} was trained on weights in {quantization}; added to the whole ones, it computes something else than it "
            "was trained to"
        )
    sequences = _sequences(folder, reference)
    progress.say(f"merge: {adapter} into {reference.folder}, as {dtype}")
    merged, unmerged, without = _merge(reference, sequences)
    with artifact.commit_folder(output) as temporary:
        merged.to(getattr(torch, dtype)).save_pretrained(temporary)
        del merged
        AutoTokenizer.from_pretrained(reference.tokenizer).save_pretrained(temporary)
        found = _logps(_whole(Reference(temporary)), sequences)
        deviation, effect = np.abs(found - unmerged), float(np.abs(unmerged - without).mean())
        largest, mean = float(deviation.max()), float(deviation.mean())
        if not (largest <= ROUNDING[dtype][0] and mean <= ROUNDING[dtype][1]):
            raise IntegrityError(
                f"Merged, the model's log-probs differ by up to {largest:.2g} nats a token and {mean:.2g} on average from those "
                f"of the adapter beside its model; {ROUNDING[dtype]} is rounding in {dtype}. Nothing was written. "
                f"Use {adapter} as it is: AutoPeftModelForCausalLM loads it."
            )
    if mean > _LOST * effect and dtype != "float32":
        progress.warn(
            f"rounding to {dtype} changes a token by {mean:.2g} nats on average, the adapter itself by {effect:.2g}; "
            "--dtype float32 keeps more of it"
        )
    facts = {"adapter": str(adapter), "base": str(reference.folder), "output": str(output), "dtype": dtype}
    return {**facts, "compared": len(sequences), "largest": largest, "mean": mean, "effect": effect}


def _adapter(folder: Path) -> Path:
    is_run = (folder / PROVENANCE).exists()
    if is_run and not (folder / artifact.MANIFEST).exists():
        raise UsageError(f"{folder} is not finished. Train it to its end (make train), then merge it.")
    adapter = folder / "model" if is_run else folder
    if not identity.is_adapter(adapter):
        raise UsageError(
            f"{adapter} is a whole model already; there is nothing to merge."
            if (adapter / "config.json").exists()
            else f"{folder} is neither a run nor an adapter. Name the folder of a run that was trained with train.lora."
        )
    return adapter


def _quantization(folder: Path) -> str | None:
    record = folder / PROVENANCE
    facts = artifact.unseal(record, f"Move {record} away.") if record.exists() else {}
    found: str | None = facts.get("quantization")
    return found


def _sequences(folder: Path, reference: Reference) -> list[Sequence]:
    """Some that the run was trained on; where there are none, tokens drawn at random."""
    if (folder.parent / "prepared" / artifact.MANIFEST).exists():
        prepared = Prepared(folder.parent / "prepared")
        rows = prepared.table().slice(0, SAMPLE).to_pylist()
        return [
            Sequence(np.asarray(row["prompt_ids"]), np.asarray(row[f"{name}_ids"]))
            for row in rows
            for name in ANSWERS[prepared.kind]
            if row[f"{name}_ids"] is not None
        ]
    config = json.loads((reference.folder / "config.json").read_text(encoding="utf-8"))
    n_tokens = config.get("text_config", config)["vocab_size"]
    ids = np.random.default_rng(0).integers(0, n_tokens, (SAMPLE, 64), dtype=np.int32)
    return [Sequence(each[:16], each[16:]) for each in ids]


def _whole(reference: Reference) -> Any:
    kernel = identity.attention_kernel(reference.folder, "sdpa")
    return weights.whole(reference, "float32", kernel, "cpu").eval()


def _merge(reference: Reference, sequences: SequenceOf[Sequence]) -> tuple[Any, np.ndarray, np.ndarray]:
    """The merged model in float32, and the log-probs of the unmerged one with its adapter and without."""
    assert reference.adapter is not None
    base = _whole(reference)
    without = _logps(base, sequences)
    adapted = weights.with_adapter(base, reference.adapter, "cpu").eval()
    if weights.has_adapted_head(base):
        # Merged into one matrix that is both, the adapter of the head would act on the input as well.
        weights.plain_head(base)
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    unmerged = _logps(base, sequences)
    merged = adapted.merge_and_unload(safe_merge=True)
    weights.mend_generation_config(merged.generation_config)
    return merged, unmerged, without


def _logps(model: Any, sequences: SequenceOf[Sequence]) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([plain_logps(model, each).numpy() for each in sequences])
