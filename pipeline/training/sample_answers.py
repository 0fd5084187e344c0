"""Answers to the same prompts before and after training, and their kinds (train.kinds)."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefcache.pipeline.config import Kinds
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import OWN_PROMPT, TokenSequence
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import SampleEntry

FILE = "samples.parquet"


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: of an example, or of the user's own (train.samples_from)."""

    id: str
    text: str
    ids: np.ndarray
    images: tuple[bytes, ...] = ()

    @property
    def sequence(self) -> TokenSequence:
        """The prompt as it is computed, without an answer."""
        return TokenSequence(self.ids, np.empty(0, np.int32), images=self.images)

    @classmethod
    def make_own(cls, text: str, ids: np.ndarray) -> "Prompt":
        """Name a prompt by its ids, so that the answers of several runs to it can be compared."""
        return cls(f"{OWN_PROMPT}{hashlib.blake2b(ids.astype('<i4').tobytes(), digest_size=8).hexdigest()}", text, ids)


def file_id(path: str) -> str:
    """Return what identifies a file of prompts: its content."""
    if not Path(path).is_file():
        raise UsageError(f"train.samples_from: there is no file {path}. Name a file of prompts, or leave it out.")
    return artifact.checksum(Path(path))


def make_samples(
    prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], kinds: Kinds | None
) -> list[SampleEntry]:
    """Put the answers to each prompt before and after training side by side: the rows of schema.SAMPLES."""
    return [
        SampleEntry(
            example_id=prompt.id,
            prompt=prompt.text,
            before=old,
            after=new,
            before_kind=_kind(old, kinds),
            after_kind=_kind(new, kinds),
        )
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def how_unchanged(sample: SampleEntry) -> tuple[bool, bool, bool]:
    """A sort key: first answers to prompts of the user's own, then those that changed their kind, then those that changed at all."""
    is_own = sample.example_id.startswith(OWN_PROMPT)
    return not is_own, sample.before_kind == sample.after_kind, sample.before == sample.after


def _kind(answer: str, kinds: Kinds | None) -> str | None:
    if kinds is None:
        return None
    for name, pattern in (("preferred", kinds.preferred), ("rejected", kinds.rejected)):
        if re.fullmatch(pattern, answer, re.DOTALL):
            return name
    return "neither"


def count_kinds(answers: list[str], kinds: Kinds | None) -> dict[str, int] | None:
    if kinds is None:
        return None
    counts = Counter(_kind(answer, kinds) for answer in answers)
    return {name: counts[name] for name in ("preferred", "rejected", "neither")}
