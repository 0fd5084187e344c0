"""A frozen model from its files, and the plain forward that every engine is compared with."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.errors import ResourceError, UsageError
from pipeline.identity import Reference
from pipeline.logprobs import plain_logps
from pipeline.schema import Sequence

logging.disable_progress_bar()


def load_frozen(reference: Reference, dtype: str, attention: str, device: str) -> Any:
    """The reference in memory: without gradients, in eval mode."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            reference.folder, dtype=getattr(torch, dtype), attn_implementation=attention, use_safetensors=True
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{reference.folder} does not load as a causal language model ({type(error).__name__}: {reason})."
        ) from None
    return loaded.to(device).eval().requires_grad_(False)


def plain_scores(reference: Reference, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
    """Log-probs by the plain one-by-one float32 forward of Transformers."""
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
