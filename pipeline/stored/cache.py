"""The reference cache: one row per scored sequence, in immutable Parquet shards.

A row's key is a hash of the exact tokens scored, so a row is either right or missing. reference.json names the model;
opening the cache for another one fails. A shard counts only with a commit record that matches its bytes.

**No lock is needed.** A chunk of work is named from its keys and numerics, and the first record under a name wins; the
shard's own name holds a hash of its content, so two scorers never write different bytes to one name. Claims only spare
scorers from computing a chunk that another is at. Rows that are there twice all the same are one row to every reader.

**What is checked when.** All bytes of a shard are hashed when it is first opened and whenever its size, times or inode
are no longer those under which it was last found whole; a memo beside the cache keeps those. What rots on the disk
without touching them is caught where it is read: Parquet's page checksums, and a checksum of the keys and values
themselves in the record, which covers page headers and footers as well. So opening reads a tenth of the bytes, and
still serves no value that was not written. `every_byte` hashes everything, for readers that check no pages (SQL).

**Scale.** Wanted keys are sorted once, each shard's keys are looked up in them and values are put in their places, so
memory goes with the keys that are wanted (about 60 bytes for each), never with the cache. See pipeline/stored/keys.py.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import identity
from pipeline.config import Config
from pipeline.errors import IdentityError, IntegrityError, PrefcacheError, UsageError
from pipeline.schema import CACHE_VERSION, OK
from pipeline.stored import artifact, claims
from pipeline.stored.keys import KeyIndex, Keys, concat, keys_of

T = TypeVar("T")

REFERENCE_FILE = "reference.json"
MERGED = "merged-"
_SHARD_SUFFIX, _RECORD_SUFFIX = ".parquet", ".json"
# Rows that are looked up at once: small shards together cost no more than a large one.
_ROWS_AT_ONCE = 1 << 20
_ROWS_FOR_THREADS = 1 << 16
# Times that a reader starts over because shards were merged under its eyes.
_TRIES = 5
# A file changed twice within a tick of the clock shows the same times; younger ones are not taken as known.
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """What a scorer has to do: the missing sequences, in chunks, and what is there already."""

    chunks: list[np.ndarray]  # slots of each chunk, that of the longest sequence first; see prepared.Sequences
    probe: np.ndarray  # slots of a sample of all sequences, the same whatever is missing: extremes, then random ones
    n_sequences: int
    n_hits: int
    n_failed: int  # of the hits: tried before, no value
    n_tokens: int  # to score
    n_completion_tokens: int
    other_numerics: dict[str, int]  # numerics_id -> missing sequences that it has scored

    @property
    def n_missing(self) -> int:
        return self.n_sequences - self.n_hits


class Cache:
    """The folder of one reference."""

    def __init__(
        self,
        folder: Path,
        model_id: str | None,
        *,
        every_byte: bool = False,
        reference: dict[str, Any] | None = None,
    ) -> None:
        """Open a cache that exists, for this model and no other; None: whichever it is of. `reference` stands in for
        what the folder says of it, where there is no folder yet."""
        self.folder = folder
        if reference is None and not (folder / REFERENCE_FILE).exists():
            raise IntegrityError(f"The cache {folder} is gone. Score again (make score).")
        if reference is None:
            reference = artifact.unseal(folder / REFERENCE_FILE, "Score again (make score): it is written anew.")
        if model_id not in (None, reference["model_id"]):
            raise IdentityError(
                f"{folder} holds log-probs of {reference['name']}@{reference['model_id'][:8]}; this run names a model "
                f"@{str(model_id)[:8]}. Score with it (make score), or set the reference back."
            )
        self.reference = reference
        self.records: list[dict[str, Any]] = []
        self.damaged: dict[Path, str] = {}  # record -> what is wrong
        self._listed: set[str] = set()  # names of records
        self._merged_meanwhile: list[tuple[str, KeyIndex]] = []  # numerics_id, keys
        self._scan(every_byte)

    @classmethod
    def create(cls, root: Path, name: str, reference: dict[str, Any]) -> "Cache":
        """Open the cache of these weights, whatever name they went by when it was made, or make one."""
        folder = _folder_of(root, name, reference)
        if not _is_whole(folder / REFERENCE_FILE):
            (folder / REFERENCE_FILE).unlink(missing_ok=True)
            content = artifact.seal({"name": name, "schema_version": CACHE_VERSION, **reference})
            artifact.commit_bytes(folder / REFERENCE_FILE, content, once=True)
        # Of a cache that may only be read, what it holds is good all the same.
        with contextlib.suppress(OSError):
            artifact.remove_leftovers(folder)
            claims.remove_free(folder)
        return cls(folder, reference["model_id"])

    @classmethod
    def look(cls, root: Path, name: str, reference: dict[str, Any]) -> "Cache":
        """The cache that `create` would open or make, with nothing made: one that is not there is empty."""
        return cls(_folder_of(root, name, reference), reference["model_id"], reference={"name": name, **reference})

    def refuse_read_only(self) -> None:
        if not os.access(self.folder, os.W_OK):
            raise UsageError(
                f"{self.folder} may only be read, and there are sequences that it lacks. Name another place (cache), or "
                "see to the rights of this one."
            )

    def reopened(self) -> "Cache":
        """The cache as it is on the disk now."""
        return Cache(self.folder, self.reference["model_id"])

    @property
    def shards(self) -> list[str]:
        return [str(self.folder / record["file"]) for record in self.records]

    def numerics(self) -> dict[str, dict[str, str]]:
        """The readable record behind each numerics_id in the cache."""
        return {record["numerics_id"]: record["numerics"] for record in self.records}

    def discard_damaged(self) -> None:
        """Remove the records of damaged shards, so that their rows count as missing and are scored again."""
        for record in self.damaged:
            record.unlink(missing_ok=True)
        self.damaged = {}

    def refuse_damage(self) -> None:
        if self.damaged:
            reason = next(iter(self.damaged.values())).rstrip(".")
            raise IntegrityError(
                f"{len(self.damaged)} of {len(self.damaged) + len(self.records)} shards of {self.folder} are damaged; "
                f"{reason}. Score again (make score): only what they held is computed."
            )

    # -- opening -----------------------------------------------------------------------------------------------------

    def _scan(self, every_byte: bool = False) -> None:
        for _ in range(_TRIES):
            with contextlib.suppress(_Changed):
                return self._scan_once(every_byte)
        raise self._restless()

    def _scan_once(self, every_byte: bool) -> None:
        self.records, self.damaged, self._listed = [], {}, set()
        memo = _Memo(self.folder)
        for path in sorted(self.folder.glob(f"*{_RECORD_SUFFIX}")):
            if path.name == REFERENCE_FILE:
                continue
            self._listed.add(path.name)
            try:
                record = artifact.unseal(path)
                reason = memo.damage(record, every_byte)
            except IntegrityError as error:
                record, reason = {}, str(error)
            if not reason:
                self.records.append(record)
            elif path.exists():
                self.damaged[path] = f"{self.folder / record['file']} {reason}" if record else reason
            else:
                # Merged since the listing, which may lack what took its place.
                raise _Changed
        memo.save()

    def _settled(self, read: Callable[[], T]) -> T:
        """What `read` returns; it starts over with a new listing where a shard went away before it was read."""
        for _ in range(_TRIES):
            try:
                return read()
            except _Changed:
                self._scan()
        raise self._restless()

    def _restless(self) -> IntegrityError:
        return IntegrityError(f"{self.folder} kept changing while it was read. Run the same command again.")

    def record_path(self, record: dict[str, Any]) -> Path:
        return self.folder / f"{record['file'].rpartition('-')[0]}{_RECORD_SUFFIX}"

    # -- claims ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(
        self, keys: Sequence[bytes], numerics_id: str, *, wait: bool = False
    ) -> Iterator[Literal["mine", "taken", "done"]]:
        """Keep other scorers from a chunk while this one is at it.

        mine: to be scored here, within the block. done: it is in the cache. taken: another scorer is at it; with `wait`
        that one is waited for, and its chunk is done then, or mine if it died. A scorer passes over the chunks that are
        taken and comes back to them at the end, waiting. A claim dies with its process, whatever ends it.
        """
        if self.has_chunk(keys, numerics_id):
            yield "done"
            return
        with claims.claimed(claims.path_of(self.folder, _chunk_name(keys, numerics_id)), wait=wait) as is_mine:
            if not is_mine:
                yield "taken"
            elif self.has_chunk(keys, numerics_id):
                yield "done"
            else:
                yield "mine"

    def has_chunk(self, keys: Sequence[bytes], numerics_id: str) -> bool:
        """Whether this chunk was committed meanwhile, by another scorer, and perhaps merged into a larger shard."""
        path = self.folder / f"{_chunk_name(keys, numerics_id)}{_RECORD_SUFFIX}"
        if path in self.damaged:
            return False
        return path.exists() or self._has_merged(keys, numerics_id)

    def _has_merged(self, keys: Sequence[bytes], numerics_id: str) -> bool:
        with os.scandir(self.folder) as entries:
            names = {entry.name for entry in entries if entry.name.startswith(MERGED)}
        for name in sorted(name for name in names - self._listed if name.endswith(_RECORD_SUFFIX)):
            with contextlib.suppress(IntegrityError, FileNotFoundError):
                record = artifact.unseal(self.folder / name)
                self._merged_meanwhile.append((record["numerics_id"], KeyIndex(self.values(record)[0])))
            self._listed.add(name)
        if not self._merged_meanwhile:
            return False
        wanted, here = keys_of([pa.chunked_array([pa.array(keys, pa.binary(16))])]), np.zeros(len(keys), bool)
        for other, index in self._merged_meanwhile:
            if other == numerics_id:
                here[index.find(wanted)[0]] = True
        return bool(here.all())

    # -- writing -----------------------------------------------------------------------------------------------------

    def commit(self, rows: pa.Table, numerics: dict[str, str], numerics_id: str, parity: dict[str, Any] | None) -> None:
        """Put the rows of a chunk on the disk. Where another scorer was first, what it wrote stays."""
        name = _chunk_name(rows["key"].to_pylist(), numerics_id)
        if self.damaged.pop(self.folder / f"{name}{_RECORD_SUFFIX}", None):
            (self.folder / f"{name}{_RECORD_SUFFIX}").unlink(missing_ok=True)
        self._commit(name, rows.sort_by("key"), {"numerics_id": numerics_id, "numerics": numerics, "parity": parity})

    def commit_merged(self, rows: pa.Table, merged: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Put sorted rows of several shards into one. It is later than all of them, so that its rows take their place."""
        generation = 1 + max(generation_of(record) for record in merged)
        # The worst parity speaks for all; what else a record says is the same for all of one numerics_id.
        facts = max(merged, key=lambda record: record["parity"]["max"] if record["parity"] else -1.0)
        digest = hashlib.blake2b(f"{facts['numerics_id']} {generation} ".encode(), digest_size=16)
        digest.update(keys_of([rows["key"]]).checksum().encode())
        self._commit(f"{MERGED}{digest.hexdigest()}", rows, {**facts, "generation": generation})
        return artifact.unseal(self.folder / f"{MERGED}{digest.hexdigest()}{_RECORD_SUFFIX}")

    def _commit(self, name: str, rows: pa.Table, facts: dict[str, Any]) -> None:
        data = artifact.parquet(rows, float_lists=["logps"])
        shard = self.folder / f"{name}-{artifact.checksum_bytes(data)[:8]}{_SHARD_SUFFIX}"
        entry = artifact.commit_file(shard, data, rows=len(rows))
        values = _values_checksum(keys_of([rows["key"]]), usable_sums(rows))
        record = {**facts, **entry, "schema_version": CACHE_VERSION, "values_xxh3_128": values}
        artifact.commit_bytes(self.folder / f"{name}{_RECORD_SUFFIX}", artifact.seal(record), once=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, record: dict[str, Any]) -> Iterator[pq.ParquetFile]:
        """A shard whose page checksums are verified as it is read; IntegrityError where it cannot be."""
        path = self.folder / record["file"]
        try:
            # Strings that are the same in every row cost next to nothing as codes.
            with pq.ParquetFile(
                path, page_checksum_verification=True, read_dictionary=["status", "numerics_id"]
            ) as file:
                yield file
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
            raise IntegrityError(f"{path} cannot be read ({str(error).partition(chr(10))[0]})") from error

    def read(self, record: dict[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        with self._opened(record) as file:
            # For few rows, waking Arrow's threads takes longer than what they would do.
            table = file.read(columns, use_threads=record["rows"] > _ROWS_FOR_THREADS)
        if len(table) != record["rows"]:
            raise IntegrityError(f"{self.folder / record['file']} has {len(table)} rows, {record['rows']} were written")
        return table

    def batches(self, record: dict[str, Any], n_rows: int = 8192) -> Iterator[pa.Table]:
        """All of a shard, some rows at a time."""
        with self._opened(record) as file:
            for batch in file.iter_batches(n_rows):
                yield pa.Table.from_batches([batch])

    def values(self, record: dict[str, Any]) -> tuple[Keys, np.ndarray]:
        """Keys and log-probs of a shard, as they were written; nan where there is no value."""
        table = self.read(record, ["key", "logp_sum", "status"])
        try:
            keys, sums = keys_of([table["key"]]), usable_sums(table)
        except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
            raise IntegrityError(f"{self.folder / record['file']} has other columns than were written") from error
        if record.get("values_xxh3_128", found := _values_checksum(keys, sums)) != found:
            raise IntegrityError(f"{self.folder / record['file']} has other values than were written (checksum)")
        return keys, sums

    def plan(self, sequences: pa.Table, accepted: Sequence[str], tokens_per_shard: int) -> Plan:
        """Which of `sequences` (key, slot, prompt, n, n_completion) have no row under the accepted numerics.

        Chunks are cut from all distinct sequences and only then thinned to the missing ones, so that a scorer that
        resumes, or works beside another, names the same chunks. What turns out to be damaged counts as missing.
        """
        index = KeyIndex(keys_of([sequences["key"]]))
        is_hit, is_usable, others = self._settled(lambda: self._states(index, accepted))
        n, n_completion = (np.empty(len(index), np.int64) for _ in range(2))
        slot = np.full(len(index), np.iinfo(np.int64).max)
        np.minimum.at(slot, index.rank, sequences["slot"].to_numpy())
        n[index.rank], n_completion[index.rank] = sequences["n"].to_numpy(), sequences["n_completion"].to_numpy()
        prompt = np.empty(len(index), np.uint64)
        prompt[index.rank] = sequences["prompt"].to_numpy()
        missing = ~is_hit
        return Plan(
            chunks=_chunks(n, prompt, slot, missing, tokens_per_shard) if missing.any() else [],
            probe=_probe(n, slot),
            n_sequences=len(index),
            n_hits=int(is_hit.sum()),
            n_failed=int((is_hit & ~is_usable).sum()),
            n_tokens=int(n[missing].sum()),
            n_completion_tokens=int(n_completion[missing].sum()),
            other_numerics=others,
        )

    def n_sums_only(self, sequences: pa.Table, accepted: Sequence[str]) -> int:
        """How many of these sequences have a row that keeps no log-prob of each token."""
        index = KeyIndex(keys_of([sequences["key"]]))
        found = np.zeros(len(index), bool)
        for record in [each for each in self.records if each["numerics_id"] in accepted]:
            # What is damaged or was merged meanwhile is noticed where values are read.
            with contextlib.suppress(IntegrityError, FileNotFoundError):
                if self._lacks_lists(record):
                    rows = self.read(record, ["key", "logps", "status"])
                    lacks = usable(rows) & ~rows["logps"].is_valid().to_numpy()
                    found[index.find(keys_of([rows["key"]]).take(lacks))[1]] = True
        return int(found.sum())

    def _lacks_lists(self, record: dict[str, Any]) -> bool:
        """Whether any row may have none: Parquet counts them, so that no list is read."""
        with self._opened(record) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        lists = [column.statistics for column in columns if column.path_in_schema.startswith("logps.")]
        return any(each is None or each.null_count for each in lists)

    def _states(self, index: KeyIndex, accepted: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Which keys have a row, which have a value, and how many of the others other numerics have."""
        is_hit, is_usable = np.zeros(len(index), bool), np.zeros(len(index), bool)
        for numerics_id in accepted:
            for ranks, sums in self._found(index, numerics_id):
                is_hit[ranks] = True
                is_usable[ranks[~np.isnan(sums)]] = True
        others = {}
        for numerics_id in sorted(set(self.numerics()) - set(accepted)) if not is_hit.all() else []:
            is_theirs = np.zeros(len(index), bool)
            for ranks, _ in self._found(index, numerics_id):
                is_theirs[ranks] = True
            if count := int((is_theirs & ~is_hit).sum()):
                others[numerics_id] = count
        return is_hit, is_usable, others

    def logps(self, columns: Sequence[pa.ChunkedArray], accepted: Sequence[str]) -> list[np.ma.MaskedArray]:
        """The summed log-prob behind each key of several columns, in their order; masked where there is none.

        The numerics named first win where a sequence was scored under several; under one, the smallest of values that
        differ by rounding, so that neither the order nor the merging of shards changes what is served.
        """
        index = KeyIndex(keys_of(columns))
        values_K = self._settled(lambda: self._values_of(index, accepted))
        self.refuse_damage()
        found, at = [], 0
        for column in columns:
            values = values_K[index.rank[at : at + len(column)]]
            mask = np.isnan(values)
            if column.null_count:
                mask |= column.is_null().to_numpy()
            found.append(np.ma.MaskedArray(values, mask))
            at += len(column)
        return found

    def _values_of(self, index: KeyIndex, accepted: Sequence[str]) -> np.ndarray:
        values_K = np.full(len(index), np.nan)
        for numerics_id in accepted:
            is_open = np.isnan(values_K)
            if not is_open.any():
                break
            for ranks, sums in self._found(index, numerics_id):
                wanted = is_open[ranks]
                np.fmin.at(values_K, ranks[wanted], sums[wanted])
        return values_K

    def _found(self, index: KeyIndex, numerics_id: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ranks and values of the rows whose keys are in the index, many shards at once."""
        parts: list[tuple[Keys, np.ndarray]] = []
        n_rows, of_these = 0, [record for record in self.records if record["numerics_id"] == numerics_id]
        for i, record in enumerate(of_these):
            if (part := self._believed(record)) is not None:
                parts.append(part)
                n_rows += len(part[1])
            if i + 1 == len(of_these) or n_rows >= _ROWS_AT_ONCE:
                at, ranks = index.find(concat([keys for keys, _ in parts]))
                yield ranks, np.concatenate([np.empty(0), *(sums for _, sums in parts)])[at]
                parts, n_rows = [], 0

    def _believed(self, record: dict[str, Any]) -> tuple[Keys, np.ndarray] | None:
        """The values of a shard; None where it turns out to be damaged, which is noted."""
        try:
            return self.values(record)
        except (IntegrityError, FileNotFoundError) as error:
            if not self.record_path(record).exists():
                raise _Changed from None
            reason = str(error) if isinstance(error, IntegrityError) else f"{self.folder / record['file']} is missing"
        self.damaged[self.record_path(record)] = reason
        self.records = [each for each in self.records if each is not record]
        memo = _Memo(self.folder)
        memo.forget(record)
        memo.save()
        return None


class _Changed(Exception):
    """Shards were merged between their listing and their reading."""


class _Memo:
    """Which shards were found whole, and how they looked to the file system then."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder.parent / f".verified-{folder.name}.json"
        self._now, self._known = time.time(), {}
        with contextlib.suppress(OSError, ValueError):
            self._known = dict(json.loads(self._file.read_bytes()))
        self._before, self._seen = dict(self._known), set[str]()

    def damage(self, record: dict[str, Any], every_byte: bool) -> str | None:
        """What is wrong with a shard; None where it is as it was written."""
        name = record["file"]
        self._seen.add(name)
        stamp = self._stamp(record)
        # Without a checksum of its values, reading it would not show what has rotted since.
        if not every_byte and stamp is not None and self._known.get(name) == stamp and "values_xxh3_128" in record:
            return None
        self._known.pop(name, None)
        reason = artifact.damage(self._folder, record)
        if reason is None and stamp is not None and stamp == self._stamp(record) and self._is_settled(stamp):
            self._known[name] = stamp
        return reason

    def forget(self, record: dict[str, Any]) -> None:
        self._seen = set(self._known)
        self._known.pop(record["file"], None)

    def save(self) -> None:
        """A memo that cannot be written, as beside a read-only cache, only costs time."""
        known = {name: stamp for name, stamp in self._known.items() if name in self._seen}
        if known != self._before:
            with contextlib.suppress(OSError, PrefcacheError):
                artifact.commit_bytes(self._file, artifact.canonical_json(known), durable=False)

    def _stamp(self, record: dict[str, Any]) -> list[Any] | None:
        try:
            stat = (self._folder / record["file"]).stat()
        except OSError:
            return None
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record["xxh3_128"]]

    def _is_settled(self, stamp: list[Any]) -> bool:
        return bool(max(stamp[1], stamp[2]) / 1e9 < self._now - _SETTLED_SECONDS)


def generation_of(record: dict[str, Any]) -> int:
    """0 for what a scorer wrote, one more at each merging."""
    return int(record.get("generation", 0))


def is_usable(status: str | None) -> bool:
    """Whether a row of this status has a value."""
    return status is not None and (status == OK or status.startswith(f"{OK}:"))


def usable(rows: pa.Table) -> np.ndarray:
    """Which rows have a value."""
    found = [np.empty(0, bool)]
    for chunk in rows["status"].chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        by_code = np.array([*map(is_usable, encoded.dictionary.to_pylist()), False])
        codes = encoded.indices.fill_null(len(by_code) - 1) if encoded.null_count else encoded.indices
        found.append(by_code[codes.to_numpy()])
    return np.concatenate(found)


def usable_sums(rows: pa.Table) -> np.ndarray:
    """logp_sum, and nan where the status is that of a failure."""
    return np.where(usable(rows), rows["logp_sum"].to_numpy(), np.nan)


def _values_checksum(keys: Keys, sums: np.ndarray) -> str:
    return f"{keys.checksum()}-{xxhash.xxh3_128_hexdigest(sums.astype('<f8').data)}"


def _chunks(
    n: np.ndarray, prompt: np.ndarray, slot: np.ndarray, missing: np.ndarray, tokens_per_shard: int
) -> list[np.ndarray]:
    """The slots of each chunk: all sequences, those of a prompt together, that of the longest first and equal ones by
    key; cut by tokens, and thinned."""
    _, group = np.unique(prompt, return_inverse=True)
    longest = np.zeros(group.max() + 1, np.int64)
    np.maximum.at(longest, group, n)
    order = np.lexsort((-n, prompt, -longest[group]))
    chunk = (np.cumsum(n[order]) - n[order]) // tokens_per_shard
    kept = missing[order]
    cuts = np.flatnonzero(np.diff(chunk[kept])) + 1
    return np.split(slot[order[kept]], cuts)


def _probe(n: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """The longest, the shortest, and random ones: keys are hashes, so the smallest are a random sample."""
    return np.concatenate([slot[[n.argmax(), n.argmin()]], slot[:1024]]) if len(n) else slot


def _is_whole(sealed: Path) -> bool:
    try:
        artifact.unseal(sealed)
    except IntegrityError:
        return False
    return True


@contextlib.contextmanager
def vouched_for(scored: Path) -> Iterator[None]:
    """Where the cache is not what the manifest says, the manifest is taken back: make then sees that there is work."""
    try:
        yield
    except IntegrityError:
        artifact.retract_manifest(scored)
        raise


def open_scored(scored: Path, *, every_byte: bool = True) -> tuple[dict[str, Any], Cache] | None:
    """The manifest of a finished scoring and the cache it vouches for; None where nothing has been scored.

    `every_byte` is for readers that let something else than this module read the shards.
    """
    with vouched_for(scored):
        if (manifest := artifact.read_manifest(scored)) is None:
            return None
        cache = Cache(Path(manifest["cache"]), manifest["reference"]["model_id"], every_byte=every_byte)
        cache.refuse_damage()
    return manifest, cache


def refuse_other_reference(config: Config, scored: dict[str, Any]) -> None:
    """Where the config names other weights by now than those that scored, by another name or under the same."""
    reference = scored["reference"]
    named = identify(identity.find_reference(config), Path(config.cache))["model_id"]
    if named != reference["model_id"]:
        raise IdentityError(
            f"{config.scored} was scored by {reference['name']}@{reference['model_id'][:8]}; this run names "
            f"{config.model}@{named[:8]}. Score with it (make score), or set model back."
        )


def identify(reference: identity.Reference, root: Path, *, remember: bool = True) -> dict[str, Any]:
    """identity.model_identity, with the hashes of weight files remembered beside the caches."""
    memo_file = root / ".weights.json"
    try:
        memo = json.loads(memo_file.read_bytes())
    except (OSError, ValueError):
        memo = {}
    known = len(memo)
    found = identity.model_identity(reference, memo)
    if len(memo) > known and remember:
        # Beside caches that may only be read, it costs time.
        with contextlib.suppress(OSError, PrefcacheError):
            artifact.commit_bytes(memo_file, artifact.canonical_json(memo))
    return found


def _chunk_name(keys: Sequence[bytes], numerics_id: str) -> str:
    digest = hashlib.blake2b(numerics_id.encode(), digest_size=16)
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()


def _folder_of(root: Path, name: str, reference: dict[str, Any]) -> Path:
    short = reference["model_id"][:12]
    return next(iter(sorted(root.glob(f"*-{short}"))), root / f"{_safe(name)}-{short}")


def _safe(name: str) -> str:
    """The model's own name, fit for a folder."""
    return re.sub(r"[^\w.-]", "_", name.rstrip("/").rpartition("/")[2]) or "model"
