"""The folder of a run: whether it is finished and whole, and what happens to a run with other settings."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import Difference, Freshness, find_differences
from prefcache.pipeline.stored.records import Provenance, RunManifest
from prefcache.pipeline.training.run_log import PARTS, PROVENANCE


def check(run: Path, inputs: dict[str, Any]) -> Freshness:
    """Compare a run with what its inputs are now; hash its files if those are the same. Changes nothing."""
    if not (run / PROVENANCE).exists():
        return Freshness("run", run, is_stored=False)
    if differences := _find_differences(run, inputs):
        return Freshness("run", run, differences=differences)
    if (manifest := RunManifest.find(run)) is None:
        return Freshness("run", run, damage="it is not finished")
    damage = next((f"{file} {reason}" for file, reason, _ in damaged_files(run, manifest)), None)
    return Freshness("run", run, damage=damage)


def _find_differences(run: Path, inputs: dict[str, Any]) -> tuple[Difference, ...]:
    provenance = Provenance.read(run / PROVENANCE, f"Move {run} away, or name another run.")
    return find_differences(provenance.inputs.facts(), inputs)


def reopen_stopped(run: Path) -> None:
    """Reopen a finished run that a callback stopped before its last step."""
    if (manifest := RunManifest.find(run)) is not None and manifest.stopped:
        artifact.retract_manifest(run)


def retract_damaged(run: Path, progress: Progress) -> None:
    """Reopen a finished run whose damaged files can be made again from its last checkpoint; refuse other damage."""
    if (manifest := RunManifest.find(run)) is None:
        return
    for file, reason, is_recoverable in damaged_files(run, manifest):
        if not is_recoverable:
            raise IntegrityError(f"{file} {reason}. Delete {run} and train again.")
        progress.warn(f"{file} {reason}; it is made again from the last checkpoint")
        artifact.retract_manifest(run)
        return


def damaged_files(run: Path, manifest: RunManifest) -> Iterator[tuple[Path, str, bool]]:
    """Yield files that differ from the manifest: path, reason, and whether the last checkpoint can restore it; those come last."""
    entries = [(run / table, entry, False) for table in PARTS for entry in manifest.table_files(table)]
    entries += [(run / "model", entry, True) for entry in manifest.model]
    entries += [(run, entry, True) for entry in [manifest.tokens] if entry]
    for folder, entry, is_recoverable in entries:
        if reason := artifact.damage(folder, entry):
            yield folder / entry.file, reason, is_recoverable


def make_room(folder: Path, inputs: dict[str, Any], progress: Progress) -> None:
    """Leave a run of these inputs in place, rename a finished run of others, and refuse anything else."""
    if not (folder / PROVENANCE).exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no run. Name another with --set train.run=NAME.")
        return
    artifact.remove_leftovers(folder)
    if not (changed := "; ".join(map(str, _find_differences(folder, inputs)))):
        return
    if not (folder / artifact.MANIFEST).exists():
        raise UsageError(
            f"{folder} holds an unfinished run with {changed}. Set that back to continue it, name another "
            f"run (--set train.run=NAME), or delete {folder}."
        )
    aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    os.replace(folder, aside)
    progress.say(f"train: {folder} held a finished run with {changed}; it is now {aside}")
