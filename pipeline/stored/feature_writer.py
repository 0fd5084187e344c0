"""Adding to a store of features, while other processes do the same.

Pictures are computed in chunks, and each chunk is committed as a shard of its own: however a process ends, finished shards stay. A
chunk is named from its pictures, a shard also from its content, and the first record wins; claims only spare a process the work that
another is doing.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefcache.pipeline import identity
from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.progress import Counter, counting
from prefcache.pipeline.schema import FEATURES, StoredFeatures
from prefcache.pipeline.stored import artifact, claims
from prefcache.pipeline.stored.image_features import TOWER_FILE, FeatureStore, checksum
from prefcache.pipeline.stored.model_ids import identify_tower
from prefcache.pipeline.stored.records import FEATURES_FILE, FeaturesRecord, TowerRecord

PICTURES_OF_SHARD = 32
Encode = Callable[[bytes], StoredFeatures]


def open_store(root: Path, reference: Reference, numerics: dict[str, str]) -> FeatureStore:
    """Open the store of a model's tower, computed in this way, or create one."""
    tower_id = identify_tower(reference, root)["tower_id"]
    folder = root / f"vision-{identity.hash_json({'tower': tower_id, 'numerics': numerics})[:12]}"
    if not (folder / TOWER_FILE).is_file():
        record = TowerRecord.make(name=str(reference.folder), tower_id=tower_id, numerics=numerics)
        record.commit(folder / TOWER_FILE, once=True)
    with contextlib.suppress(OSError):  # a store that may only be read is not removed either
        os.utime(folder / TOWER_FILE)
    return FeatureStore(folder)


def fill(store: FeatureStore, images: Iterable[bytes], encode: Encode, *, first: int = 0) -> None:
    """Compute the features of those images that the store lacks. Of several processes, each begins at another chunk, `first`."""
    missing = store.missing(images)
    if not missing:
        return
    _prepare_folder(store)
    chunks = [missing[i : i + PICTURES_OF_SHARD] for i in range(0, len(missing), PICTURES_OF_SHARD)]
    chunks = [*chunks[first % len(chunks) :], *chunks[: first % len(chunks)]]
    taken = []
    with counting("encode pictures", len(missing), "pictures") as counter:
        for i, chunk in enumerate(chunks):
            if not _encode_chunk(store, chunk, encode, counter, wait=False):
                taken.append(chunk)
            if i == 0:
                _refuse_full_disk(store, len(store.missing(missing)))
        # What another process is at work on is left for the end, and then waited for.
        for chunk in taken:
            _encode_chunk(store, chunk, encode, counter, wait=True)


def _encode_chunk(store: FeatureStore, chunk: Sequence[bytes], encode: Encode, counter: Counter, *, wait: bool) -> bool:
    """Compute and commit what is missing of a chunk; return False if another process has it now."""
    with claims.claim(claims.claim_path(store.folder, _chunk_name(chunk)), wait=wait) as is_mine:
        if not is_mine:
            return False
        store.rescan()
        missing = store.missing(chunk)
        counter.add(len(chunk) - len(missing))
        rows = []
        for image in missing:
            rows.append(_row(image, encode(image)))
            counter.add(1)
        if rows:
            _commit(store, missing, pa.Table.from_pylist(rows, schema=FEATURES))
    return True


def _row(image: bytes, features: StoredFeatures) -> dict[str, Any]:
    embeds, deep = features.embeds, features.deep
    return {
        "image": image,
        "embeds": embeds.data,
        "deep": None if deep is None else deep.data,
        "n_tokens": features.n_tokens,
        "grid": None if features.grid is None else list(features.grid),
        "n_tiles": features.n_tiles,
        "xxh3_64": checksum(embeds, deep),
    }


def _commit(store: FeatureStore, images: Sequence[bytes], table: pa.Table) -> None:
    data, name = artifact.arrow_stream(table), _chunk_name(images)
    shard = artifact.member(store.folder, f"{name}-{artifact.checksum_bytes(data)[:8]}.arrow")
    record = FeaturesRecord.make(**artifact.commit_file(shard, data, rows=len(table)))
    record.commit(artifact.member(store.folder, record.name), once=True)
    store.rescan()


def _prepare_folder(store: FeatureStore) -> None:
    """Remove what killed processes left, and the records of damaged shards, whose pictures are computed again."""
    if not os.access(store.folder, os.W_OK):
        raise UsageError(
            f"{store.folder} is read-only, and the features of some pictures are missing in it. Name another place (cache), or "
            "change its permissions."
        )
    artifact.remove_leftovers(store.folder)
    claims.remove_free(store.folder)
    discarded = [path for path in store.damaged if path not in store.newer and path not in store.malformed]
    for path in discarded:
        artifact.member(store.folder, path.name).unlink(missing_ok=True)
    store.note_discarded(discarded)


def _refuse_full_disk(store: FeatureStore, n_left: int) -> None:
    """Raise ResourceError while the disk still has room, if what is to come will not fit."""
    needed = sum(record.bytes for record in store.records) / max(1, len(store)) * n_left
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise ResourceError(
            f"{store.folder}: the features of {n_left:,} more pictures take about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB "
            "are free. Free some space, name another place (cache), or train the tower (train.vision=trained), which stores none. "
            "Finished work is kept."
        )


def _chunk_name(images: Sequence[bytes]) -> str:
    return hashlib.blake2b(b"".join(images), digest_size=16).hexdigest()


# -- upkeep ----------------------------------------------------------------------------------------------------------


def last_use(store: FeatureStore) -> float:
    """Return when a command last opened the store or added to it, in seconds since the epoch."""
    paths = [store.folder / name for name in (TOWER_FILE, *(record.name for record in store.records))]
    return max(path.stat().st_mtime for path in paths)


def find_orphans(store: FeatureStore) -> list[Path]:
    """List the shards that no record names; none while a record cannot be read, since it may name any of them."""
    if store.damaged:
        return []
    named = {record.file for record in store.records}
    return sorted(
        path for path in store.folder.iterdir() if FEATURES_FILE.fullmatch(path.name) and path.name not in named
    )
