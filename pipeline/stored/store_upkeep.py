"""What gc removes from a reference's folder in an object store: claims of dead scorers, and shards without a record.

Nothing tells which machines read or write a store. So whatever a scorer or a reader of the last day may still want is kept
for a day: shards without a record, and those whose rows a merged shard holds. Their records go at once, so that nobody
who lists the store reads rows twice; a reader that holds an older listing still finds the shards.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.folder_upkeep import may_be_named
from prefcache.pipeline.stored.mirror import Mirror
from prefcache.pipeline.stored.object_store import StoredObject
from prefcache.pipeline.stored.records import SHARD_FILE, RemovalRecord, ShardRecord
from prefcache.pipeline.stored.store_writer import CLAIMS, StoreClaims

DAY_SECONDS = 86_400.0
_REMOVED = "removed"  # a folder with a list of the shards that each gc has replaced


class StoreUpkeep:
    """The upkeep of a reference's folder in a store."""

    def __init__(self, mirror: Mirror, folder: Path, old_seconds: float | None = None) -> None:
        self._mirror, self._store, self._folder = mirror, mirror.store, folder
        self._old_seconds = DAY_SECONDS if old_seconds is None else old_seconds
        self.n_kept = 0  # shards without a record that are not old enough

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        claims = StoreClaims(self._store, self._folder.name)
        is_mine = claims.try_claim("gc") or claims.claim_if_silent("gc")
        try:
            yield is_mine
        finally:
            if is_mine:
                claims.release("gc")
            claims.close()

    def list_shards(self) -> list[str]:
        names = [found.name.removeprefix(f"{self._folder.name}/") for found in self._list("")]
        return sorted(name for name in names if SHARD_FILE.fullmatch(name))

    def count_leftovers(self) -> int:
        return len(self._list_claims())

    def remove_leftovers(self, *, dry_run: bool) -> int:
        dead = [found for found in self._list_claims() if self._is_old(found)]
        if not dry_run:
            list(self._store.parallel(lambda found: self._store.delete(found.name), dead))
        return len(dead)

    def remove_orphans(self, cache: Cache, orphans: Sequence[str], *, dry_run: bool) -> int:
        lists = self._list(f"{_REMOVED}/")
        old = [found for found in lists if self._is_old(found)]
        replaced = {name for found in old for name in self._read_removed(found)}
        waiting = {name for found in lists if found not in old for name in self._read_removed(found)}
        self._mirror.refresh(self._folder)  # for records that came meanwhile

        def remove(name: str) -> bool | None:
            """Delete a shard that nobody wants. Return whether it was unwanted, or None if it is gone or a record names it now."""
            # Asked for just before it is deleted: a scorer may have written it anew.
            found = self._store.head(f"{self._folder.name}/{name}")
            if found is None or may_be_named(cache, name):
                return None
            # A replaced shard was written long ago; what counts is when it was replaced.
            is_unwanted = name in replaced or (name not in waiting and self._is_old(found))
            if is_unwanted and not dry_run:
                self._store.delete(found.name)
            return is_unwanted

        removed = Counter(self._store.parallel(remove, orphans))
        self.n_kept += removed[False]
        if not dry_run:
            list(self._store.parallel(lambda found: self._store.delete(found.name), old))
        return removed[True]

    def remove(self, cache: Cache, records: Sequence[ShardRecord]) -> None:
        if not records:
            return
        removal = RemovalRecord.make(files=[record.file for record in records]).seal()
        name = hashlib.blake2b(removal, digest_size=16).hexdigest()
        self._store.create(f"{self._folder.name}/{_REMOVED}/{name}.json", removal)
        delete = self._mirror.delete_record
        list(self._store.parallel(lambda record: delete(self._folder, record.name), records))
        self.n_kept += len(records)

    def _list(self, below: str) -> list[StoredObject]:
        return self._store.list_objects(f"{self._folder.name}/{below}")

    def _list_claims(self) -> list[StoredObject]:
        return [found for found in self._list(f"{CLAIMS}/") if not found.name.endswith("/gc")]

    def _read_removed(self, found: StoredObject) -> list[str]:
        path = self._folder / _REMOVED / found.name.rpartition("/")[2]  # it lies in the store only
        with contextlib.suppress(IntegrityError, FileNotFoundError):
            return RemovalRecord.read_bytes(self._store.get(found.name), path).files
        return []

    def _is_old(self, found: StoredObject) -> bool:
        return (datetime.now(UTC) - found.modified).total_seconds() > self._old_seconds
