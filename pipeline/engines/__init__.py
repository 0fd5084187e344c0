"""Scoring engines: sequences in, one float32 vector of completion-token log-probs per sequence out.

A new engine is one file here with a function `numerics` and a class `Engine`, and a line in ENGINES and PACKAGES.
"""

from collections.abc import Sequence as SequenceOf
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import Score
from pipeline.schema import Sequence

ENGINES = {"transformers": "pipeline.engines.transformers"}
# Whose versions are part of an engine's numerics; here, so that they are known without importing it.
PACKAGES = {"transformers": ("torch", "transformers")}


class Engine(Protocol):
    """A frozen reference, loaded and ready."""

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """Log-prob of every completion token, in the order of `sequences`."""
        ...


class EngineModule(Protocol):
    """What the file of an engine offers."""

    def numerics(self, model: Path, config: Score) -> dict[str, str]:
        """How this engine would compute, known before the model is loaded."""
        ...

    def load(self, model: Path, config: Score) -> Engine: ...

    def plain_scores(self, model: Path, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """The same log-probs by the plain one-by-one float32 forward of Transformers, to compare with."""
        ...


def engine_module(name: str) -> Any:
    return import_module(ENGINES[name])
