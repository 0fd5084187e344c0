"""A frozen model from its files, and the plain forward that every engine is compared with."""

import os
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from pipeline.errors import ResourceError
from pipeline.identity import Reference, attention_kernel
from pipeline.model.logprobs import plain_logps
from pipeline.model.weights import whole, with_frozen_adapter
from pipeline.schema import Sequence

logging.disable_progress_bar()


def load_frozen(reference: Reference, dtype: str, attention: str, device: str) -> Any:
    """The reference in memory: without gradients, in eval mode. It is a Transformers model, also with an adapter."""
    kernel = attention_kernel(reference.folder, attention)
    if device == "cuda":
        # Of several processes on a machine each has a GPU of its own; a batch system may show each but one.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        device = f"cuda:{torch.cuda.current_device()}"
    loaded = whole(reference, dtype, kernel, device)
    if reference.adapter is not None:
        loaded = with_frozen_adapter(loaded, reference.adapter, device)
    return loaded.eval().requires_grad_(False)


# -- the plain forward -----------------------------------------------------------------------------------------------


def plain_scores(reference: Reference, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
    """Log-probs by the plain one-by-one float32 forward of Transformers, of the same quantised weights if they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        plain = load_frozen(reference, "float32", "sdpa", device)
        with torch.inference_mode():
            return [plain_logps(plain, sequence).cpu().numpy() for sequence in sequences]
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"{reference.folder} does not fit in memory in float32, in which a sample is checked. Set "
            "score.parity_sample=0 to score without that check."
        ) from None
