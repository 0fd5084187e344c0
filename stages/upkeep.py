"""verify and gc: whether a cache is what was written into it, and what of it can be put away."""

from dataclasses import asdict
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.progress import Progress
from pipeline.stored import upkeep
from pipeline.stored.upkeep import TARGET_MIB


def verify(paths: list[str], progress: Progress) -> dict[str, Any]:
    """What every cache among `paths` holds, and what is wrong with it."""
    found = []
    for folder in upkeep.find_caches(paths):
        progress.say(f"verify: reading all of {folder}")
        found.append(_plain(upkeep.verify(folder)))
    return {"caches": found, "damaged": sum(len(each["damaged"]) for each in found)}


def refuse_damage(result: dict[str, Any]) -> None:
    """What to do about what verify or gc has found."""
    if result["damaged"]:
        where = ", ".join(str(each["folder"]) for each in result["caches"] if each["damaged"])
        raise IntegrityError(
            f"{result['damaged']} files of {where} are damaged. Score again (make score): only what they held is computed. "
            "Where that finds nothing to do, delete the .json file of a shard named above first."
        )


def gc(paths: list[str], progress: Progress, target_mib: float = TARGET_MIB, dry_run: bool = False) -> dict[str, Any]:
    """Remove what nothing needs from every cache among `paths`, and merge small shards."""
    done = []
    for folder in upkeep.find_caches(paths):
        progress.say(f"gc: reading all of {folder}")
        done.append(_plain(upkeep.gc(folder, int(target_mib * 2**20), dry_run)))
    damaged = sum(len(each["damaged"]) for each in done)
    return {"caches": done, "damaged": damaged, "dry_run": dry_run}


def _plain(found: Any) -> dict[str, Any]:
    return {**asdict(found), "folder": str(found.folder)}
