"""download: put prepared data from an object store where prepare would have put it."""

from pathlib import Path

from prefcache.command_results import DownloadResult
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import claims
from prefcache.pipeline.stored.object_store import open_store
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.prepared_store import fetch_prepared, split_url


def run(url: str, out: Path, progress: Progress) -> DownloadResult:
    """Fetch into OUT/prepared what it lacks; refuse a folder with other data."""
    root, prepared_id = split_url(url)
    store, folder = open_store(root), out / "prepared"
    out.mkdir(parents=True, exist_ok=True)
    with claims.claim_stage(out, "prepare", "name another place (--out)"):
        already = store.bytes["received"]
        prepared = Prepared(fetch_prepared(store, prepared_id, folder))
    return DownloadResult(
        prepared=folder,
        url=url,
        kind=prepared.kind,
        examples=sum(shard.rows for shard in prepared.manifest.shards),
        received=store.bytes["received"] - already,
    )
