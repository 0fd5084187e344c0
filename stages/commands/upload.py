"""upload: send prepared data to the object store of the cache, for machines that score and train."""

from pathlib import Path

from prefcache.command_results import UploadResult
from prefcache.pipeline import cache_place
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import claims
from prefcache.pipeline.stored.object_store import open_store
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.prepared_store import list_files, send_prepared


def run(config: Config, progress: Progress) -> UploadResult:
    if not cache_place.is_url(config.cache):
        raise UsageError(
            f"The cache is a folder ({config.cache}), and prepared data is sent to an object store. Name one (--set "
            f"cache=s3://bucket/refs). Machines that share the disk of {config.out} need no upload."
        )
    prepared = Prepared(config.prepared)
    prepared_inputs.warn_if_stale(config, progress)
    store = open_store(cache_place.parse_url(config.cache))
    # prepare replaces no data that is being read.
    with claims.claim_stage(Path(config.out), "upload", "name another place (out)", prepared.id):
        already = store.bytes["sent"]
        url = send_prepared(prepared, store)
    files = list_files(prepared.manifest)
    return UploadResult(
        prepared=prepared.folder,
        url=url,
        files=len(files) + 1,
        bytes=sum(entry.bytes for entry in files),
        sent=store.bytes["sent"] - already,
    )
