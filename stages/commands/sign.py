"""sign: vouch for the rows of a cache with an SSH key."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from prefcache.command_results import SignedCache, SignResult
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Progress, counting
from prefcache.pipeline.stored import cache_maintenance, signatures
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.mirror import show_place
from prefcache.pipeline.stored.records import REFERENCE_FILE, SignedRecord
from prefcache.pipeline.visible_text import count


def run(paths: Sequence[str], key_file: Path, progress: Progress) -> SignResult:
    """Sign what no valid statement of this key covers, in every reference's cache among `paths`."""
    folders = [each for each in cache_maintenance.find_caches(paths) if (each / REFERENCE_FILE).exists()]
    if not folders:
        raise UsageError(f"{', '.join(paths)}: there is no cache of a reference, and only those are signed. Name one.")
    key = signatures.SigningKey(key_file)
    signatures.refuse_unusable_key(key, None)
    return SignResult(key=key.fingerprint, caches=[_sign(folder, key, progress) for folder in folders])


def _sign(folder: Path, key: signatures.SigningKey, progress: Progress) -> SignedCache:
    place = show_place(folder)
    progress.say(f"sign: reading all of {place}")
    # Opened before it is verified: what comes meanwhile is not signed.
    cache = Cache(folder, None, remember="nothing")
    verified = cache_maintenance.verify(folder)
    if verified.damaged:
        first = next(iter(verified.damaged.values()))
        raise IntegrityError(
            f"{count(len(verified.damaged), 'file')} of {place} are damaged, so nothing of it was signed: {first}. "
            f"`prefcache verify {place}` lists them and says what to do."
        )
    by_me = set[SignedRecord]().union(*signatures.find_signed_by(folder, cache.reference, key).values())
    with counting(f"hash {place}", len(cache.records), "shards") as counter:
        found = []
        for record in cache.records:
            # gc may have merged it.
            with contextlib.suppress(FileNotFoundError):
                found.append(signatures.describe(folder, record))
            counter.add(1)
    new = [each for each in found if each not in by_me]
    writer = CacheWriter(cache, key)
    writer.sign(new, key)
    writer.merge_statements()
    return SignedCache(folder=folder, place=place, signed=len(new), already=len(found) - len(new))
