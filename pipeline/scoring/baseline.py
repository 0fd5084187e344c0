"""The baseline: a frozen model from its files, and the plain forward that every engine is checked against."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from prefcache.pipeline.errors import ResourceError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.forward import refuse_lookahead
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.model.vision import Vision, VisionTower
from prefcache.pipeline.model.weights import load_base, load_frozen_adapter
from prefcache.pipeline.progress import counting
from prefcache.pipeline.schema import TokenSequence

logging.disable_progress_bar()


def load_frozen(reference: Reference, dtype: str, attention: str, device: str) -> Any:
    """Load the reference in eval mode, without gradients. It is a Transformers model even where it has an adapter."""
    kernel = choose_kernel(reference.folder, attention)
    if device == "cuda":
        # Each process of a machine uses one GPU; a batch system may show a process only its own.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        device = f"cuda:{torch.cuda.current_device()}"
    loaded = load_base(reference, dtype, kernel, device)
    if reference.adapter is not None:
        loaded = load_frozen_adapter(loaded, reference.adapter, device)
    return loaded.eval().requires_grad_(False)


def score_plainly(
    reference: Reference, sequences: Sequence[TokenSequence], images: PromptImages | None = None
) -> list[np.ndarray]:
    """Return log-probs by Transformers' plain float32 forward of one sequence at a time, with quantized weights if the reference's are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        plain = load_frozen(reference, "float32", "sdpa", device)
        vision = Vision(plain, VisionTower(plain, images), images) if images else None
        with torch.inference_mode():
            if sequences:
                refuse_lookahead(plain, sequences, "float32", vision)
            scores = []
            with counting("plain float32 forward", len(sequences), "sequences") as counter:
                for sequence in sequences:
                    scores.append(plain_logps(plain, sequence, vision).cpu().numpy())
                    counter.add(1)
            return scores
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{reference.folder} does not fit in memory in float32, in which a sample is checked. Set "
            "score.parity_sample=0 to score without that check."
        ) from None
