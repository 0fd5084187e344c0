"""Resolve names and paths that were read from a stored file.

A stored path is relative to the folder in which a command ran, which may not be the current one. A bare name is a file
in the same folder.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def candidate_places(name: str | Path, near: Path) -> Iterator[Path]:
    """Yield the candidates for `name`: relative to the working folder, then to each folder above `near`."""
    yield Path(name)
    if not Path(name).is_absolute():
        yield from (folder / name for folder in near.resolve().parents)


def is_bare(name: Any) -> bool:
    """Return whether this is a file name without a path."""
    return (
        isinstance(name, str) and name not in (".", "..") and re.fullmatch(r"[^/\\\x00-\x1f]{1,255}", name) is not None
    )
