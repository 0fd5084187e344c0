"""What gc removes from a cache's folder besides rows: temporaries, claims of dead processes, and shards without a record.

A shard without a record may be one whose record a scorer is about to write. It is removed only if no process has
claimed its chunk, and if it is old or an earlier gc had noted that it was removing it. If a scorer without claims were
suspended for longer, its record would name a missing shard: that is noticed, and scored again.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact, claims, shards
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.records import SHARD_FILE, RemovalRecord, ShardRecord

_REMOVING = ".removing"  # lists the shards that gc is about to remove
# No scorer is this slow: between a shard and its record there are milliseconds.
OLD_SECONDS = 3600.0


class Upkeep(Protocol):
    """The files of a reference that are not rows, in a folder or in an object store."""

    n_kept: int  # shards without a record that a scorer or a reader may still want

    def claim(self) -> contextlib.AbstractContextManager[bool]:
        """Keep other gc's away for as long as the block runs; whether that succeeded."""

    def list_shards(self) -> list[str]:
        """List the shard files, with a record or without. Call it before opening the cache: a record follows its shard."""

    def count_leftovers(self) -> int:
        """Count temporaries and claims, of processes that are gone or still running."""

    def remove_leftovers(self, *, dry_run: bool) -> int:
        """Delete those of processes that are gone; return how many."""

    def remove_orphans(self, cache: Cache, orphans: Sequence[str], *, dry_run: bool) -> int:
        """Delete the shards without a record that no scorer can still want; return how many."""

    def remove(self, cache: Cache, records: Sequence[ShardRecord]) -> None:
        """Remove shards whose rows others hold."""


class FolderUpkeep:
    """The upkeep of a folder."""

    def __init__(self, folder: Path, old_seconds: float | None = None) -> None:
        self._folder = folder
        self.n_kept = 0
        self._old_seconds = OLD_SECONDS if old_seconds is None else old_seconds

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        path = claims.claim_path(self._folder, "gc")
        with claims.claim(path, wait=False) as is_mine:
            if is_mine:
                os.utime(path)
            yield is_mine

    def list_shards(self) -> list[str]:
        return sorted(
            path.name for path in self._folder.iterdir() if SHARD_FILE.fullmatch(path.name) and path.is_file()
        )

    def count_leftovers(self) -> int:
        return len(self._list_leftovers())

    def remove_leftovers(self, *, dry_run: bool) -> int:
        before = self._list_leftovers()
        if dry_run:
            return len(before)
        artifact.remove_leftovers(self._folder)
        claims.remove_free(self._folder)
        for path in self._list_leftovers():
            # Another machine's, whose processes cannot be asked for.
            if path.suffix == ".tmp" and self.is_old(path):
                path.unlink(missing_ok=True)
        return len(before) - len(set(before) & set(self._list_leftovers()))

    def remove_orphans(self, cache: Cache, orphans: Sequence[str], *, dry_run: bool) -> int:
        n_removed, begun = 0, set[str]()
        with contextlib.suppress(IntegrityError):
            begun = set(RemovalRecord.read(self._folder / _REMOVING).files)  # by a gc that was killed
        for path in (self._folder / name for name in orphans):
            if path.name not in begun and not self.is_old(path):
                continue
            if dry_run:
                n_removed += 1
                continue
            with claims.claim(claims.claim_path(self._folder, path.name.rpartition("-")[0]), wait=False) as is_free:
                if is_free and not may_be_named(cache, path.name):
                    path.unlink(missing_ok=True)
                    n_removed += 1
        if not dry_run and (self._folder / _REMOVING).is_file():
            (self._folder / _REMOVING).unlink(missing_ok=True)
        return n_removed

    def remove(self, cache: Cache, records: Sequence[ShardRecord]) -> None:
        # The records first: a record without its shard would be damage, a shard without its record is nothing.
        if not records:
            return
        RemovalRecord.make(files=[record.file for record in records]).commit(self._folder / _REMOVING)
        for record in records:
            artifact.member(self._folder, record.name).unlink(missing_ok=True)
        artifact.sync_folder(self._folder)
        for record in records:
            artifact.member(self._folder, record.file).unlink(missing_ok=True)
        (self._folder / _REMOVING).unlink(missing_ok=True)

    def is_old(self, path: Path) -> bool:
        """Whether no process can be about to use the file, by the clock of the file system, which other machines also write by."""
        clock = claims.claim_path(self._folder, "gc")
        try:
            now = clock.stat().st_mtime if clock.exists() else time.time()
            return now - path.stat().st_mtime > self._old_seconds
        except FileNotFoundError:
            return self._old_seconds < 0

    def _list_leftovers(self) -> list[Path]:
        mine = claims.claim_path(self._folder, "gc")
        temporaries = (path for path in self._folder.glob(".*.tmp") if artifact.TEMPORARY.fullmatch(path.name))
        held = self._folder.glob(f".*{claims.SUFFIX}")
        return [path for path in (*temporaries, *held) if path != mine and path.is_file()]


def may_be_named(cache: Cache, shard: str) -> bool:
    """Whether a record names the shard that came after the cache was opened, or cannot be read.

    The record of the shard's own chunk is read in any case: it may have been discarded and committed anew.
    """
    chunk = shard.rpartition("-")[0]
    for path in shards.list_records(cache.folder):
        if path.name not in cache.listed or path.stem == chunk:
            try:
                if ShardRecord.read(path).file == shard:
                    return True
            except IntegrityError:
                return True
    return False
