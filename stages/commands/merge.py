"""merge: add an adapter's weights to its model's own, for a model that needs no PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from prefcache.command_results import MergeResult
from prefcache.pipeline import identity, image_processor, model_config, model_files
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import weights
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.forward import ROUNDING
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.progress import Progress, counting, working
from prefcache.pipeline.schema import ANSWERS, TokenSequence
from prefcache.pipeline.stored import artifact, overwrite_guard
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Provenance
from prefcache.pipeline.tokenizer import load_tokenizer
from prefcache.pipeline.training.run_log import PROVENANCE

SAMPLE = 8  # examples whose log-probs are compared
_LOST = 0.1  # share of the adapter's mean effect on a token that rounding may cost without a warning

logging.set_verbosity_error()
logging.disable_progress_bar()


def run(folder: Path, output: Path | None, dtype: str | None, progress: Progress) -> MergeResult:
    """Merge the adapter of a run, or any adapter's folder."""
    adapter = _find_adapter(folder)
    if output is None:
        output = folder / "merged"
    elif output.resolve() != (folder / "merged").resolve():
        overwrite_guard.refuse_owned(output)
    if output.exists():
        raise UsageError(f"{output} exists already. Name another place (--output), or delete it.")
    reference = identity.find_adapter(adapter)
    dtype = dtype or model_files.saved_dtype(reference.folder)
    record = folder / PROVENANCE
    quantization = Provenance.read(record, f"Move {record} away.").quantization if record.exists() else None
    if quantization:
        progress.warn(
            f"{adapter} was trained on weights in {quantization}; added to the unquantized ones, it computes something else than in "
            "training"
        )
    sequences = _sample_sequences(folder, reference)
    progress.say(f"merge: {adapter} into {reference.folder}, as {dtype}")
    merged, unmerged, without = _merge(reference, sequences)
    with artifact.commit_folder(output, replace=False) as temporary:
        with working("save the model"):
            merged.to(getattr(torch, dtype)).save_pretrained(temporary)
        del merged
        load_tokenizer(reference.tokenizer).save_pretrained(temporary)
        image_processor.copy_settings(reference.processor, temporary)
        deviation = np.abs(_logps(_load(Reference(temporary)), sequences) - unmerged)
        largest, mean, effect = (
            float(deviation.max()),
            float(deviation.mean()),
            float(np.abs(unmerged - without).mean()),
        )
        if not (largest <= ROUNDING[dtype][0] and mean <= ROUNDING[dtype][1]):
            raise IntegrityError(
                f"Merged, the model's log-probs differ by up to {largest:.2g} nats a token and {mean:.2g} on average from those "
                f"of the model with its adapter; {ROUNDING[dtype]} is rounding in {dtype}. Nothing was written. "
                f"Use {adapter} as it is: AutoPeftModelForCausalLM loads it."
            )
    if mean > _LOST * effect and dtype != "float32":
        progress.warn(
            f"rounding to {dtype} changes a token by {mean:.2g} nats on average, the adapter itself by {effect:.2g}; "
            "--dtype float32 keeps more of it"
        )
    return MergeResult(
        adapter=adapter,
        base=reference.folder,
        output=output,
        dtype=dtype,
        compared=len(sequences),
        largest=largest,
        mean=mean,
        effect=effect,
    )


def _find_adapter(folder: Path) -> Path:
    is_run = (folder / PROVENANCE).exists()
    if is_run and not (folder / artifact.MANIFEST).exists():
        raise UsageError(f"{folder} is not finished. Train it to its end (prefcache train CONFIG), then merge it.")
    adapter = folder / "model" if is_run else folder
    if model_files.is_adapter(adapter):
        return adapter
    if (adapter / "config.json").exists():
        raise UsageError(f"{adapter} is a whole model already; there is nothing to merge.")
    raise UsageError(
        f"{folder} is neither a run nor an adapter. Name the folder of a run that was trained with train.lora."
    )


def _sample_sequences(folder: Path, reference: Reference) -> list[TokenSequence]:
    """Return some sequences that the run was trained on; without its data, random tokens."""
    if (folder.parent / "prepared" / artifact.MANIFEST).exists():
        prepared = Prepared(folder.parent / "prepared")
        return [
            TokenSequence(np.asarray(row["prompt_ids"]), np.asarray(row[f"{name}_ids"]))
            for row in prepared.table().slice(0, SAMPLE).to_pylist()
            for name in ANSWERS[prepared.kind]
            if row[f"{name}_ids"] is not None
        ]
    n_tokens = model_config.read(reference.folder).text_model.vocab_size
    if n_tokens is None:
        raise UsageError(
            f"{reference.folder / model_config.FILE} has no vocab_size, from which merge draws tokens to compare."
        )
    ids = np.random.default_rng(0).integers(0, n_tokens, (SAMPLE, 64), dtype=np.int32)
    return [TokenSequence(row[:16], row[16:]) for row in ids]


def _load(reference: Reference) -> Any:
    kernel = choose_kernel(reference.folder, "sdpa")
    return weights.load_base(reference, "float32", kernel, "cpu").eval()


def _merge(reference: Reference, sequences: Sequence[TokenSequence]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the merged model in float32, and the log-probs of the unmerged one with its adapter and without."""
    assert reference.adapter is not None
    base = _load(reference)
    without = _logps(base, sequences)
    adapted = weights.load_adapter(base, reference.adapter, "cpu").eval()
    if weights.has_adapted_head(base):
        # Merged into a tied matrix, the head's adapter would change the input embeddings as well.
        weights.fold_head_adapter(base)
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    unmerged = _logps(base, sequences)
    with working("merge the adapter"):
        merged = adapted.merge_and_unload(safe_merge=True)
    weights.fix_generation_config(merged.generation_config)
    return merged, unmerged, without


def _logps(model: Any, sequences: Sequence[TokenSequence]) -> np.ndarray:
    logps = []
    with torch.inference_mode(), counting("forward passes", len(sequences), "sequences") as counter:
        for sequence in sequences:
            logps.append(plain_logps(model, sequence).numpy())
            counter.add(1)
    return np.concatenate(logps)
