"""Writing to the reference cache: creating it, claiming chunks of work, committing shards.

**No lock is needed.** A chunk of work is named from its keys and numerics, and the first record under a name wins; the
shard's own name holds a hash of its content, so two scorers never write different bytes to one name. Claims only spare
a scorer the work that another is doing. In an object store all of this is the same: see mirror.py and store_writer.py.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import artifact, claims, shards, signatures
from prefcache.pipeline.stored.cache import Cache, find_folder, has_whole_reference
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.mirror import find_mirror
from prefcache.pipeline.stored.records import REFERENCE_FILE, Parity, ReferenceRecord, ShardRecord, SignedRecord
from prefcache.pipeline.stored.signatures import SigningKey
from prefcache.pipeline.stored.store_writer import StoreWriter

_MERGED = "merged-"
# Rows of a group in a merged shard. They are few, so that a reader of few rows reads few bytes.
_ROWS_PER_GROUP = 1 << 14
# How often a scorer looks whether gc has merged shards of an object store: each time it lists all of them.
_MERGED_SECONDS = 300.0


def create_cache(root: Path, name: str, reference: dict[str, Any], allowed_signers: Path | None = None) -> Cache:
    """Open the cache of these weights, whatever name they had when it was created, or create one."""
    folder = find_folder(root, name, reference["model_id"])
    if not has_whole_reference(folder):
        (folder / REFERENCE_FILE).unlink(missing_ok=True)
        record, mirror = ReferenceRecord.make(name=name, **reference), find_mirror(folder)
        if mirror is None:
            record.commit(folder / REFERENCE_FILE, once=True)
        else:
            mirror.create_reference(folder, record)
    # A read-only cache is still readable; skip cleanup.
    with contextlib.suppress(OSError):
        artifact.remove_leftovers(folder)
        claims.remove_free(folder)
    return Cache(folder, reference["model_id"], allowed_signers=allowed_signers)


class CacheWriter:
    """Adds shards to a cache while other scorers write and gc merges; with a key, it signs each of them."""

    def __init__(self, cache: Cache, key: SigningKey | None = None) -> None:
        self.cache, self._key = cache, key
        self._listed = set(cache.listed)  # file names of the records that were looked at
        self._merged: list[
            tuple[str, KeyIndex]
        ] = []  # numerics_id and keys of shards merged since the cache was opened
        self._mirror = find_mirror(cache.folder)
        self._store = StoreWriter(self._mirror, cache.folder) if self._mirror else None

    def refuse_read_only(self) -> None:
        if self._store is not None:
            self._store.refuse_read_only()
        elif self.cache.folder.is_dir() and not os.access(self.cache.folder, os.W_OK):
            raise UsageError(
                f"{self.cache.folder} is read-only, and some sequences are missing in it. Name another place (cache), or "
                "change its permissions."
            )

    def discard_damaged(self) -> None:
        """Delete the records of damaged shards, so that their rows count as missing and are scored again."""
        self.cache.refuse_malformed()
        for record in list(self.cache.damaged):
            self._discard(record)

    def _discard(self, record: Path) -> None:
        if self._mirror is None or not self._mirror.was_written_again(self.cache.folder, record.name):
            self._delete(record)
        # Otherwise another scorer has written it anew: what is there now was not looked at, and stays.
        self.cache.damaged.pop(record, None)

    def _delete(self, record: Path) -> None:
        if self._mirror is not None:
            self._mirror.delete_record(self.cache.folder, record.name)
        artifact.member(self.cache.folder, record.name).unlink(missing_ok=True)

    # -- claims ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(
        self, keys: Sequence[bytes], numerics_id: str, *, wait: bool = False
    ) -> Iterator[Literal["mine", "taken", "done"]]:
        """Keep other scorers from a chunk for as long as the block runs.

        mine: score it here, within the block. done: it is in the cache. taken: another scorer is working on it. With
        `wait`, the other scorer is waited for, and the chunk is done then, or mine if that scorer died. A scorer passes
        over taken chunks and comes back to them at the end, waiting. A claim dies with its process, however it ends.
        """
        if self.has_chunk(keys, numerics_id):
            yield "done"
            return
        with self._claim(_chunk_name(keys, numerics_id), wait=wait) as is_mine:
            if is_mine is None or (is_mine and self.has_chunk(keys, numerics_id)):
                yield "done"
            elif not is_mine:
                yield "taken"
            else:
                yield "mine"

    def claim_ahead(self, keys: Sequence[bytes], numerics_id: str) -> None:
        """Begin to claim the chunk that comes next. On a disk, where claiming takes no time, this does nothing."""
        if self._store is not None and not self.has_chunk(keys, numerics_id):
            self._store.claim_ahead(_chunk_name(keys, numerics_id))

    def claim_work(self, name: str) -> contextlib.AbstractContextManager[object]:
        """Wait for a piece of work that only one scorer does at a time."""
        return self._claim(name, wait=True)

    def _claim(self, name: str, *, wait: bool) -> contextlib.AbstractContextManager[bool | None]:
        """Claim a chunk in the folder or in the store; None if the store has it."""
        if self._store is not None:
            return self._store.claim(name, wait=wait)
        return claims.claim(claims.claim_path(self.cache.folder, name), wait=wait)

    def has_chunk(self, keys: Sequence[bytes], numerics_id: str) -> bool:
        """Whether another scorer has committed this chunk meanwhile, even if gc has merged it into a larger shard."""
        folder = self.cache.folder
        path = folder / f"{_chunk_name(keys, numerics_id)}.json"
        if (reason := self.cache.unsigned.get(path)) is not None:
            raise IntegrityError(
                f"{reason}, and it stands where this would write. Have it signed, or remove {path.name}."
            )
        if path in self.cache.damaged or path.is_file():
            return path not in self.cache.damaged
        if self._mirror is not None:
            self._mirror.refresh(folder, older_than=_MERGED_SECONDS)
        names = {path.name for path in shards.list_records(folder) if path.name.startswith(_MERGED)}
        for name in sorted(names - self._listed):
            with contextlib.suppress(IntegrityError, FileNotFoundError):
                record = ShardRecord.read(folder / name)
                self._merged.append((record.numerics_id, KeyIndex(shards.read_values(folder, record)[0])))
            self._listed.add(name)
        if not self._merged:
            return False
        wanted = read_keys([pa.chunked_array([pa.array(keys, pa.binary(16))])])
        is_present = np.zeros(len(keys), bool)
        for other, index in self._merged:
            if other == numerics_id:
                is_present[index.find(wanted)[0]] = True
        return bool(is_present.all())

    # -- commits -----------------------------------------------------------------------------------------------------

    def commit(
        self,
        rows: pa.Table,
        numerics: dict[str, str],
        numerics_id: str,
        parity: Parity | None,
        *,
        in_background: bool = False,
    ) -> None:
        """Commit the rows of a chunk. If another scorer was first, what it wrote stays.

        `in_background`: return before an object store has them; `flushing` waits for that.
        """
        name = _chunk_name(rows["key"].to_pylist(), numerics_id)
        path = self.cache.folder / f"{name}.json"
        if path in self.cache.damaged:
            self._discard(path)
        facts = {"numerics_id": numerics_id, "numerics": numerics, "parity": parity}
        self._commit(name, rows.sort_by("key"), facts, in_background)

    def flushing(self) -> contextlib.AbstractContextManager[None]:
        """Have what the block commits in the object store at its end, and raise what went wrong."""
        return contextlib.nullcontext() if self._store is None else self._store.flushing()

    # -- signatures --------------------------------------------------------------------------------------------------

    def sign(self, records: Sequence[SignedRecord], key: SigningKey) -> Path | None:
        """Write a signed statement about these records; return its path, or None if there are none."""
        folder, reference = self.cache.folder, self.cache.reference
        if self._mirror is None or not records:
            return signatures.sign_records(folder, reference, records, key)
        files = signatures.compose_statement(reference, records, key)
        self._mirror.send_files(folder, files)
        return folder / files[-1][0]

    def merge_statements(self) -> None:
        """Replace all statements that the key has signed by a single one: each takes time to verify.

        Others may do so at the same time: whatever is deleted is listed in a statement that was written before.
        """
        if self._key is None:
            return
        statements = signatures.find_signed_by(self.cache.folder, self.cache.reference, self._key)
        if len(statements) < 2:
            return
        merged = self.sign(sorted(set().union(*statements.values()), key=lambda each: each.record), self._key)
        for path in statements.keys() - {merged}:
            names = _statement_files(path)
            if self._mirror is not None:
                self._mirror.delete_files(self.cache.folder, names)
            for name in names:
                artifact.member(self.cache.folder, name).unlink(missing_ok=True)

    def find_unsigned(self, keys: Sequence[bytes], numerics_id: str) -> str | None:
        """Say why the chunk's record exists but serves nothing: no allowed signer vouches for it. None otherwise."""
        return self.cache.unsigned.get(self.cache.folder / f"{_chunk_name(keys, numerics_id)}.json")

    def commit_merged(self, rows: pa.Table, merged: Sequence[ShardRecord]) -> ShardRecord:
        """Write sorted rows of several shards as one. Its generation is above theirs, so that its rows replace them."""
        generation = 1 + max(record.generation for record in merged)
        # The worst parity stands for all; everything else in a record is the same for all of one numerics_id.
        facts = max(merged, key=lambda record: record.parity.max if record.parity else -1.0).facts()
        digest = hashlib.blake2b(f"{facts['numerics_id']} {generation} ".encode(), digest_size=16)
        digest.update(read_keys([rows["key"]]).checksum().encode())
        name = f"{_MERGED}{digest.hexdigest()}"
        self._commit(name, rows, {**facts, "generation": generation}, in_background=False)
        return ShardRecord.read(self.cache.folder / f"{name}.json")

    def _commit(self, name: str, rows: pa.Table, facts: dict[str, Any], in_background: bool) -> None:
        data, folder = _write_parquet(rows), self.cache.folder
        shard = artifact.member(folder, f"{name}-{artifact.checksum_bytes(data)[:8]}.parquet")
        entry = artifact.commit_file(shard, data, rows=len(rows))
        checksum = shards.checksum_values(read_keys([rows["key"]]), shards.usable_sums(rows))
        record = ShardRecord.make(
            **{**facts, **entry, "values_xxh3_128": checksum, "blocks": shards.describe_blocks(data)}
        )
        path = artifact.member(folder, record.name)
        if self._key is not None:
            # Before the record: a scorer that is killed in between leaves nothing that would count, and is not signed.
            self.sign([signatures.describe_bytes(record, data)], self._key)
        if self._store is not None:
            (self._store.send if in_background else self._store.send_now)(record, data)
        elif not record.commit(path, once=True) and not path.is_file():
            raise IntegrityError(f"{path} is not a file, and a shard's record belongs there. Remove it.")


def _statement_files(statement: Path) -> list[str]:
    return [signatures.signature_path(statement).name, statement.name]


def _write_parquet(rows: pa.Table) -> memoryview:
    return artifact.parquet(rows, float_lists=["logps"], rows_per_group=_ROWS_PER_GROUP)


def _chunk_name(keys: Sequence[bytes], numerics_id: str) -> str:
    digest = hashlib.blake2b(numerics_id.encode(), digest_size=16)
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()
