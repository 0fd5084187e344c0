"""The mirror of an object store: a cache folder on this machine that holds what was read of the store and what was made here.

Its records are those of the store as of the last listing; a shard is here as a whole, in parts, or not at all. Everything
that reads a cache reads the mirror, and asks it for what is missing. Shards and records never change, so a copy is right
or damaged, never old. A damaged copy is dropped and read again: it says nothing about the store.

In the store lies what would lie in a folder, under the same names. A shard's name holds a hash of its content, so that
putting it twice changes nothing; of its record the first one wins.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.pipeline import stored_paths
from prefcache.pipeline.cache_place import is_url, local_folder, parse_url
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored import artifact, partial_file
from prefcache.pipeline.stored.memos import ListingMemo
from prefcache.pipeline.stored.object_store import ObjectStore, StoredObject, open_store, refuse_escape
from prefcache.pipeline.stored.partial_file import Block, PartialFile
from prefcache.pipeline.stored.records import (
    REFERENCE_FILE,
    SHARD_FILE,
    SHARD_RECORD_FILE,
    STATEMENT_FILE,
    MalformedError,
    ReferenceRecord,
    ShardRecord,
    StoreRecord,
)

STORE_FILE = "store.json"
LIMIT_VARIABLE = "PREFCACHE_MIRROR_GIB"
_DEFAULT_GIB = 100.0
# Files that some process has used within this time are kept, whatever the limit.
_KEPT_SECONDS = 3600.0
# Above this part of a shard, its whole is read, which its checksum then covers.
_WORTH_ALL = 0.5


class Mirror:
    """The mirror of one store: the folder of a cache, with a folder for each reference."""

    def __init__(self, root: Path, store: ObjectStore) -> None:
        self.root, self.store = root, store
        self._sizes: dict[str, dict[str, int]] = {}  # of a reference's shards in the last listing
        self._refreshed: dict[str, float] = {}
        self._written: dict[str, dict[str, datetime]] = {}  # when its records were, by the same listing
        self._asked_for: dict[Path, float] = {}  # when somebody in this process last wanted a whole shard
        self._demanded: dict[str, set[str]] = {}  # by shard: the SHA-256 of which it has to have one
        self._fetched_bytes = 0
        self._is_trimmed = False
        self._lock = threading.Lock()

    def url(self, folder: Path) -> str:
        """The URL of a reference's folder."""
        return f"{self.store.url}/{folder.name}"

    # -- listings ----------------------------------------------------------------------------------------------------

    def refresh_references(self) -> None:
        """Bring the references of the store up to date: reference.json in a folder for each."""
        names = [name for name in self.store.list_folders() if stored_paths.is_bare(name) and not name.startswith(".")]

        def read(name: str) -> bytes | None:
            try:
                return self.store.get(f"{name}/{REFERENCE_FILE}")
            except FileNotFoundError:
                return None

        contents = dict(zip(names, self.store.parallel(read, names), strict=True))
        for path in self.root.glob(f"*/{REFERENCE_FILE}"):
            if contents.get(path.parent.name) is None:
                path.unlink(missing_ok=True)
        for name, content in contents.items():
            path = self.root / name / REFERENCE_FILE
            if content is not None and not (path.is_file() and path.read_bytes() == content):
                artifact.commit_bytes(path, content, durable=False)

    def restore_reference(self, folder: Path) -> None:
        """Bring reference.json back if somebody has deleted the mirror while this process uses it."""
        if not (folder / REFERENCE_FILE).exists():
            with contextlib.suppress(FileNotFoundError):
                content = self.store.get(f"{folder.name}/{REFERENCE_FILE}")
                artifact.commit_bytes(folder / REFERENCE_FILE, content, durable=False)

    def refresh(self, folder: Path, *, older_than: float = 0.0) -> None:
        """Make the records in a reference's folder those of the store, unless they were less than `older_than` seconds ago."""
        if time.monotonic() - self._refreshed.get(folder.name, -1e9) < older_than:
            return
        begun = time.monotonic()
        # Before the listing, which may lack what another process sends meanwhile: its copy is kept.
        here = {path.name for path in folder.iterdir() if _is_mirrored(path.name)} if folder.is_dir() else set()
        objects = {found.name.rpartition("/")[2]: found for found in self._list_files(folder)}
        self._sizes[folder.name] = {name: found.size for name, found in objects.items() if SHARD_FILE.fullmatch(name)}
        listed = {name: found for name, found in objects.items() if _is_mirrored(name)}
        self._written[folder.name] = {name: found.modified for name, found in listed.items()}
        memo = ListingMemo.recall(self._memo_path(folder))
        known = dict(memo.etags) if memo else {}
        listed_etags = {name: _bare_etag(found.etag) for name, found in listed.items()}
        new = [
            name for name, etag in listed_etags.items() if name not in here or etag is None or etag != known.get(name)
        ]
        is_new = set(new)
        etags = {name: etag for name, etag in listed_etags.items() if name not in is_new}
        etags |= self._fetch_records(folder, new)
        for name in here - etags.keys():
            self.drop_record(folder, name)
        if etags != known:
            ListingMemo.make(etags=etags).remember(self._memo_path(folder))
        self._refreshed[folder.name] = begun

    def _list_files(self, folder: Path) -> Iterator[StoredObject]:
        for found in self.store.list_objects(f"{folder.name}/"):
            if found.name.count("/") == 1:
                yield found

    def _fetch_records(self, folder: Path, names: Sequence[str]) -> dict[str, str | None]:
        """Write records of the store into the folder; return their ETags, without those that are gone meanwhile."""

        def read(name: str) -> tuple[bytes, str | None] | None:
            try:
                return self.store.get_with_etag(f"{folder.name}/{refuse_escape(name)}")
            except FileNotFoundError:
                return None

        etags = {}
        with counting(f"list {self.url(folder)}", len(names), "records") as counter:
            for name, found in zip(names, self.store.parallel(read, names), strict=True):
                if found is not None:
                    artifact.commit_bytes(artifact.member(folder, name), found[0], durable=False)
                    etags[name] = _bare_etag(found[1])
                counter.add(1)
        return etags

    def _memo_path(self, folder: Path) -> Path:
        return self.root / f".listing-{folder.name}.json"

    # -- reading -----------------------------------------------------------------------------------------------------

    def has_whole(self, folder: Path, record: ShardRecord) -> bool:
        return artifact.is_inside(folder, record.file) and (folder / record.file).is_file()

    def find_damage(self, folder: Path, record: ShardRecord) -> str | None:
        """What the store says is wrong with a shard; None if it has one of the size that was written."""
        size = self._sizes.get(folder.name, {}).get(record.file)
        if size is None:
            # A listing takes a while: the shard may have come after its part was read.
            found = self.store.head(f"{folder.name}/{record.file}")
            size = found and found.size
        if size is None:
            return "is missing in the object store"
        return None if size == record.bytes else f"has {size} bytes in the object store, {record.bytes} were written"

    def open_part(self, folder: Path, record: ShardRecord) -> PartialFile:
        """Open a shard that is not here as a whole: what is read of it is fetched."""
        name = f"{folder.name}/{refuse_escape(record.file)}"

        def fetch(start: int, end: int) -> bytes:
            data = self.store.get_range(name, start, end)
            self._note_fetched(len(data))
            return data

        return PartialFile(self._part_path(record), f"{self.store.url}/{name}", _find_blocks(record), fetch)

    def read_metadata(self, part: PartialFile) -> pq.FileMetaData:
        """Read the footer of a shard from its last block; Arrow alone would read blocks before it."""
        return pq.read_metadata(pa.BufferReader(part.read_last_block()))

    def prefetch(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """Fetch what several shards hold besides log-probs of tokens, many shards at once.

        What is damaged or gone shows when it is read.
        """

        def fetch(record: ShardRecord) -> None:
            with contextlib.suppress(FileNotFoundError, IntegrityError):
                self._fetch_blocks(folder, record, range(0, len(record.blocks or ()), 2))

        self._fetch_many(folder, records, fetch)

    def prefetch_rows(self, folder: Path, rows: Sequence[tuple[ShardRecord, np.ndarray]]) -> None:
        """Fetch log-probs of tokens of some rows of several shards, given by their places in ascending order."""
        places = {record.file: at for record, at in rows}

        def fetch(record: ShardRecord) -> None:
            with contextlib.suppress(FileNotFoundError, IntegrityError, pa.ArrowException):
                groups = self._find_row_groups(folder, record, places[record.file])
                self._fetch_blocks(folder, record, [2 * group + 1 for group in groups])

        self._fetch_many(folder, [record for record, _ in rows], fetch)

    def _fetch_many(self, folder: Path, records: Sequence[ShardRecord], fetch: Callable[[ShardRecord], None]) -> None:
        remote = [record for record in records if not self.has_whole(folder, record)]
        with counting(f"read {self.url(folder)}", len(remote), "shards") as counter:
            for _ in self.store.parallel(fetch, remote):
                counter.add(1)
        self.trim()

    def _fetch_blocks(self, folder: Path, record: ShardRecord, numbers: Sequence[int]) -> None:
        """Fetch some blocks of a shard, or all of it where that costs about the same."""
        blocks = _find_blocks(record)
        wanted = [blocks[i] for i in numbers if i < len(blocks)]
        if (
            record.blocks is None
            or self.is_demanded(record)
            or sum(block.end - block.start for block in wanted) > _WORTH_ALL * record.bytes
        ):
            self._fetch_whole(folder, record)
            return
        with self.open_part(folder, record) as part:
            for block in wanted:
                part.require(block.start, block.end)

    def _find_row_groups(self, folder: Path, record: ShardRecord, rows: np.ndarray) -> list[int]:
        if record.blocks is None or len(record.blocks) == 3:
            return [0]
        with self.open_part(folder, record) as part:
            return find_row_groups(self.read_metadata(part), rows)[0]

    def fetch(self, folder: Path, records: Sequence[ShardRecord]) -> dict[str, str]:
        """Fetch whole shards that are not here, many at once; return what is wrong with those that cannot be, by file.

        A shard that is gone is not among these: it may have been merged.
        """
        self._asked_for |= dict.fromkeys((folder / record.file for record in records), time.time())
        remote = [record for record in records if not self.has_whole(folder, record)]
        wrong = {}
        with counting(f"fetch {self.url(folder)}", sum(record.bytes for record in remote), "bytes") as counter:
            results = self.store.parallel(lambda record: self._fetch_whole(folder, record), remote)
            for record, reason in zip(remote, results, strict=True):
                if reason is not None:
                    wrong[record.file] = reason
                counter.add(record.bytes)
        self.trim()
        return wrong

    def demand(self, record: ShardRecord, hashes: set[str]) -> None:
        """Read a shard in this process as a whole only, and only if its SHA-256 is one of these."""
        self._demanded[record.file] = hashes

    def is_demanded(self, record: ShardRecord) -> bool:
        return record.file in self._demanded

    def _fetch_whole(self, folder: Path, record: ShardRecord) -> str | None:
        name = f"{folder.name}/{refuse_escape(record.file)}"
        path = artifact.member(folder, record.file)
        # A name of this thread's own: two of them may fetch one shard.
        temporary = artifact.temporary_path(path.with_name(f"{path.name}-{threading.get_ident()}"))
        sha256 = hashlib.sha256()
        try:
            with artifact.commit_stream(temporary, durable=False) as stream:
                for data in self.store.read_pieces(name, record.bytes):
                    stream.write(data)
                    sha256.update(data)
            if sha256.hexdigest() not in self._demanded.get(record.file, {sha256.hexdigest()}):
                return "has other bytes in the object store than were signed"
            if stream.entry(path)["xxh3_128"] != record.xxh3_128:
                return "has other bytes in the object store than were written (checksum)"
            os.replace(temporary, path)
        except FileNotFoundError:
            return None
        finally:
            temporary.unlink(missing_ok=True)
        partial_file.remove(self._part_path(record))
        self._note_fetched(record.bytes)
        return None

    def forget(self, folder: Path, record: ShardRecord) -> bool:
        """Drop the copy of a shard, whole or in parts; return whether there was one."""
        had_part = partial_file.remove(self._part_path(record))
        had_whole = self.has_whole(folder, record)
        artifact.member(folder, record.file).unlink(missing_ok=True)
        return had_part or had_whole

    def forget_all(self, folder: Path) -> None:
        """Drop the copies of all shards of a reference. Those without a record stay: a scorer may be about to send them."""
        for path in shards_in(folder):
            if path.with_name(f"{path.name.rpartition('-')[0]}.json").exists():
                path.unlink(missing_ok=True)
        for path in (self.root / ".parts").glob("*.parquet"):
            partial_file.remove(path)

    def _part_path(self, record: ShardRecord) -> Path:
        return self.root / ".parts" / f"{record.xxh3_128}.parquet"

    # -- writing -----------------------------------------------------------------------------------------------------

    def create_reference(self, folder: Path, reference: ReferenceRecord) -> None:
        """Say whose cache a folder of the store is, unless it says so already; a damaged record is written anew."""
        name, path = f"{folder.name}/{REFERENCE_FILE}", folder / REFERENCE_FILE
        self.store.create(name, reference.seal())
        content, etag = self.store.get_with_etag(name)
        try:
            ReferenceRecord.read_bytes(content, path)
        except MalformedError:
            raise
        except IntegrityError:
            if etag is not None:
                self.store.replace(name, reference.seal(), etag)
            content = self.store.get(name)
        artifact.commit_bytes(path, content, durable=False)

    def send(self, folder: Path, record: ShardRecord, data: memoryview) -> bool:
        """Put the bytes of a shard that was written into the folder, then its record; return whether it was the first."""
        shard = f"{folder.name}/{record.file}"
        self.store.put(shard, data)
        is_first = self.store.create(f"{folder.name}/{record.name}", record.seal())
        # gc may have taken an older object of this name for one that nobody needs, just before the record came.
        if is_first and self.store.head(shard) is None:
            self.store.put(shard, data)
        self._sizes.setdefault(folder.name, {})[record.file] = record.bytes
        if is_first:
            with contextlib.suppress(FileNotFoundError):  # somebody is just deleting the mirror
                record.commit(folder / record.name, durable=False)
        elif self._fetch_records(folder, [record.name]) and not _names(folder / record.name, record.file):
            (folder / record.file).unlink(missing_ok=True)
        return is_first

    def send_files(self, folder: Path, files: Sequence[tuple[str, bytes]]) -> None:
        """Put small files, one after the other, and write them here: a listing meanwhile drops what the store has not."""
        for name, data in files:
            self.store.put(f"{folder.name}/{refuse_escape(name)}", data)
            artifact.commit_bytes(artifact.member(folder, name), data, durable=False)

    def delete_files(self, folder: Path, names: Sequence[str]) -> None:
        """Delete small files in the store and here."""
        for name in names:
            self.store.delete(f"{folder.name}/{refuse_escape(name)}")
            artifact.member(folder, name).unlink(missing_ok=True)

    def has_record(self, folder: Path, name: str) -> bool:
        return self.store.head(f"{folder.name}/{refuse_escape(name)}") is not None

    def was_written_again(self, folder: Path, name: str) -> bool:
        """Whether a record was written anew since the last listing, perhaps with the same bytes; it is brought up to date."""
        listed, found = (
            self._written.get(folder.name, {}).get(name),
            self.store.head(f"{folder.name}/{refuse_escape(name)}"),
        )
        # A listing may give fractions of a second where an answer to one request does not.
        if listed is None or found is None or (found.modified - listed).total_seconds() <= 1.0:
            return False
        return self.fetch_record(folder, name)

    def fetch_record(self, folder: Path, name: str) -> bool:
        """Bring one record up to date; return whether the store has it."""
        return self.has_record(folder, name) and bool(self._fetch_records(folder, [name]))

    def delete_record(self, folder: Path, name: str) -> None:
        """Delete a record in the store and here, so that its rows count as missing for everybody."""
        self.store.delete(f"{folder.name}/{refuse_escape(name)}")
        self.drop_record(folder, name)

    def drop_record(self, folder: Path, name: str) -> None:
        """Delete a record here, with its shard."""
        path = artifact.member(folder, name)
        with contextlib.suppress(IntegrityError, FileNotFoundError):
            if SHARD_RECORD_FILE.fullmatch(name):
                self.forget(folder, ShardRecord.read(path))
        path.unlink(missing_ok=True)

    # -- size --------------------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Delete the copies that were not used for the longest time, while the mirrors need more than their limit."""
        limit = _limit_bytes()
        if self._fetched_bytes < (limit / 50 if self._is_trimmed else 1):  # since the last time
            return
        self._fetched_bytes, self._is_trimmed = 0, True
        copies = sorted(self._list_copies(), key=lambda copy: copy[0])
        total, now = sum(size for _, size, _ in copies), time.time()
        for used, size, path in copies:
            if total <= limit or now - used < _KEPT_SECONDS:
                return
            partial_file.remove(path)
            total -= size

    def _list_copies(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each copied shard was last used, its bytes on the disk and its path."""
        for folder in (self.root / ".parts", *(path.parent for path in self.root.glob(f"*/{REFERENCE_FILE}"))):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".parquet"):
                        stat = entry.stat()
                        # Many disks note the time of reading once a day, or never.
                        used = max(stat.st_atime, stat.st_mtime, self._asked_for.get(Path(entry.path), 0.0))
                        yield used, stat.st_blocks * 512, Path(entry.path)

    def _note_fetched(self, n_bytes: int) -> None:
        with self._lock:
            self._fetched_bytes += n_bytes


_MIRRORS: dict[Path, Mirror] = {}


def find_mirror(folder: Path) -> Mirror | None:
    """The mirror to which a reference's folder belongs; None if it is an ordinary folder."""
    return _find_mirror_at(folder.parent)


def _find_mirror_at(root: Path) -> Mirror | None:
    if root not in _MIRRORS:
        if not (root / STORE_FILE).is_file():
            return None
        url = StoreRecord.read(root / STORE_FILE, f"Delete {root}: it is only a mirror.").url
        _refuse_foreign_mirror(root, url)
        _MIRRORS[root] = Mirror(root, open_store(url))
    return _MIRRORS[root]


def _refuse_foreign_mirror(root: Path, url: str) -> None:
    """UsageError unless this is where this machine mirrors the URL: a folder from elsewhere must not say which store is used."""
    if os.path.realpath(root) != os.path.realpath(own := local_folder(url)):
        raise UsageError(
            f"{root / STORE_FILE} says that the folder is a mirror of {url}, whose mirror on this machine is {own}. Name the URL "
            f"instead; or delete {STORE_FILE}, to use the folder as an ordinary cache."
        )


def open_root(place: str) -> Path:
    """Return the local folder of a cache; of a URL, the mirror with all references that the store has now."""
    root = local_folder(place)
    if is_url(place):
        url = parse_url(place)
        if not (root / STORE_FILE).is_file():
            StoreRecord.make(url=url).commit(root / STORE_FILE, durable=False)
        mirror = _find_mirror_at(root)
        assert mirror is not None
        if mirror.store.url != url:
            raise IntegrityError(
                f"{root} is the mirror of {mirror.store.url}, not of {url}. Delete it: it is only a mirror."
            )
        mirror.refresh_references()
    return root


def show_place(folder: Path) -> str:
    """The place of a reference's cache, as people know it: the URL of a mirror's."""
    mirror = find_mirror(folder)
    return str(folder) if mirror is None else mirror.url(folder)


def shards_in(folder: Path) -> list[Path]:
    """List the shard files in a folder."""
    return [path for path in folder.glob("*.parquet") if SHARD_FILE.fullmatch(path.name)]


def _bare_etag(etag: str | None) -> str | None:
    """An ETag without quotes: Azure puts them around it in an answer, and not in a listing."""
    return None if etag is None else etag.removeprefix("W/").strip('"')


def _find_blocks(record: ShardRecord) -> list[Block]:
    """The blocks of a shard. One whose record names none, as earlier versions wrote it, is a single one."""
    if record.blocks is None:
        return [Block(0, record.bytes, record.xxh3_128)]
    ends = np.cumsum([block.bytes for block in record.blocks]).tolist()
    return [Block(end - block.bytes, end, block.xxh3_128) for end, block in zip(ends, record.blocks, strict=True)]


def find_row_groups(metadata: pq.FileMetaData, rows: np.ndarray) -> tuple[list[int], list[int]]:
    """The row groups that have any of these rows, given in ascending order, and the place of each group's first row."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    begins = np.cumsum([0, *sizes])
    groups = np.unique(np.searchsorted(begins, rows, side="right") - 1)
    groups = groups[(groups >= 0) & (groups < len(sizes))]
    return groups.tolist(), begins[groups].tolist()


def _names(record: Path, shard: str) -> bool:
    """Whether the record at this path vouches for this shard."""
    try:
        return ShardRecord.read(record).file == shard
    except IntegrityError:
        return False


def _is_mirrored(name: str) -> bool:
    """Whether a file of the store is kept in the mirror as a listing says: a record, or a signed statement."""
    return bool(SHARD_RECORD_FILE.fullmatch(name) or STATEMENT_FILE.fullmatch(name.removesuffix(".sig")))


def _limit_bytes() -> float:
    text = os.environ.get(LIMIT_VARIABLE)
    try:
        gib = float(text) if text else _DEFAULT_GIB
    except ValueError:
        raise UsageError(f"{LIMIT_VARIABLE} is {text!r}; expected a number of GiB.") from None
    return gib * 2**30
