"""Which shards of a cache were hashed and found whole, so that opening it again reads a tenth of the bytes."""

import time
from pathlib import Path
from typing import Literal

from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.memos import VerifiedMemo
from prefcache.pipeline.stored.mirror import Mirror, find_mirror
from prefcache.pipeline.stored.records import FeaturesRecord, ShardRecord

# A file changed twice within a tick of the clock shows the same times, so younger files are not noted.
SETTLED_SECONDS = 2.0
Remember = Literal["all", "damage", "nothing"]
Stamp = tuple[int, int, int, int, str]  # size, times of change, inode; and the checksum that the file then had


def memo_path(folder: Path) -> Path:
    return folder.parent / f".verified-{folder.name}.json"


class VerifiedShards:
    """The memo next to a cache. `remember`: what is written to it.

    A command that only reads writes nothing. With "damage", only shards found damaged are removed from the memo, so
    that the next scorer hashes them.
    """

    def __init__(self, folder: Path, remember: Remember) -> None:
        self._folder, self._file = folder, memo_path(folder)
        self._remember, self._now, self._mirror = remember, time.time(), find_mirror(folder)
        memo = VerifiedMemo.recall(self._file)
        self._before: dict[str, Stamp] = dict(memo.known) if memo else {}
        self._known, self._seen, self._damaged = dict(self._before), set[str](), set[str]()
        self._suspects_before = set(memo.suspects) if memo else set[str]()
        self._suspects = set(self._suspects_before)

    def find_damage(self, record: ShardRecord | FeaturesRecord, every_byte: bool) -> str | None:
        """What is wrong with a shard; None if it is as it was written."""
        name, stamp = record.file, self._stamp(record)
        self._seen.add(name)
        if not every_byte and stamp is not None and self._known.get(name) == stamp and record.checks_values:
            return None
        self._known.pop(name, None)
        reason = artifact.damage(self._folder, record)
        if reason is not None and self._mirror is not None and isinstance(record, ShardRecord):
            # No whole copy is here, or a damaged one. The store says whether the shard exists.
            artifact.member(self._folder, name).unlink(missing_ok=True)
            return self._find_damage_in_store(self._mirror, record)
        if reason is not None:
            self._damaged.add(name)
        elif stamp is not None and stamp == self._stamp(record) and max(stamp[1:3]) / 1e9 < self._now - SETTLED_SECONDS:
            self._known[name] = stamp
        return reason

    def _find_damage_in_store(self, mirror: Mirror, record: ShardRecord) -> str | None:
        """What the listing says of a shard. One in which damage was found is read as a whole, until it is right."""
        if record.file in self._suspects:
            if reason := mirror.fetch(self._folder, [record]).get(record.file):
                return reason
            self._suspects.discard(record.file)
        return mirror.find_damage(self._folder, record)

    def forget(self, record: ShardRecord | FeaturesRecord) -> None:
        """Remove a shard whose damage only reading has shown."""
        self._seen = set(self._known)
        self._known.pop(record.file, None)
        self._damaged.add(record.file)
        if self._mirror is not None:
            self._suspects.add(record.file)

    def save(self) -> None:
        if self._remember == "nothing":
            return
        known = {name: stamp for name, stamp in self._known.items() if name in self._seen}
        if self._remember == "damage":
            known = {name: stamp for name, stamp in self._before.items() if name not in self._damaged}
        if known != self._before or self._suspects != self._suspects_before:
            VerifiedMemo.make(known=known, suspects=sorted(self._suspects)).remember(self._file)

    def _stamp(self, record: ShardRecord | FeaturesRecord) -> Stamp | None:
        if not artifact.is_inside(self._folder, record.file):
            return None
        try:
            stat = (self._folder / record.file).stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.xxh3_128
