"""gc: remove what no process needs from a cache, and merge small shards."""

from collections.abc import Sequence

from prefcache.command_results import GcResult
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.mirror import show_place


def run(
    paths: Sequence[str],
    progress: Progress,
    target_mib: float,
    dry_run: bool = False,
    features_unused_for: float | None = None,
) -> GcResult:
    """Clean up every cache among `paths`; merged shards have about `target_mib` before compression.

    Stores of vision towers that no command has opened for `features_unused_for` days are removed.
    """
    caches = []
    for folder in cache_maintenance.find_caches(paths):
        progress.say(f"gc: reading all of {show_place(folder)}")
        size = int(target_mib * 2**20)
        caches.append(cache_maintenance.gc(folder, size, dry_run, features_unused_for=features_unused_for))
    return GcResult(caches, sum(len(cache.damaged) for cache in caches), dry_run)
