"""The log-probs of a reference, looked up by token ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.progress import Progress


class ReferenceCache:
    """The cached log-probs of one reference model."""

    @classmethod
    def open(
        cls,
        cache: str | Path,
        model: str,
        adapter: str | None,
        revision: str | None,
        score: Mapping[str, Any],
        progress: Progress,
    ) -> "ReferenceCache":
        raise NotImplementedError
