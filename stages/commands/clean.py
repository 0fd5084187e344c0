"""clean: say what of an experiment no command needs any more, and remove it when told."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from prefcache import view_sources
from prefcache.command_results import CleanResult
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact, claims
from prefcache.pipeline.training import checkpoints
from prefcache.pipeline.training.removable import (
    OPTIONAL,
    Kind,
    LeftAlone,
    Removable,
    Survey,
    claim_name,
    find_user,
    list_areas,
    survey,
)


def run(where: str | None, names: Collection[str] = (), also: Collection[Kind] = (), yes: bool = False) -> CleanResult:
    """Survey the experiment that a config or its folder names, or only these of its runs; with `yes`, remove what was found.

    `also` names optional kinds. What a command is at work on is left alone.
    """
    folder = view_sources.find_experiment(where)
    view_sources.refuse_unknown_runs(folder, names)
    items, optional, left_alone, failed = list[Removable](), list[Removable](), list[LeftAlone](), dict[str, str]()
    for area in names or list_areas(folder):
        if user := find_user(folder, area):
            left_alone.append(user)
            continue
        found = survey(folder, area)
        if yes and any(_is_chosen(each, also) for each in found.removable):
            found = _remove(folder, area, also, failed)
        items += [each for each in found.removable if _is_chosen(each, also)]
        optional += [each for each in found.removable if not _is_chosen(each, also)]
        left_alone += found.left_alone
    return CleanResult(
        folder=folder,
        removed=yes,
        bytes=sum(each.bytes for each in items),
        items=items,
        optional=optional,
        left_alone=left_alone,
        failed=failed,
    )


def refuse_failure(result: CleanResult) -> None:
    """Raise UsageError if something could not be removed."""
    for path, reason in result.failed.items():
        raise UsageError(f"{path} cannot be removed ({reason}). Change its permissions, or remove it as its owner.")


def _is_chosen(found: Removable, also: Collection[Kind]) -> bool:
    return found.kind not in OPTIONAL or found.kind in also


def _remove(folder: Path, area: str, also: Collection[Kind], failed: dict[str, str]) -> Survey:
    """Look again under the claim, hash the model, and remove what is chosen; return it without what `failed` then names."""
    try:
        with claims.claim_stage(folder, claim_name(area), "name other runs (--run)"):
            found = survey(folder, area, every_byte=True)
            done = [each for each in found.removable if not _is_chosen(each, also) or _discard(each, failed)]
            checkpoints.remove_empty_folder(folder / area)
    except UsageError as error:  # somebody was faster
        return Survey([], [LeftAlone(folder / area, f"is in use: {error}")])
    return replace(found, removable=done)


def _discard(found: Removable, failed: dict[str, str]) -> bool:
    """Remove it; return whether that was possible."""
    for path in found.paths:
        try:
            artifact.discard(path)
        except OSError as error:
            failed[str(path)] = error.strerror or str(error)
    return not any(str(path) in failed for path in found.paths)
