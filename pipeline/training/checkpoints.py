"""Checkpoints: complete or not there. Safetensors and JSON only; a manifest of checksums vouches for all files.

One whose state names an earlier step as the best (best.py) needs that one's checkpoint: it is kept as long, and without it
the later one does not count as whole.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.errors import IntegrityError
from pipeline.model.trainable import each_tensor
from pipeline.stored import artifact

_OPTIMIZER = "optimizer.safetensors"


def save(
    run: Path,
    step: int,
    save_weights: Callable[[Path], None],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> None:
    folder = at(run, step)
    with artifact.commit_folder(folder) as temporary:
        save_weights(temporary)
        save_file({name: tensor.contiguous().cpu() for name, tensor in optimizer.items()}, temporary / _OPTIMIZER)
        files = [artifact.describe(file) for file in sorted(temporary.iterdir())]
        artifact.commit_manifest(temporary, {"step": step, **state, "files": files})
    # A later one was passed over as damaged, and is no reason to drop this one.
    found = [old for old in _newest_first(run) if old.name <= folder.name]
    for old in set(found) - {*found[:keep], *map(_best_of, found[:keep])}:
        shutil.rmtree(old)


def newest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole; a damaged one is named and passed over."""
    for folder in _newest_first(run):
        try:
            state = _verified(folder)
            if (best := _best_of(folder)) is not None:
                _verified(best)
            return folder, state
        except IntegrityError as error:
            warn(f"{error} Going back to the checkpoint before it.")
    return None


def go_back(run: Path, step: int) -> None:
    """Forget what came after a step: those that `newest` passed over."""
    for folder in _newest_first(run):
        if folder > at(run, step):
            shutil.rmtree(folder)


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def optimizer(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor after another: a process that holds a shard may have no room for all."""
    return each_tensor(folder / _OPTIMIZER)


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _best_of(folder: Path) -> Path | None:
    """The checkpoint that this one names as the best; None where it names none or is damaged."""
    try:
        best = (artifact.read_manifest(folder) or {}).get("best")
    except IntegrityError:
        return None
    return at(folder.parent.parent, best["step"]) if best else None


def _verified(folder: Path) -> dict[str, Any]:
    manifest = artifact.read_manifest(folder)
    if manifest is None:
        raise IntegrityError(f"{folder} has no manifest.")
    for entry in manifest["files"]:
        if reason := artifact.damage(folder, entry):
            raise IntegrityError(f"{folder / entry['file']} {reason}.")
    return manifest
