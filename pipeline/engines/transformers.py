"""The reference through Transformers, in batches of a token budget."""

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import Score
from pipeline.engines import PACKAGES
from pipeline.engines.loading import load_frozen
from pipeline.errors import ResourceError, UsageError
from pipeline.identity import Reference
from pipeline.identity import numerics as numerics_record
from pipeline.logprobs import completion_logps, use_float32_head
from pipeline.packing import token_budget_batches
from pipeline.schema import Sequence


def numerics(reference: Reference, config: Score) -> dict[str, str]:
    device = _device(config)
    return numerics_record(
        "transformers",
        PACKAGES["transformers"],
        device=device,
        dtype=_dtype(reference.folder, config, device),
        head_dtype="float32",
        attention=config.attention,
        layout="1",
    )


class TransformersEngine:
    def __init__(self, reference: Reference, config: Score) -> None:
        device = _device(config)
        self.facts: dict[str, Any] = {}
        self._model = load_frozen(reference, _dtype(reference.folder, config, device), config.attention, device)
        use_float32_head(self._model)
        self._budget = config.tokens_per_batch

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        scores: dict[int, np.ndarray] = {}
        batches = token_budget_batches([sequence.n_tokens for sequence in sequences], self._budget)
        for batch in batches:
            scores.update(zip(batch, self._forward([sequences[i] for i in batch]), strict=True))
        return [scores[i] for i in range(len(sequences))]

    def close(self) -> None:
        self._model = None

    def _forward(self, batch: list[Sequence]) -> list[np.ndarray]:
        try:
            with torch.inference_mode():
                return [logps_N.cpu().numpy() for logps_N in completion_logps(self._model, batch)]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise ResourceError(
                    f"A sequence of {batch[0].n_tokens} tokens does not fit in the memory of the GPU. "
                    "Lower prepare.max_length, or score.dtype to bfloat16."
                ) from None
        # Outside the handler, which would keep the failed pass's tensors alive.
        torch.cuda.empty_cache()
        self._budget = max(self._budget // 2, 1)
        half = len(batch) // 2
        return self._forward(batch[:half]) + self._forward(batch[half:])


def load(reference: Reference, config: Score) -> TransformersEngine:
    return TransformersEngine(reference, config)


def _device(config: Score) -> str:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and found == "cpu":
        raise UsageError("score.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    return found if config.device == "auto" else config.device


def _dtype(model: Path, config: Score, device: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    saved = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return (saved.get("dtype") or saved.get("torch_dtype") or "float32") if device == "cuda" else "float32"
