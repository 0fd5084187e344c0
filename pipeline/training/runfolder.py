"""The folder of a run: whose it is, whether it is whole, and what happens to one of other settings."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError, UsageError
from pipeline.progress import Progress
from pipeline.stored import artifact
from pipeline.training.runlog import PARTS, PROVENANCE


def finished(run: Path, progress: Progress) -> dict[str, Any] | None:
    """The manifest of a run that is whole. What is made after the last step, and is not, is made again from its checkpoint."""
    if (manifest := artifact.read_manifest(run)) is None:
        return None
    for file, reason, made_again in damaged(run, manifest):
        if not made_again:
            raise IntegrityError(f"{file} {reason}. Delete {run} and train again.")
        progress.warn(f"{file} {reason}; it is made again from the last checkpoint")
        artifact.retract_manifest(run)
        return None
    return manifest


def damaged(run: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, str, bool]]:
    """Files that are not as the manifest says: which, why, and whether the last checkpoint gives them again; those last."""
    vouched = [(run / table, entry, False) for table, key in PARTS.items() for entry in manifest.get(key, [])]
    vouched += [(run / "model", entry, True) for entry in manifest["model"]]
    vouched += [(run, entry, True) for entry in [manifest.get("tokens")] if entry]
    for folder, entry, made_again in vouched:
        if reason := artifact.damage(folder, entry):
            yield folder / entry["file"], reason, made_again


def make_room(folder: Path, inputs: dict[str, Any], progress: Progress) -> None:
    """Leave a run of these inputs where it is; keep a finished run of others under another name; refuse the rest."""
    record = folder / PROVENANCE
    if not record.exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no run. Name another with --set train.run=NAME.")
        return
    artifact.remove_leftovers(folder)
    changed = changed_keys(artifact.unseal(record, f"Move {folder} away, or name another run.")["inputs"], inputs)
    if not changed:
        return
    if not (folder / artifact.MANIFEST).exists():
        raise UsageError(
            f"{folder} holds an unfinished run with {'; '.join(changed)}. Set that back to go on with it, name another "
            f"run (--set train.run=NAME), or delete {folder}."
        )
    aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    os.replace(folder, aside)
    progress.say(f"train: {folder} held a finished run with {'; '.join(changed)}; it is now {aside}")


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`train.beta 0.1 (now 0.2)` for every key that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            lines += changed_keys(was, now, f"{prefix}{key}.")
        elif was != now:
            shown = (re.sub(r"^([0-9a-f]{8})[0-9a-f]{8,}$", r"\1", f"{value}") for value in (was, now))
            lines.append("{} {} (now {})".format(f"{prefix}{key}", *shown))
    return lines
