"""The log-probs that an example's reference and a trained policy give each token of its answers, and the tokens' texts.

`show` prints them and `ui` colours them. The policy's are computed by the plain forward in float32.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefcache.pipeline import config_file, identity, model_files
from prefcache.pipeline.errors import PrefcacheError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.tokenizer_facts import load_facts
from prefcache.pipeline.progress import counting, working
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import PreparedManifest, Provenance, RunManifest, ScoredManifest
from prefcache.pipeline.stored.scored import open_scored
from prefcache.pipeline.stored.token_logps import token_logps
from prefcache.pipeline.tokenizer import PROCESSOR_CONFIGS
from prefcache.pipeline.training.run_log import PROVENANCE

MODEL = "model"  # a run's folder of trained weights
Logps = dict[str, np.ndarray]  # of each answer's tokens, by the answer's name


def read_reference(scored: Path, row: pa.Table, answers: Sequence[str]) -> Logps:
    """Read cached log-probs of a table of one example; {} if the data has not been scored."""
    if (opened := open_scored(scored, every_byte=False)) is None:
        return {}
    manifest, cache = opened
    keys = [row[f"{name}_key"] for name in answers]
    sums = cache.logps(keys, manifest.accepted_numerics)
    lists = token_logps(cache, keys, sums, manifest.accepted_numerics)
    # An answer without a finite log-prob has no list.
    return {name: logps[0] for name, logps in zip(answers, lists, strict=True) if len(logps[0])}


def load_policy(run: Path) -> Any:
    """Load a run's model in float32; an adapter on its base model, quantized as it was in training."""
    with working("load PyTorch and Transformers"):
        from transformers.utils import logging

        from prefcache.pipeline.model import weights
        from prefcache.pipeline.model.attention import choose_kernel

    logging.disable_progress_bar()
    policy = find_policy(run)
    model = weights.load_base(policy, "float32", choose_kernel(policy.folder, "sdpa"), "cpu")
    if policy.adapter is not None:
        model = weights.load_frozen_adapter(model, policy.adapter, "cpu")
    return model.eval()


def find_policy(run: Path) -> Reference:
    """Find what a run's model is loaded from."""
    folder = run / MODEL
    if not model_files.is_adapter(folder):
        return Reference(folder)
    provenance = Provenance.read(run / PROVENANCE, f"Move {run} away.")
    return replace(identity.find_adapter(folder), quantization=provenance.quantization)


def open_images(run: Path, images: Sequence[bytes]) -> PromptImages | None:
    """Open the pictures of an example of a run, as its model's processor prepares them; None if it has no pictures."""
    if not images:
        return None
    prepared = Prepared(run.parent / "prepared")
    opened = prepared.prompt_images(_find_processor(run))
    if opened is None or opened.processor.id.hex() != prepared.manifest.inputs.processor_id:
        raise UsageError(
            f"The pictures in {prepared.folder} were prepared by another image processor than {run} is used with. Prepare again "
            "(prefcache prepare CONFIG)."
        )
    return opened


def _find_processor(run: Path) -> Path:
    """Find the folder with the image processor of a run's model: its own, or that of what it was trained from."""
    if any((run / MODEL / name).exists() for name in PROCESSOR_CONFIGS):
        return run / MODEL
    with config_file.open_config(run / "config.yaml") as (config, base):
        return ((base or Path()) / identity.find_reference(config, weights=False).processor).resolve()


def compute_logps(
    model: Any,
    prompt_ids: Sequence[int],
    answers: Mapping[str, Sequence[int]],
    image_ids: Sequence[bytes] = (),
    images: PromptImages | None = None,
) -> Logps:
    """Compute the log-prob of every token of these answers to a prompt with these images."""
    import torch

    from prefcache.pipeline.model.logprobs import plain_logps
    from prefcache.pipeline.model.vision import Vision, VisionTower

    prompt, logps = np.asarray(prompt_ids, np.int32), {}
    vision = Vision(model, VisionTower(model, images), images) if images else None
    with torch.inference_mode(), counting("forward passes", len(answers), "answers") as counter:
        for name, ids in answers.items():
            sequence = TokenSequence(prompt, np.asarray(ids, np.int32), images=tuple(image_ids))
            logps[name] = plain_logps(model, sequence, vision).numpy()
            counter.add(1)
    return logps


def find_tokenizer(experiment: Path) -> Path | None:
    """Find a folder with the tokenizer of an experiment's examples: that of a run, of a run's reference, or of the reference.

    None if there is none on this machine.
    """
    runs = sorted(path.parent for path in experiment.glob(f"*/{PROVENANCE}"))
    for run in runs:
        if has_own_tokenizer(run):
            return run / MODEL
    for run in runs:
        with contextlib.suppress(PrefcacheError), config_file.open_config(run / "config.yaml") as (config, base):
            return ((base or Path()) / identity.find_reference(config, weights=False).tokenizer).resolve()
    scored = ScoredManifest.find(experiment / "scored")
    folder = Path(scored.reference.name) if scored else None
    prepared = PreparedManifest.find(experiment / "prepared")
    if folder and folder.is_dir() and prepared and identity.tokenizer_id(folder) == prepared.inputs.tokenizer_id:
        return folder
    return None


def has_own_tokenizer(run: Path) -> bool:
    """Say whether a run is finished, so that its model has a tokenizer and the reference need not be available."""
    return (run / MODEL).is_dir() and RunManifest.find(run) is not None


def load_encoder(tokenizer: Path) -> Encoder:
    return Encoder(load_facts(tokenizer))
