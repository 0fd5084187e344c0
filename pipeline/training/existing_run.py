"""The folder of a run: whether it is finished and whole, and what happens to a run with other settings."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import Difference, Freshness, find_differences
from prefcache.pipeline.stored.records import Provenance, RunInputs, RunManifest
from prefcache.pipeline.training import checkpoints
from prefcache.pipeline.training.run_log import PARTS, PROVENANCE
from prefcache.pipeline.visible_text import format_bytes


def check(run: Path, inputs: RunInputs) -> Freshness:
    """Compare a run with what its inputs are now; hash its files if those are the same. Changes nothing."""
    if not (run / PROVENANCE).exists():
        return Freshness("run", run, is_stored=False)
    if differences := _find_differences(run, inputs):
        return Freshness("run", run, differences=differences)
    if (manifest := RunManifest.find(run)) is None:
        return Freshness("run", run, damage="it is not finished")
    damage = next((f"{file} {reason}" for file, reason, _ in damaged_files(run, manifest)), None)
    return Freshness("run", run, damage=damage)


def _find_differences(run: Path, inputs: RunInputs) -> tuple[Difference, ...]:
    provenance = Provenance.read(run / PROVENANCE, f"Move {run} away, or name another run.")
    return find_differences(provenance.inputs.facts(), inputs.facts())


def reopen_stopped(run: Path) -> None:
    """Reopen a finished run that a callback stopped before its last step; refuse one without a checkpoint to continue from."""
    if (manifest := RunManifest.find(run)) is None or not manifest.stopped:
        return
    if not has_checkpoint(run):
        raise UsageError(
            f"{run} was {manifest.stopped.describe()}, and its last checkpoint is gone or damaged, so it cannot be continued. "
            "Its model is whole. To take all steps, name another run (train.run) and train it without that callback."
        )
    artifact.retract_manifest(run)


def has_checkpoint(run: Path) -> bool:
    """Whether there is a whole checkpoint to resume from. Hashes it."""
    return checkpoints.find_newest(run, lambda damage: None) is not None


def is_removal_unfinished(run: Path, manifest: RunManifest) -> bool:
    """Whether a process died while it removed a finished run's checkpoints."""
    return manifest.checkpoints == "remove" and checkpoints.has_superfluous(run, _count_needed(manifest))


def remove_checkpoints(run: Path, manifest: RunManifest, progress: Progress) -> None:
    """Remove the checkpoints that a finished run no longer needs, if its manifest says so.

    The manifest is on disk by then: killed here, the run is finished, and the next train removes the rest.
    """
    if manifest.checkpoints != "remove":
        return
    try:
        n_bytes = checkpoints.remove_superfluous(run, _count_needed(manifest))
    except OSError as error:
        progress.warn(f"{error.filename} cannot be removed ({error.strerror}); the run is finished nevertheless")
        return
    if n_bytes:
        keeps = "all but the last checkpoint" if manifest.stopped else "the checkpoints"
        progress.say(
            f"train: removed {keeps}, {format_bytes(n_bytes)} (train.checkpoints_at_end: keep would keep them)"
        )


def _count_needed(manifest: RunManifest) -> int:
    """How many of the newest checkpoints a finished run needs: the last, if it can be continued."""
    return 1 if manifest.stopped else 0


def retract_damaged(run: Path, progress: Progress) -> None:
    """Reopen a finished run whose damaged files can be made again from its last checkpoint; refuse other damage."""
    if (manifest := RunManifest.find(run)) is None:
        return
    for file, reason, is_recoverable in damaged_files(run, manifest):
        if not is_recoverable or not has_checkpoint(run):
            raise IntegrityError(f"{file} {reason}. {remedy(run, is_recoverable=is_recoverable)}")
        progress.warn(f"{file} {reason}; it is made again from the last checkpoint")
        artifact.retract_manifest(run)
        return


def remedy(run: Path, *, is_recoverable: bool = True) -> str:
    """What to do about a damaged file of a finished run; `is_recoverable`: a checkpoint, if there is one, can restore it."""
    if not is_recoverable:
        return f"Delete {run} and train again."
    if has_checkpoint(run):
        return "Train again (prefcache train CONFIG): only that is made again, from the last checkpoint."
    return f"No checkpoint is left to make it again from (train.checkpoints_at_end): delete {run} and train again."


def damaged_files(run: Path, manifest: RunManifest) -> Iterator[tuple[Path, str, bool]]:
    """Yield files that differ from the manifest: path, reason, and whether a checkpoint could restore it; those come last."""
    entries = [(run / table, entry, False) for table in PARTS for entry in manifest.table_files(table)]
    entries += [(run / "model", entry, True) for entry in manifest.model]
    entries += [(run, entry, True) for entry in [manifest.tokens] if entry]
    for folder, entry, is_recoverable in entries:
        if reason := artifact.damage(folder, entry):
            yield folder / entry.file, reason, is_recoverable


def resume_command(run: Path) -> str:
    """The command that resumes a run with its own settings, under its present name: it may have made room for another run."""
    return shlex.join(["prefcache", "train", str(run / "config.yaml"), "--set", f"train.run={run.name}"])


def make_room(folder: Path, inputs: RunInputs, progress: Progress) -> None:
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
