"""Maintain a cache: verify that every value is as written and possible at all; remove what nothing needs.

Merging loses and doubles no row for any reader, wherever it is killed. The merged shard and its record are committed
like any other; from then on its rows exist twice, which every reader takes for one row. They are read back, and only
then are the records of the small shards deleted, and after those their files. A later gc sees shards all of whose rows
others hold, and finishes the work. So that the outcome does not depend on interruptions, sizes are counted before
compression and over the rows that are kept, so that they add up: a merged shard is never small again.

What else lies there, in a folder or in an object store: folder_upkeep.py and store_upkeep.py.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from prefcache.pipeline.cache_place import is_url, local_folder, parse_url
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Counter, counting
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact, feature_writer, shards, signatures, verified_shards
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.contradictions import Contradictions
from prefcache.pipeline.stored.folder_upkeep import FolderUpkeep, Upkeep
from prefcache.pipeline.stored.image_features import TOWER_FILE, FeatureStore
from prefcache.pipeline.stored.key_index import concat
from prefcache.pipeline.stored.mirror import find_mirror, open_root, show_place
from prefcache.pipeline.stored.object_store import open_store
from prefcache.pipeline.stored.records import (
    REFERENCE_FILE,
    MalformedError,
    NewerError,
    ShardRecord,
)
from prefcache.pipeline.stored.store_upkeep import StoreUpkeep

TARGET_MIB = 128
_TRIES = 5
# Keys that are compared at once; a cache with more is read once for each share of its keys.
_ROWS_AT_ONCE = 1 << 23
# Bytes of a row before compression: key, counts and sum, and the log-prob of each token.
_ROW_BYTES, _TOKEN_BYTES = 32, 4
# Log-probs are at most zero, but the head of a model in low precision rounds.
_MAX_LOGP = 1e-3
_SUM_TOLERANCE = 1e-9


def find_caches(paths: Sequence[str]) -> list[Path]:
    """The folders of references and of vision towers among `paths` and directly in them."""
    folders = []
    for place in paths:
        path = _open_place(place)
        files = [file for name in (REFERENCE_FILE, TOWER_FILE) for file in sorted(path.glob(f"*/{name}"))]
        inside = [file.parent for file in files if not artifact.TEMPORARY.fullmatch(file.parent.name)]
        here = [path] if (path / REFERENCE_FILE).exists() or (path / TOWER_FILE).exists() else inside
        if not here:
            raise UsageError(f"{place} holds no cache: no {REFERENCE_FILE} in it or in its folders. Name one.")
        folders += here
    return folders


def _open_place(place: str) -> Path:
    """The folder of a cache or of a reference; of a URL, that in its mirror."""
    if not is_url(place):
        return local_folder(place)
    root, _, name = parse_url(place).rpartition("/")
    if root.count("/") > 1:  # more than the bucket
        store = open_store(root)
        if store.head(f"{name}/{REFERENCE_FILE}") is not None:
            return open_root(root) / name
    return open_root(place)


def _open_upkeep(folder: Path, old_seconds: float | None = None) -> Upkeep:
    mirror = find_mirror(folder)
    return FolderUpkeep(folder, old_seconds) if mirror is None else StoreUpkeep(mirror, folder, old_seconds)


# -- verify ----------------------------------------------------------------------------------------------------------


@dataclass
class VerifiedCache:
    """What is in a cache, and what is wrong with it."""

    folder: Path
    place: str  # as people know it: the folder, or its URL
    reference: str = ""
    shards: int = 0
    rows: int = 0
    failed: int = 0
    doubled: int = 0  # rows beyond the first of a key and numerics: harmless
    n_bytes: int = 0
    orphans: int = 0
    leftovers: int = 0
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong
    newer: list[str] = field(default_factory=list)  # those of the damaged that a newer prefcache wrote
    malformed: list[str] = field(default_factory=list)  # those that have a valid seal, and yet are no record of ours


def verify(folder: Path) -> VerifiedCache:
    """Check every byte, page, row and sum of a cache."""
    if (folder / TOWER_FILE).exists():
        return _verify_features(folder)
    upkeep, mirror = _open_upkeep(folder), find_mirror(folder)
    result, stored = VerifiedCache(folder, place=show_place(folder)), upkeep.list_shards()
    if mirror is not None:
        mirror.refresh(folder)
        mirror.forget_all(folder)  # what the store has is checked, not copies of it
    try:
        cache = Cache(folder, None, every_byte=True, remember="damage")
        cache.fetch_shards()
    except IntegrityError as error:
        result.damaged[REFERENCE_FILE] = str(error)
        if isinstance(error, MalformedError):
            (result.newer if isinstance(error, NewerError) else result.malformed).append(REFERENCE_FILE)
        return result
    result.reference = cache.reference.name
    result.orphans, result.leftovers = len(_find_orphans(cache, stored)), upkeep.count_leftovers()
    _add_damage(result, cache)
    whole, wrong = _check_content(cache)
    for record in whole:
        result.rows += record.rows
        result.n_bytes += record.bytes
        result.failed += int(np.isnan(shards.read_values(folder, record)[1]).sum())
    result.shards = len(whole)
    kept, contradicting = _mark_duplicates(cache, whole)
    result.damaged |= wrong | contradicting
    result.doubled = sum(int((~shard.keep).sum()) for shard in kept)
    return result


def _add_damage(result: "VerifiedCache | CollectedCache", cache: Cache) -> None:
    """Add the damage that opening the cache has shown, by its remedy."""
    result.damaged |= {path.name: reason for path, reason in cache.damaged.items()}
    result.newer = sorted(path.name for path in cache.newer)
    result.malformed = sorted(path.name for path in cache.malformed - cache.newer)


def find_contradictions(cache: Cache) -> dict[str, str]:
    """The files of shards whose values of a sequence differ by more than rounding, with where they do."""
    return _mark_duplicates(cache, cache.records)[1]


def refuse_contradictions(cache: Cache) -> None:
    """IntegrityError on contradictions, for readers that bypass `Cache.logps`, such as SQL."""
    for reason in find_contradictions(cache).values():
        raise IntegrityError(
            f"{reason}. Neither is served. Score again (prefcache score CONFIG): only what they held is computed."
        )


def refuse_impossible(cache: Cache) -> None:
    """IntegrityError if a row is not one that a scorer can have written, or if two rows contradict each other."""
    for wrong in (_check_content(cache)[1], find_contradictions(cache)):
        for file, reason in wrong.items():
            named = reason if file in reason else f"{file}: {reason}"
            raise IntegrityError(named)


def _check_content(cache: Cache) -> tuple[list[ShardRecord], dict[str, str]]:
    """Tell shards whose rows a scorer can have written from others; the latter by file, with what is wrong."""
    whole, wrong = [], {}
    with counting(f"check {cache.place}", sum(record.rows for record in cache.records), "rows") as counter:
        for record in cache.records:
            if reason := _check_shard(cache, record, counter):
                wrong[record.file] = reason
            else:
                whole.append(record)
    return whole, wrong


def _check_shard(cache: Cache, record: ShardRecord, counter: Counter) -> str | None:
    """What no scorer would have written into a shard; None if all is well."""
    try:
        keys, _ = shards.read_values(cache.folder, record)
        reason = None if keys.is_ascending() else "its keys are not in order, or one is there twice"
        for batch in shards.read_batches(cache.folder, record):
            if reason:
                break
            reason = _check_rows(batch, record)
            counter.add(len(batch))
    except (IntegrityError, FileNotFoundError) as error:
        reason = str(error)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException):
        reason = "it has other columns than a cache has"
    return reason


def _check_rows(rows: pa.Table, record: ShardRecord) -> str | None:
    """What no scorer would have written into these rows; None if all is well."""
    if rows.schema.names != CACHE.names:
        return "it has other columns than a cache has"
    is_usable, sums, n_completion = shards.usable_rows(rows), shards.usable_sums(rows), rows["n_completion"].to_numpy()
    numerics = rows["numerics_id"].unique().to_pylist()
    lists = rows["logps"].combine_chunks()
    has_list = lists.is_valid().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    logps = lists.flatten().to_numpy()
    # Added in float64 and in order, as bincount does: pairwise sums differ in the last bits only.
    added = np.bincount(np.repeat(np.arange(len(lengths)), lengths), logps.astype(np.float64), len(lengths))
    with np.errstate(invalid="ignore"):
        is_off = ~(np.abs(added - sums) <= _SUM_TOLERANCE * np.maximum(1.0, np.abs(sums)))
    wrong = {
        "a row's numerics are not those of its record": np.array(numerics != [record.numerics_id]),
        "a row has a value and its status says that it has none, or the other way round": is_usable
        != rows["logp_sum"].is_valid().to_numpy(),
        "a log-prob is not finite": np.concatenate([is_usable & ~np.isfinite(sums), ~np.isfinite(logps)]),
        "a log-prob is above zero": np.concatenate([sums > _MAX_LOGP * np.maximum(1, n_completion), logps > _MAX_LOGP]),
        "a row has another number of log-probs than its answer has tokens": has_list & (lengths != n_completion),
        "logp_sum is not the sum of logps": has_list & is_usable & is_off,
    }
    return next((reason for reason, mask in wrong.items() if mask.any()), None)


# -- gc --------------------------------------------------------------------------------------------------------------


@dataclass
class CollectedCache:
    """What gc has done, or would do."""

    folder: Path
    place: str  # as people know it: the folder, or its URL
    leftovers: int = 0
    orphans: int = 0
    kept: int = 0  # shards in an object store that nothing names, but that a scorer or reader of the last day may want
    superseded: int = 0  # shards all of whose rows others hold
    merged: int = 0  # shards that became fewer
    into: int = 0
    doubled: int = 0  # rows that were there more than once
    shards: int = 0  # afterwards
    features_bytes: int | None = None  # of a vision tower's store; None: not one
    unused_days: float = 0.0  # since a command last opened it
    removed: bool = False  # all of it
    damaged: dict[str, str] = field(default_factory=dict)
    newer: list[str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


def gc(
    folder: Path,
    target_bytes: int,
    dry_run: bool = False,
    old_seconds: float | None = None,
    features_unused_for: float | None = None,
) -> CollectedCache:
    """Remove what nothing needs, and merge small shards that verify would pass; scorers and trainers may be running.

    The store of a vision tower is removed if no command has opened it for this number of days; None keeps it.
    """
    if (folder / TOWER_FILE).exists():
        return _collect_features(folder, FolderUpkeep(folder, old_seconds), dry_run, features_unused_for)
    upkeep = _open_upkeep(folder, old_seconds)
    if dry_run:
        return _collect(folder, upkeep, target_bytes, True)
    for _ in range(_TRIES):
        with upkeep.claim() as is_mine:
            if is_mine:
                return _collect(folder, upkeep, target_bytes, False)
        # A starting scorer holds every claim for a moment, to see whether its process is gone.
        time.sleep(0.05)
    raise UsageError(f"Another gc is at work on {show_place(folder)}. Wait for it, or stop it.")


def _collect(folder: Path, upkeep: Upkeep, target_bytes: int, dry_run: bool) -> CollectedCache:
    stored = upkeep.list_shards()
    # gc notes what it has hashed; its dry run changes nothing.
    cache = Cache(folder, None, every_byte=True, remember="nothing" if dry_run else "all")
    cache.fetch_shards()
    result = CollectedCache(folder, cache.place)
    _add_damage(result, cache)
    result.leftovers = upkeep.remove_leftovers(dry_run=dry_run)
    result.orphans = upkeep.remove_orphans(cache, _find_orphans(cache, stored), dry_run=dry_run)
    # Before anything is merged or superseded: a wrong row would replace a right one, under a new checksum.
    whole, wrong = _check_content(cache)
    kept, contradicting = _mark_duplicates(cache, whole)
    result.damaged |= wrong | contradicting
    result.doubled = sum(int((~shard.keep).sum()) for shard in kept)
    # A merged shard would be another one, which nobody has signed.
    signed = signatures.names_in_statements(folder)
    free = [shard for shard in kept if shard.record.name not in signed]
    superseded = [shard.record for shard in free if not shard.keep.any()]
    result.superseded = len(superseded)
    if not dry_run:
        upkeep.remove(cache, superseded)
    for group in _group(cache, [shard for shard in free if shard.keep.any()], target_bytes):
        result.merged += len(group)
        result.into += 1
        if not dry_run:
            _merge(cache, upkeep, group)
    result.kept = upkeep.n_kept
    result.shards = len(kept) - result.superseded - result.merged + result.into
    return result


@dataclass
class _Shard:
    """A shard, and a mask of the rows that no other shard holds as well or better."""

    record: ShardRecord
    keep: np.ndarray


def _mark_duplicates(cache: Cache, records: Sequence[ShardRecord]) -> tuple[list[_Shard], dict[str, str]]:
    """Choose the rows to keep, so that every key has one for each numerics.

    A value comes before a failure, then the smaller value, which is what readers take, then the later generation.
    Shards that contradict each other are returned apart: their files, and what is wrong.
    """
    contradicting: dict[str, str] = {}
    while True:
        left = [record for record in records if record.file not in contradicting]
        kept = {record.file: _Shard(record, np.ones(record.rows, bool)) for record in left}
        new: dict[str, str] = {}
        for numerics_id in sorted({record.numerics_id for record in left}):
            same = [record for record in left if record.numerics_id == numerics_id]
            same.sort(key=lambda record: (-record.generation, record.file))
            n_shares = -(-sum(record.rows for record in same) // _ROWS_AT_ONCE)
            for share in range(n_shares):
                new |= _drop_duplicates(cache, [kept[record.file] for record in same], share, n_shares)
        if not new:
            return [*kept.values()], contradicting
        contradicting |= new


def _drop_duplicates(cache: Cache, group: Sequence[_Shard], share: int, n_shares: int) -> dict[str, str]:
    """Unmark the rows of one share of all keys that another row replaces; return the shards that contradict each other."""
    parts = []
    for i, each in enumerate(group):
        keys, sums = shards.read_values(cache.folder, each.record)
        # Keys are hashes: their first bits deal them out evenly.
        at = np.flatnonzero((keys.high >> np.uint64(40)) % np.uint64(n_shares) == share)
        parts.append((keys.take(at), sums[at], np.full(len(at), i, np.int32), at))
    key = concat([keys for keys, *_ in parts])
    value, shard, place = (np.concatenate([part[column] for part in parts]) for column in (1, 2, 3))
    by_high = np.argsort(key.high)
    same_high = key.high[by_high][1:] == key.high[by_high][:-1]
    if not same_high.any():
        return {}
    twice = by_high[np.concatenate([[False], same_high]) | np.concatenate([same_high, [False]])]
    key, value, shard, place = key.take(twice), value[twice], shard[twice], place[twice]
    # nan, for a failure, sorts last.
    order = np.lexsort((place, shard, value, key.low, key.high))
    is_same = (key.high[order][1:] == key.high[order][:-1]) & (key.low[order][1:] == key.low[order][:-1])
    losers = order[1:][is_same]
    for i in np.unique(shard[losers]):
        group[i].keep[place[losers[shard[losers] == i]]] = False
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(~np.concatenate([[False], is_same]))
    rows = Contradictions(cache.folder)
    for i in np.unique(shard):
        is_its = shard == i
        rows.add(group[i].record, number[is_its], place[is_its], value[is_its])
    return {record.file: reason for record, reason in rows.find()}


def _group(cache: Cache, kept: Sequence[_Shard], target_bytes: int) -> Iterator[list[_Shard]]:
    """Yield the shards to rewrite: each large one with rows to drop, and small ones together, up to the target."""
    small: dict[str, list[tuple[_Shard, int]]] = {}
    for shard in sorted(kept, key=lambda shard: shard.record.file):
        n_completion = cache.read(shard.record, ["n_completion"])["n_completion"].to_numpy()
        n_tokens = n_completion[shard.keep].sum(dtype=np.int64)
        size = _ROW_BYTES * int(shard.keep.sum()) + _TOKEN_BYTES * int(n_tokens)
        if 2 * size < target_bytes:
            small.setdefault(shard.record.numerics_id, []).append((shard, size))
        elif not shard.keep.all():
            yield [shard]
    for numerics_id in sorted(small):
        group: list[_Shard] = []
        total = 0
        for shard, size in small[numerics_id]:
            if total + size > target_bytes:
                # More than half of the target, so that it is never small again.
                yield group
                group, total = [], 0
            group.append(shard)
            total += size
        if len(group) > 1 or (group and not group[0].keep.all()):
            yield group


def _merge(cache: Cache, upkeep: Upkeep, group: Sequence[_Shard]) -> None:
    tables = [cache.read(shard.record).cast(CACHE).filter(pa.array(shard.keep)) for shard in group]
    rows = pa.concat_tables(tables).sort_by("key")
    replaced = [shard.record for shard in group]
    merged = CacheWriter(cache).commit_merged(rows, replaced)
    reason = artifact.damage(cache.folder, merged) or (merged.rows != len(rows) and "has other rows than were merged")
    if reason:
        raise IntegrityError(
            f"{cache.folder / merged.file} {reason}. Nothing is lost: the shards that it was merged from are still there. "
            f"Delete {cache.record_path(merged)} and run gc again."
        )
    upkeep.remove(cache, replaced)


def _find_orphans(cache: Cache, stored: Sequence[str]) -> list[str]:
    """The shards that no record names. A record that a newer prefcache wrote may name any of them, so then none counts."""
    if cache.malformed:
        return []
    named = {record.file for record in cache.records}
    damaged = {path.stem for path in cache.damaged}
    return [name for name in stored if name not in named and name.rpartition("-")[0] not in damaged]


# -- features of pictures --------------------------------------------------------------------------------------------


def _verify_features(folder: Path) -> VerifiedCache:
    """Check every byte of a vision tower's store."""
    result = VerifiedCache(folder, str(folder))
    try:
        store = FeatureStore(folder, every_byte=True, remember="damage")
    except IntegrityError as error:
        result.damaged[TOWER_FILE] = str(error)
        if isinstance(error, MalformedError):
            (result.newer if isinstance(error, NewerError) else result.malformed).append(TOWER_FILE)
        return result
    result.reference = f"the vision tower of {store.tower.name}"
    result.shards, result.rows = len(store.records), sum(record.rows for record in store.records)
    result.doubled = result.rows - len(store)
    result.n_bytes = sum(record.bytes for record in store.records)
    result.orphans, result.leftovers = len(feature_writer.find_orphans(store)), FolderUpkeep(folder).count_leftovers()
    _add_feature_damage(result, store)
    return result


def _collect_features(folder: Path, upkeep: FolderUpkeep, dry_run: bool, unused_for: float | None) -> CollectedCache:
    """Remove temporaries and shards without a record, or the whole store if no command has opened it for so many days.

    Whole shards are not merged: they are memory-mapped where they are. For that reason, a command that has opened a store can still
    read it after it was removed.
    """
    store = FeatureStore(folder, remember="nothing")
    result = CollectedCache(folder, str(folder), shards=len(store.records))
    result.features_bytes = sum(record.bytes for record in store.records)
    result.unused_days = (time.time() - feature_writer.last_use(store)) / 86_400
    if unused_for is not None and result.unused_days >= unused_for and not (store.newer or store.malformed):
        result.removed, result.shards = True, 0
        if not dry_run:
            artifact.remove_leftovers(folder.parent)  # of a gc that was killed here
            artifact.discard(folder)
            verified_shards.memo_path(folder).unlink(missing_ok=True)
        return result
    store = FeatureStore(folder, every_byte=True, remember="nothing" if dry_run else "all")
    result.leftovers = upkeep.remove_leftovers(dry_run=dry_run)
    for path in feature_writer.find_orphans(store):
        if upkeep.is_old(path):
            result.orphans += 1
            if not dry_run:
                path.unlink(missing_ok=True)
    _add_feature_damage(result, store)
    return result


def _add_feature_damage(result: VerifiedCache | CollectedCache, store: FeatureStore) -> None:
    result.damaged |= {path.name: reason for path, reason in store.damaged.items()}
    result.newer += [path.name for path in store.newer]
    result.malformed += [path.name for path in store.malformed]
