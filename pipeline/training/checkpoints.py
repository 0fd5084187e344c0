"""Checkpoints: whole or absent, in safetensors and JSON only, with a manifest of checksums over all files.

A checkpoint that names an earlier step as the best (best_checkpoint.py) needs that step's checkpoint: that one is kept for as long,
and without it the later one counts as damaged.

PyTorch is imported only where tensors are written or read: commands that list checkpoints do without it.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.progress import working
from prefcache.pipeline.stored import artifact, disk_usage
from prefcache.pipeline.stored.records import BestEntry, CheckpointManifest, NewerError, StoppedEntry

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights.safetensors"
MOVING_REFERENCE = "reference"  # folder with the weights of a moving reference, which each checkpoint has as well
REFERENCE_WEIGHTS, REFERENCE_SCORES = "reference.safetensors", "reference-scores.safetensors"  # of a moving reference
_OPTIMIZER = "optimizer.safetensors"
FOLDER = "checkpoints"
_NAME = re.compile(r"step-[0-9]{8}")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds besides tensors.

    The order of the examples and every random draw follow from the seed and the step. Log-probs and alerts are in the run's
    tables, which are flushed before each checkpoint.
    """

    step: int = 0
    num_tokens: int = 0
    running_stats: dict[str, dict[str, float]] = field(default_factory=dict)  # of losses, by term and statistic
    best: BestEntry | None = None
    stopped: StoppedEntry | None = None  # by a callback: the run ends with this step

    @classmethod
    def from_manifest(cls, manifest: CheckpointManifest) -> "CheckpointState":
        return cls(manifest.step, manifest.num_tokens, manifest.memory, manifest.best, manifest.stopped)

    def manifest(self, files: list[dict[str, object]]) -> CheckpointManifest:
        return CheckpointManifest.make(
            step=self.step,
            num_tokens=self.num_tokens,
            memory=self.running_stats,
            best=self.best,
            files=files,
            **({"stopped": self.stopped} if self.stopped else {}),
        )


def save(
    run: Path,
    save_weights: Callable[[Path], None],
    optimizer: dict[str, "torch.Tensor"],
    state: CheckpointState,
    keep: int,
) -> None:
    """Commit a checkpoint, then delete all but the newest `keep` and the best ones that those name."""
    from safetensors.torch import save_file

    folder = path(run, state.step)
    with working(f"save {folder.name}"), artifact.commit_folder(folder) as temporary:
        save_weights(temporary)
        save_file({name: tensor.contiguous().cpu() for name, tensor in optimizer.items()}, temporary / _OPTIMIZER)
        files = [artifact.describe(file) for file in sorted(temporary.iterdir())]
        state.manifest(files).commit(temporary / artifact.MANIFEST)
    # Later ones were passed over as damaged and must not push this one out.
    saved = [old for old in _newest_first(run) if old.name <= folder.name]
    for old in _superfluous(saved, keep):
        artifact.discard(old)


def find_superfluous(run: Path, keep: int) -> list[Path]:
    """List all checkpoints but the newest `keep` and the best ones that those name."""
    return _superfluous(_newest_first(run), keep)


def has_superfluous(run: Path, keep: int) -> bool:
    """Whether `remove_superfluous` has anything to do."""
    folder = run / FOLDER
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return True
    return bool(find_superfluous(run, keep) or find_moving_reference(run) or artifact.find_leftovers(folder))


def remove_superfluous(run: Path, keep: int) -> int:
    """Delete all but the newest `keep` and the best ones that those name; return the bytes that this frees.

    With them go the weights of a moving reference, and their folder if nothing else is in it.
    """
    artifact.remove_leftovers(run / FOLDER)
    folders = [*find_superfluous(run, keep), *find_moving_reference(run)]
    n_bytes = disk_usage.count_freed(folders)
    for folder in folders:
        artifact.discard(folder)
    remove_empty_folder(run)
    return n_bytes


def remove_empty_folder(run: Path) -> None:
    """Delete the folder of a run's checkpoints if nothing is in it."""
    with contextlib.suppress(OSError):
        (run / FOLDER).rmdir()


def find_newest(
    run: Path,
    warn: Callable[[str], None],
    more_files: Callable[[int], set[str]] = lambda step: set(),
    *,
    every_byte: bool = True,
) -> tuple[Path, CheckpointState] | None:
    """Return the newest whole checkpoint; warn of damaged ones and pass them over. `more_files` names a step's further files.

    Without `every_byte`, for a listing: files of the right size count as whole.
    """
    for folder in _newest_first(run):
        try:
            manifest = _verified_manifest(folder, every_byte)
            if missing := more_files(manifest.step) - {entry.file for entry in manifest.files}:
                raise IntegrityError(f"{folder} has a manifest that does not list {min(missing)}.")
            if (best := _best_of(folder)) is not None:
                _verified_manifest(best, every_byte)
            return folder, CheckpointState.from_manifest(manifest)
        except NewerError:
            raise
        except IntegrityError as error:
            warn(f"{error} Going back to the checkpoint before it.")
    return None


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which `find_newest` passed over."""
    for folder in _newest_first(run):
        if folder > path(run, step):
            artifact.discard(folder)


def path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08}"


def read_optimizer(folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield one tensor after another: a process that holds a shard may have no room for all."""
    from prefcache.pipeline.model.trainable import read_tensors

    return read_tensors(folder / _OPTIMIZER)


def _newest_first(run: Path) -> list[Path]:
    """List the run's checkpoints. Folders under other names, such as a user's copies, are left alone."""
    folders = (run / FOLDER).glob("step-*")
    return sorted((folder for folder in folders if _NAME.fullmatch(folder.name) and folder.is_dir()), reverse=True)


def find_foreign_file(folder: Path) -> str | None:
    """Name a file in a checkpoint's folder that no checkpoint has; None if there is none."""
    own = {artifact.MANIFEST, WEIGHTS, _OPTIMIZER, REFERENCE_WEIGHTS, REFERENCE_SCORES}
    return min((path.name for path in folder.iterdir() if path.name not in own or path.is_dir()), default=None)


def find_moving_reference(run: Path) -> list[Path]:
    """The folder of a moving reference's weights, if there is one and it holds nothing else."""
    folder = run / MOVING_REFERENCE
    is_ours = folder.is_dir() and not folder.is_symlink() and [each.name for each in folder.iterdir()] == [WEIGHTS]
    return [folder] if is_ours else []


def _superfluous(newest_first: list[Path], keep: int) -> list[Path]:
    kept = newest_first[:keep]
    return sorted(set(newest_first) - {*kept, *map(_best_of, kept)})


def _best_of(folder: Path) -> Path | None:
    """The checkpoint that this one names as the best; None if it names none or is damaged."""
    try:
        manifest = CheckpointManifest.find(folder)
    except IntegrityError:
        return None
    return path(folder.parent.parent, manifest.best.step) if manifest and manifest.best else None


def _verified_manifest(folder: Path, every_byte: bool) -> CheckpointManifest:
    manifest = CheckpointManifest.find(folder)
    if manifest is None:
        raise IntegrityError(f"{folder} has no manifest.")
    if folder != path(folder.parent.parent, manifest.step):
        raise IntegrityError(f"{folder} holds the state of step {manifest.step}.")
    if manifest.best and manifest.best.step > manifest.step:
        raise IntegrityError(f"{folder} names a later step, {manifest.best.step}, as the best.")
    if missing := {WEIGHTS, _OPTIMIZER} - {entry.file for entry in manifest.files}:
        raise IntegrityError(f"{folder} has a manifest that does not list {min(missing)}.")
    for entry in manifest.files:
        if reason := artifact.damage(folder, entry, every_byte=every_byte):
            raise IntegrityError(f"{folder / entry.file} {reason}.")
    return manifest
