"""Answers to the same prompts before and after training, and their kinds (train.kinds)."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prefcache.pipeline.config import Kinds

FILE = "samples.parquet"


def rows(
    example_ids: Sequence[str], prompts: Sequence[str], before: Sequence[str], after: Sequence[str], kinds: Kinds | None
) -> list[dict[str, Any]]:
    """Rows of the table schema.SAMPLES."""
    return [
        {
            "example_id": example_id,
            "prompt": prompt,
            "before": old,
            "after": new,
            "before_kind": _kind(old, kinds),
            "after_kind": _kind(new, kinds),
        }
        for example_id, prompt, old, new in zip(example_ids, prompts, before, after, strict=True)
    ]


def how_unchanged(sample: dict[str, Any]) -> tuple[bool, bool]:
    """A sort key: first the answers that changed their kind, then those that changed at all."""
    return sample["before_kind"] == sample["after_kind"], sample["before"] == sample["after"]


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
