"""verify: check every byte and every row of a cache."""

from collections.abc import Iterable, Sequence

from prefcache.command_results import GcResult, VerifyResult
from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.safetensors_files import shorten_list
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.mirror import show_place
from prefcache.pipeline.visible_text import count


def run(paths: Sequence[str], progress: Progress) -> VerifyResult:
    """Check every cache among `paths`."""
    caches = []
    for folder in cache_maintenance.find_caches(paths):
        progress.say(f"verify: reading all of {show_place(folder)}")
        caches.append(cache_maintenance.verify(folder))
    return VerifyResult(caches, sum(len(cache.damaged) for cache in caches))


def refuse_damage(result: VerifyResult | GcResult) -> None:
    """Fail with what to do about the damage that verify or gc found."""
    if not result.damaged:
        return
    newer = _join_paths((cache.place, cache.newer) for cache in result.caches)
    malformed = _join_paths((cache.place, cache.malformed) for cache in result.caches)
    damaged = _join_paths((cache.place, cache.damaged) for cache in result.caches)
    others = sorted({*damaged} - {*newer, *malformed})
    sentences = []
    if others:
        folders = ", ".join(sorted({path.rpartition("/")[0] for path in others}))
        are, they = ("is", "it") if len(others) == 1 else ("are", "they")
        sentences.append(
            f"{count(len(others), 'file')} of {folders} {are} damaged. Score again (prefcache score CONFIG): only what {they} held "
            "is computed. If that finds nothing to do, first delete the .json file of a shard named above."
        )
    if malformed:
        are, them = ("is", "it") if len(malformed) == 1 else ("are", "them")
        sentences.append(
            f"{shorten_list(malformed)} {are} unchanged since written, but not valid: no prefcache writes such a record. "
            f"Remove {them}, then score again (prefcache score CONFIG)."
        )
    if newer:
        were, them = ("was", "it") if len(newer) == 1 else ("were", "them")
        sentences.append(
            f"{shorten_list(newer)} {were} written by a newer prefcache. Upgrade prefcache to read {them}; do not remove {them}."
        )
    raise IntegrityError(" ".join(sentences))


def _join_paths(files: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    return [f"{folder}/{name}" for folder, names in files for name in names]
