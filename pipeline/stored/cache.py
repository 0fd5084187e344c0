"""Reading the reference cache: one row per scored sequence, in immutable Parquet shards.

A row's key is a hash of the exact tokens scored, so a row is either right or missing. reference.json names the model;
opening the cache for another one fails. A shard counts only with a commit record that matches its bytes. Two rows of
one key and numerics count as one; where their values differ by more than rounding, their shards count as damaged.
Writing is in cache_writer.py, upkeep in cache_maintenance.py.

**What is checked when.** All bytes of a shard are hashed when it is first opened and whenever its size, times or inode
have changed since it was last found whole (verified_shards.py). What rots on the disk without touching those is caught
when it is read: by Parquet's page checksums, and by the record's checksum of keys and values. So opening reads a tenth
of the bytes, and still serves no value that was not written. `every_byte` hashes everything that is on this machine, for readers that
check no pages (SQL).

**Scale.** The wanted keys are sorted once, each shard's keys are looked up in them and values are put in their places.
So memory grows with the number of wanted keys (about 60 bytes for each), not with the cache. See key_index.py.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IdentityError, IntegrityError
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored import shards
from prefcache.pipeline.stored.contradictions import Contradictions, tolerance
from prefcache.pipeline.stored.key_index import KeyIndex, Keys, concat, read_keys
from prefcache.pipeline.stored.mirror import find_mirror, show_place
from prefcache.pipeline.stored.records import (
    REFERENCE_FILE,
    MalformedError,
    NewerError,
    Parity,
    ReferenceRecord,
    ShardRecord,
)
from prefcache.pipeline.stored.signatures import Signatures
from prefcache.pipeline.stored.verified_shards import Remember, VerifiedShards

T = TypeVar("T")

# Rows that are looked up at once, so that many small shards cost no more than a large one.
_ROWS_AT_ONCE = 1 << 20
# How often a reader starts over because gc merged shards while it was reading.
_TRIES = 5
_REMOVE = "Remove it: what it vouched for is scored again."


class Cache:
    """The folder of one reference."""

    def __init__(
        self,
        folder: Path,
        model_id: str | None,
        *,
        every_byte: bool = False,
        reference: ReferenceRecord | None = None,
        remember: Remember = "all",
        allowed_signers: Path | None = None,
    ) -> None:
        """Open an existing cache; IdentityError if it is not this model's (None: any model's).

        `reference` stands in for reference.json where the folder does not exist yet. `remember`: see VerifiedShards. With
        `allowed_signers`, a shard that nobody in this file has signed serves nothing.
        """
        self.folder, self._remember, self._mirror = folder, remember, find_mirror(folder)
        self.allowed_signers = allowed_signers
        if reference is None and self._mirror is not None:
            self._mirror.restore_reference(folder)
        if reference is None and not (folder / REFERENCE_FILE).exists():
            raise IntegrityError(f"The cache {self.place} is gone. Score again (prefcache score CONFIG).")
        if reference is None:
            reference = ReferenceRecord.read(folder / REFERENCE_FILE, _explain_repair(folder))
        if model_id not in (None, reference.model_id):
            raise IdentityError(
                f"{self.place} holds log-probs of {reference.name}@{reference.model_id[:8]}; this run names a model "
                f"@{str(model_id)[:8]}. Score with it (prefcache score CONFIG), or set the reference back."
            )
        self.reference = reference
        self.records: list[ShardRecord] = []
        self.damaged: dict[Path, str] = {}  # record -> what is wrong
        self.malformed: set[Path] = set()  # those of the damaged that are not cleared away
        self.newer: set[Path] = set()  # those of the malformed that a newer prefcache wrote
        self.unsigned: dict[Path, str] = {}  # record -> why no allowed signer vouches for it
        self.listed: set[str] = set()  # file names of all records, damaged ones included
        self._retry(lambda: self._scan(every_byte), rescan=False)

    @classmethod
    def preview(cls, root: Path, name: str, reference: dict[str, Any], allowed_signers: Path | None = None) -> "Cache":
        """The cache that `cache_writer.create_cache` would open or create, with nothing written; empty if it is new."""
        record, folder = ReferenceRecord.make(name=name, **reference), find_folder(root, name, reference["model_id"])
        has_whole_reference(folder)
        return cls(folder, record.model_id, reference=record, remember="nothing", allowed_signers=allowed_signers)

    def reopen(self) -> "Cache":
        """The cache as it is on disk now."""
        return Cache(
            self.folder, self.reference.model_id, remember=self._remember, allowed_signers=self.allowed_signers
        )

    @property
    def shards(self) -> list[str]:
        return [str(self.folder / record.file) for record in self.records]

    @property
    def place(self) -> str:
        """Where the cache is, as people know it: its folder, or its URL."""
        return show_place(self.folder)

    def record_path(self, record: ShardRecord) -> Path:
        return self.folder / record.name

    def numerics(self) -> dict[str, dict[str, str]]:
        """The readable record behind each numerics_id in the cache."""
        return {record.numerics_id: record.numerics for record in self.records}

    def worst_parity(self, accepted: Sequence[str]) -> Parity | None:
        """The largest deviation from the plain forward that any shard of the accepted numerics was stored with."""
        parities = [record.parity for record in self.records if record.numerics_id in accepted and record.parity]
        return max(parities, key=lambda parity: parity.max, default=None)

    # -- damage ------------------------------------------------------------------------------------------------------

    def refuse_malformed(self) -> None:
        for record in self.damaged:
            if record in self.malformed:
                raise IntegrityError(self.damaged[record])

    def refuse_damage(self) -> None:
        self.refuse_malformed()
        if not self.damaged:
            return
        remedy = "Score again (prefcache score CONFIG)"
        # Only a stage that writes can make `make score` run again and the scorer hash every byte.
        if self._remember == "nothing":
            remedy = f"Run `prefcache verify {self.place}`, then `prefcache score CONFIG`"
        reason = next(iter(self.damaged.values())).rstrip(".")
        raise IntegrityError(
            f"{len(self.damaged)} of {len(self.damaged) + len(self.records)} shards of {self.place} are damaged; "
            f"{reason}. {remedy}: only what they held is computed."
        )

    def explain_unsigned(self, files: Iterable[str]) -> list[str]:
        """Say of each of these shards that serves nothing why no allowed signer vouches for it."""
        names = {file.rpartition("-")[0] for file in files}
        return [reason for record, reason in self.unsigned.items() if record.stem in names]

    def fetch_shards(self) -> None:
        """Have all shards here as a whole, for readers of files; those of an object store that are damaged are noted."""
        if self._mirror is not None:
            wrong = self._mirror.fetch(self.folder, self.records)
            verified = VerifiedShards(self.folder, self._remember)
            for record in [record for record in self.records if record.file in wrong]:
                self.note_damage(record, f"{self.place}/{record.file} {wrong[record.file]}")
                verified.forget(record)
            verified.save()

    def note_damage(self, record: ShardRecord, reason: str) -> None:
        """Count a shard as damaged from now on: it serves nothing, and `CacheWriter.discard_damaged` deletes its record."""
        self.damaged.setdefault(self.record_path(record), reason)
        self.records = [each for each in self.records if each is not record]

    def _scan(self, every_byte: bool = False) -> None:
        """List the shards, and tell whole ones from damaged ones."""
        self.records, self.damaged, self.malformed, self.newer, self.listed = [], {}, set(), set(), set()
        if self._mirror is not None:
            self._mirror.refresh(self.folder)
        verified, paths = VerifiedShards(self.folder, self._remember), shards.list_records(self.folder)
        with counting(f"open {self.place}", len(paths), "shards") as counter:
            for path in paths:
                self._add(path, verified, every_byte)
                counter.add(1)
        verified.save()
        self._set_unsigned_apart()

    def _set_unsigned_apart(self) -> None:
        """Keep the shards for which an allowed signer vouches. All of their bytes are here then, and were hashed."""
        self.unsigned = {}
        if self.allowed_signers is None:
            return
        signatures = Signatures.read(self.folder, self.reference, self.allowed_signers)
        if self._mirror is not None:
            self._mirror.fetch(self.folder, [record for record in self.records if record.name in signatures.signed])
        signed = []
        for record in self.records:
            try:
                reason = signatures.why_refused(record)
            except FileNotFoundError:
                if not self.record_path(record).exists():
                    raise _Changed from None
                reason = f"{self.place}/{record.file} is missing"
            if reason is None:
                signed.append(record)
                if self._mirror is not None:
                    self._mirror.demand(record, signatures.shard_hashes(record))
            else:
                self.unsigned[self.record_path(record)] = reason
        self.records = signed

    def _add(self, path: Path, verified: VerifiedShards, every_byte: bool) -> None:
        """Add the shard of a record to the whole ones or to the damaged ones."""
        self.listed.add(path.name)
        reason = None
        try:
            record = self._read_record(path)
            if damage := verified.find_damage(record, every_byte):
                reason = f"{self.place}/{record.file} {damage}"
        except MalformedError as error:
            self.malformed.add(path)
            if isinstance(error, NewerError):
                self.newer.add(path)
            reason = str(error)
        except IntegrityError as error:
            reason = str(error).removesuffix(f" {_REMOVE}")
        if not reason:
            self.records.append(record)
        elif path.exists() and (self._mirror is None or self._mirror.has_record(self.folder, path.name)):
            self.damaged[path] = reason
        else:
            # Merged since the listing, which may lack the shard that replaced it.
            raise _Changed

    def _read_record(self, path: Path) -> ShardRecord:
        try:
            return ShardRecord.read(path, _REMOVE)
        except IntegrityError:
            # Only the mirror's copy may be damaged.
            if self._mirror is None or not self._mirror.fetch_record(self.folder, path.name):
                raise
        return ShardRecord.read(path, _REMOVE)

    def _retry(self, read: Callable[[], T], *, rescan: bool = True) -> T:
        """Return what `read` returns; start over, with a new listing, where a shard was merged before it was read."""
        for _ in range(_TRIES):
            try:
                return read()
            except _Changed:
                if rescan:
                    self._retry(self._scan, rescan=False)
        raise IntegrityError(f"{self.place} kept changing while it was read. Run the same command again.")

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
        return shards.read_rows(self.folder, record, columns)

    def take(self, record: ShardRecord, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Read columns of some rows, given by their places in ascending order."""
        return shards.take_rows(self.folder, record, rows, columns)

    def prefetch_rows(self, rows: Sequence[tuple[ShardRecord, np.ndarray]]) -> None:
        """Bring the log-probs of tokens that `take` is about to read from an object store, many shards at once."""
        if self._mirror is not None:
            self._mirror.prefetch_rows(self.folder, rows)

    def logps(self, columns: Sequence[pa.ChunkedArray], accepted: Sequence[str]) -> list[np.ma.MaskedArray]:
        """Return the summed log-prob behind each key of several columns, in their order; masked where there is none.

        The numerics named first win where a sequence was scored under several; under one, the smallest of values that
        differ by rounding, so that neither the order nor the merging of shards changes what is served. Values that
        differ by more are not served.
        """
        index = KeyIndex(read_keys(columns))

        def read() -> np.ndarray:
            values_K = np.full(len(index), np.nan)
            for numerics_id in accepted:
                is_open = np.isnan(values_K)
                if is_open.any():
                    values_K[is_open] = self._lowest(index, numerics_id)[0][is_open]
            return values_K

        values_K = self._retry(read)
        self.refuse_damage()
        arrays, at = [], 0
        for column in columns:
            values = values_K[index.rank[at : at + len(column)]]
            mask = np.isnan(values)
            if column.null_count:
                mask |= column.is_null().to_numpy()
            arrays.append(np.ma.MaskedArray(values, mask))
            at += len(column)
        return arrays

    def find_rows(self, index: KeyIndex, accepted: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Masks of the keys that have a row and that have a value, and how many of the others each other numerics has."""

        def read() -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
            has_row, has_value = np.zeros(len(index), bool), np.zeros(len(index), bool)
            for numerics_id in accepted:
                # All of a numerics_id before any counts: a row of a shard that contradicts another is not a hit.
                lowest_K, has_row_K = self._lowest(index, numerics_id)
                has_row |= has_row_K
                has_value |= ~np.isnan(lowest_K)
            others = {}
            for numerics_id in sorted(set(self.numerics()) - set(accepted)) if not has_row.all() else []:
                is_theirs = np.zeros(len(index), bool)
                for ranks, _ in self._matches(index, numerics_id):
                    is_theirs[ranks] = True
                if count := int((is_theirs & ~has_row).sum()):
                    others[numerics_id] = count
            return has_row, has_value, others

        return self._retry(read)

    def _lowest(self, index: KeyIndex, numerics_id: str) -> tuple[np.ndarray, np.ndarray]:
        """The smallest value of each key under these numerics, nan if it has none, and a mask of the keys with a row.

        Shards whose values of a key differ by more than rounding are noted as damaged, and none of their rows counts.
        """
        while True:
            lowest_K, highest_K = (np.full(len(index), np.nan) for _ in range(2))
            has_row_K = np.zeros(len(index), bool)
            for ranks, sums in self._matches(index, numerics_id):
                np.fmin.at(lowest_K, ranks, sums)
                np.fmax.at(highest_K, ranks, sums)
                has_row_K[ranks] = True
            with np.errstate(invalid="ignore"):
                far = highest_K - lowest_K > tolerance(self.numerics().get(numerics_id, {}), 1)
            if not far.any() or not self._note_contradictions(index, np.flatnonzero(far), numerics_id):
                return lowest_K, has_row_K

    def _note_contradictions(self, index: KeyIndex, suspects: np.ndarray, numerics_id: str) -> bool:
        """Note the shards that contradict each other about any of these ranks as damaged; return whether there are any."""
        rows = Contradictions(self.folder)
        for record in [record for record in self.records if record.numerics_id == numerics_id]:
            if (values := self._read_values(record)) is not None:
                places, ranks = index.find(values[0])
                is_suspect = np.isin(ranks, suspects)
                rows.add(record, ranks[is_suspect], places[is_suspect], values[1][places[is_suspect]])
        try:
            contradicting = rows.find()
        except FileNotFoundError:
            raise _Changed from None
        for record, reason in contradicting:
            self.note_damage(record, reason)
        return bool(contradicting)

    def _matches(self, index: KeyIndex, numerics_id: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ranks and values of the rows whose keys are in the index, many shards at once."""
        parts: list[tuple[Keys, np.ndarray]] = []
        n_rows, records = 0, [record for record in self.records if record.numerics_id == numerics_id]
        if self._mirror is not None:
            self._mirror.prefetch(self.folder, records)
        with counting(f"look up in {self.place}", sum(record.rows for record in records), "rows") as counter:
            for i, record in enumerate(records):
                if (values := self._read_values(record)) is not None:
                    parts.append(values)
                    n_rows += len(values[1])
                counter.add(record.rows)
                if i + 1 == len(records) or n_rows >= _ROWS_AT_ONCE:
                    places, ranks = index.find(concat([keys for keys, _ in parts]))
                    yield ranks, np.concatenate([np.empty(0), *(sums for _, sums in parts)])[places]
                    parts, n_rows = [], 0

    def _read_values(self, record: ShardRecord) -> tuple[Keys, np.ndarray] | None:
        """The values of a shard; None if it turns out to be damaged, which is noted."""
        try:
            return shards.read_values(self.folder, record)
        except (IntegrityError, FileNotFoundError) as error:
            if self._mirror is not None:
                self._mirror.refresh(self.folder)
            if not self.record_path(record).exists():
                raise _Changed from None
            reason = str(error) if isinstance(error, IntegrityError) else f"{self.place}/{record.file} is missing"
        self.note_damage(record, reason)
        verified = VerifiedShards(self.folder, self._remember)
        verified.forget(record)
        verified.save()
        return None


class _Changed(Exception):
    """Shards were merged between their listing and their reading."""


def _explain_repair(folder: Path) -> str:
    """What to do about a reference.json that cannot be read."""
    mirror = find_mirror(folder)
    what = "Remove it" if mirror is None else f"Remove {mirror.url(folder)}/{REFERENCE_FILE}, of which it is a copy,"
    return f"{what} and score again (prefcache score CONFIG): it is written anew."


def find_folder(root: Path, name: str, model_id: str) -> Path:
    """The folder of a model's cache, which need not exist yet.

    A folder that has lost its reference.json is still the model's if it holds records; an empty one is not.
    """
    short = model_id[:12]
    folders = sorted(path for path in root.glob(f"*-{short}") if path.is_dir())
    with_reference = (folder for folder in folders if (folder / REFERENCE_FILE).is_file())
    with_records = (folder for folder in folders if shards.list_records(folder))
    base = re.sub(r"[^\w.-]", "_", name.rstrip("/").rpartition("/")[2]) or "model"
    return next(itertools.chain(with_reference, with_records), root / f"{base}-{short}")


def has_whole_reference(folder: Path) -> bool:
    """Whether reference.json exists undamaged; MalformedError if it is not one that this prefcache wrote."""
    try:
        ReferenceRecord.read(folder / REFERENCE_FILE, _explain_repair(folder))
    except MalformedError:
        raise
    except IntegrityError:
        return False
    return True
