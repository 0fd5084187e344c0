"""How many bytes files take, and how many their removal frees. Links are not followed."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path


def measure(*paths: Path) -> int:
    """Count the bytes of files, and of all files in folders; one with several names there counts once."""
    return sum({(facts.st_dev, facts.st_ino): facts.st_size for path in paths for facts in _walk(path)}.values())


def count_freed(paths: Iterable[Path]) -> int:
    """Count the bytes that removing these files and folders frees: a file that has another name elsewhere stays."""
    files, n_names = {}, Counter[tuple[int, int]]()
    for facts in (facts for path in paths for facts in _walk(path)):
        files[facts.st_dev, facts.st_ino] = facts
        n_names[facts.st_dev, facts.st_ino] += 1
    return sum(facts.st_size for file, facts in files.items() if n_names[file] >= facts.st_nlink)


def newest_change(paths: Iterable[Path]) -> float | None:
    """Return the time of the latest change to any of these files, or to a file in one of these folders; None without files."""
    return max((facts.st_mtime for path in paths for facts in _walk(path)), default=None)


def _walk(path: Path) -> Iterator[os.stat_result]:
    """Yield the facts of all files at or below a path. What vanishes meanwhile, or cannot be read, is left out."""
    try:
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode):
            yield facts
        entries = list(path.iterdir()) if stat.S_ISDIR(facts.st_mode) else []
    except OSError:
        return
    for entry in entries:
        yield from _walk(entry)
