"""What of an experiment no command needs any more, and what is left alone and why. Looks, and changes nothing.

Never listed: models, data (also what was read from standard input), scores, tables, reports; anything that a command is at work
on; anything behind a link.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact, claims, disk_usage
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training import checkpoints
from prefcache.pipeline.training.run_log import PROVENANCE

Kind = Literal["checkpoints", "leftovers", "kept", "stopped", "parts", "other-machines"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Removed only if a user names them: somebody may still want them.
OPTIONAL: dict[Kind, str] = {
    "kept": "checkpoints of finished runs that train.checkpoints_at_end: keep has kept",
    "stopped": "the last checkpoints of runs that a callback stopped, which can be continued from there",
    "parts": "prepared parts, from which an interrupted preparation with other settings would resume",
    "other-machines": "unfinished files of processes on other machines, which may still be at work",
}


@dataclass(frozen=True, kw_only=True)
class Removable:
    kind: Kind
    area: str  # the folder in the experiment: the name of a run, prepared, scored
    paths: Sequence[Path]
    why: str
    bytes: int  # that removing them frees


@dataclass(frozen=True)
class LeftAlone:
    path: Path
    why: str


@dataclass(frozen=True)
class Survey:
    removable: Sequence[Removable]
    left_alone: Sequence[LeftAlone]  # although it looks removable


def list_areas(experiment: Path) -> list[str]:
    """List the folders of an experiment that a command works on, each under a claim of its own."""
    runs = sorted(path.parent.name for path in experiment.glob(f"*/{PROVENANCE}"))
    return [*(name for name in ("prepared", "scored") if (experiment / name).is_dir()), *runs]


def claim_name(area: str) -> str:
    return {"prepared": "prepare", "scored": "score"}.get(area, f"train-{area}")


def survey(experiment: Path, area: str, *, every_byte: bool = False) -> Survey:
    """Look at one area of an experiment. With `every_byte`, hash the model whose checkpoints would go."""
    found = [*_look_at(experiment, area, every_byte)]
    return Survey(
        [each for each in found if isinstance(each, Removable)], [each for each in found if isinstance(each, LeftAlone)]
    )


def find_user(experiment: Path, area: str) -> LeftAlone | None:
    """Say who is at work on an area; None if nobody is."""
    holder = claims.probe_holder(experiment, claim_name(area))
    return LeftAlone(experiment / area, f"is in use ({holder})") if holder else None


def _look_at(experiment: Path, area: str, every_byte: bool) -> Iterator[Removable | LeftAlone]:
    folder = experiment / area
    if folder.resolve() != experiment.resolve() / area:
        yield LeftAlone(folder, "is a link, which is not followed")
        return
    if (folder / PROVENANCE).exists():
        yield from _look_at_checkpoints(folder, every_byte)
    if area == "prepared" and (folder / artifact.MANIFEST).exists() and (parts := sorted(folder.glob(".parts-*"))):
        yield _removable("parts", folder, parts, "parts of an interrupted preparation with other settings")
    yield from _look_at_temporaries(folder)


def _look_at_checkpoints(run: Path, every_byte: bool) -> Iterator[Removable | LeftAlone]:
    folder = run / checkpoints.FOLDER
    if folder.is_symlink():
        yield LeftAlone(folder, "is a link, which is not followed")
        return
    try:
        manifest = RunManifest.find(run)
    except IntegrityError as error:
        yield LeftAlone(run, f"cannot be judged: {error}")
        return
    if manifest is None:  # it resumes from them
        return
    found = [*checkpoints.find_superfluous(run, keep=0), *checkpoints.find_moving_reference(run)]
    if found and any(artifact.damage(run / "model", entry, every_byte=every_byte) for entry in manifest.model):
        yield LeftAlone(folder, "is needed: the model is damaged, and is made again from the last checkpoint")
        return
    needed = set(found) - {*checkpoints.find_superfluous(run, keep=1)} if manifest.stopped else set()
    removable: dict[Kind, list[Path]] = {"checkpoints": [], "kept": [], "stopped": []}
    for path in found:
        kind: Kind = "stopped" if path in needed else "kept" if manifest.checkpoints == "keep" else "checkpoints"
        if path.is_symlink():
            yield LeftAlone(path, "is a link, which is not followed")
        elif path.parent == folder and (file := checkpoints.find_foreign_file(path)):
            yield LeftAlone(path, f"holds {file}, which is not a checkpoint's")
        else:
            removable[kind].append(path)
    why: dict[Kind, str] = {
        "checkpoints": "a finished run does not need its checkpoints",
        "kept": "checkpoints that train.checkpoints_at_end: keep has kept",
        "stopped": "the checkpoint from which this stopped run can be continued",
    }
    yield from (_removable(kind, run, paths, why[kind]) for kind, paths in removable.items() if paths)


def _look_at_temporaries(folder: Path) -> Iterator[Removable]:
    every, ended = artifact.find_temporaries(folder), artifact.find_leftovers(folder)
    outer = [path for path in every if not any(parent in every for parent in path.parents)]
    own = [path for path in outer if path in ended]
    others = [path for path in outer if not artifact.is_own_temporary(path)]
    if own:
        yield _removable("leftovers", folder, own, "unfinished files of processes that have ended")
    if others:
        yield _removable("other-machines", folder, others, "unfinished files of processes on other machines")


def _removable(kind: Kind, folder: Path, paths: Sequence[Path], why: str) -> Removable:
    return Removable(kind=kind, area=folder.name, paths=paths, why=why, bytes=disk_usage.count_freed(paths))
