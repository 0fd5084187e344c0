"""Scoring engines: token sequences in, one float32 vector of completion-token log-probs per sequence out.

Each file here is an engine: its name is the value of score.engine, and its SPEC is all that the rest of prefcache knows
about it. A new engine is a new file. Files import their heavy packages inside functions, because `doctor` and a run with
nothing to score read every SPEC.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from prefcache.pipeline import identity, model_files
from prefcache.pipeline.config import Score, engine_names
from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import TokenSequence


class Engine(Protocol):
    """A frozen reference, loaded and ready."""

    facts: dict[str, Any]  # how it computes, beyond its numerics: stored in the record of each shard

    def score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Return the float32 log-prob of every completion token, in the order of `sequences`; NaN or inf where it has none."""
        ...

    def close(self) -> None:
        """Free memory and end processes."""
        ...


class Interpreter(NamedTuple):
    """The Python that an engine runs in, and why that one."""

    path: str
    reason: str


def _this_python(score: Score) -> Interpreter:
    return Interpreter(sys.executable, "this environment")


@dataclass(frozen=True)
class EngineSpec:
    """What is known about an engine before it loads a model."""

    # How the engine would compute: its name, versions, dtype. Known quickly, before the model is loaded.
    numerics: Callable[[Reference, Score], dict[str, str]]
    # The images are those of the prompts; None if there are none.
    load: Callable[[Reference, Score, PromptImages | None], Engine]
    # What to try where its log-probs deviate; {} becomes "score.dtype=float32, " for a lower dtype, and so for the head's.
    remedy: str
    # Which of score.dtype, score.head_dtype, score.attention and score.rows it follows.
    settings: frozenset[str] = frozenset({"dtype"})
    # The packages that it imports here. A missing one is refused with its `pip install`; if the versions of these decide
    # whether a finished stage is up to date, numerics need not be asked. None: it runs elsewhere, so ask numerics.
    packages: tuple[str, ...] | None = None
    interpreter: Callable[[Score], Interpreter] = _this_python
    is_remote: bool = False  # numerics asks a server, which `doctor` does only for the engine of the config

    def versions(self, reference: Reference, score: Score) -> dict[str, str]:
        """Return the versions that the stage's result depends on."""
        return self.numerics(reference, score) if self.packages is None else identity.versions(self.packages)


def find_engine(name: str, key: str = "score.engine") -> EngineSpec:
    """Import the file of an engine and return its SPEC; `key` says where the name comes from."""
    look_up(dict.fromkeys(engine_names()), name, key)
    spec = import_module(f"{__name__}.{name}").SPEC
    assert isinstance(spec, EngineSpec)
    for package in spec.packages or ():
        try:
            version(package)
        except PackageNotFoundError:
            raise UsageError(f"{key} is {name}, which needs {package}. Install it: pip install {package}.") from None
    return spec


def refuse_unused(score: Score) -> None:
    """Refuse score.head_dtype for an engine that chooses the head's data type in another way."""
    if score.head_dtype is None or "head_dtype" in find_engine(score.engine).settings:
        return
    remedy = "Set score.vllm.options.hf_overrides.head_dtype instead" if score.engine == "vllm" else "Leave it out"
    raise UsageError(f"score.head_dtype is {score.head_dtype}, which engine {score.engine} does not follow. {remedy}.")


def refuse_images(engine: str, images: PromptImages | None) -> None:
    """Refuse prompts with images for an engine that cannot be given any."""
    if images is not None:
        raise UsageError(
            f"score.engine is {engine}, which cannot be given the images of the prompts. Set score.engine=transformers."
        )


def resolve_dtype(model: Path, score: Score, device: str) -> str:
    """Return the weights' dtype: score.dtype, or for auto the saved one on a GPU and float32 on a CPU."""
    if score.dtype != "auto":
        return score.dtype
    return model_files.saved_dtype(model) if device == "cuda" else "float32"
