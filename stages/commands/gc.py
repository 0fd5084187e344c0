"""gc: remove what no process needs from a cache, and merge small shards."""

from collections.abc import Sequence

from prefcache.command_results import GcResult
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.mirror import show_place


def run(paths: Sequence[str], progress: Progress, target_mib: float, dry_run: bool = False) -> GcResult:
    """Clean up every cache among `paths`; merged shards have about `target_mib` before compression."""
    caches = []
    for folder in cache_maintenance.find_caches(paths):
        progress.say(f"gc: reading all of {show_place(folder)}")
        caches.append(cache_maintenance.gc(folder, int(target_mib * 2**20), dry_run))
    return GcResult(caches, sum(len(cache.damaged) for cache in caches), dry_run)
