"""Scoring engines: sequences in, one float32 vector of completion-token log-probs per sequence out.

A new engine is one file here with the functions of EngineModule, and a line in ENGINES.
"""

from collections.abc import Sequence as SequenceOf
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import Score
from pipeline.identity import Reference, saved_dtype
from pipeline.schema import Sequence

ENGINES = {
    "transformers": "pipeline.scoring.engines.transformers",
    "vllm": "pipeline.scoring.engines.vllm",
    "server": "pipeline.scoring.engines.server",
}
# Whose versions are part of an engine's numerics; here, so that a run with nothing to do need not import it.
# vLLM's live in another environment; a server that has nothing to do is not asked.
PACKAGES: dict[str, tuple[str, ...]] = {"transformers": ("torch", "transformers"), "server": ()}


class Engine(Protocol):
    """A frozen reference, loaded and ready."""

    facts: dict[str, Any]  # how it computes, beyond its numerics: stored in the record of each shard

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """Log-prob of every completion token, float32, in the order of `sequences`; not finite where it has none."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class EngineModule(Protocol):
    """What the file of an engine offers."""

    def numerics(self, reference: Reference, score: Score) -> dict[str, str]:
        """How this engine would compute, known quickly and before the model is loaded. Has engine, versions, dtype."""
        ...

    def load(self, reference: Reference, score: Score) -> Engine: ...


def engine_module(name: str) -> Any:
    return import_module(ENGINES[name])


def dtype_of(model: Path, score: Score, device: str) -> str:
    """What the weights are in: as said, else as they were saved on a GPU and float32 on a CPU."""
    if score.dtype != "auto":
        return score.dtype
    return saved_dtype(model) if device == "cuda" else "float32"
