"""Looking after a cache: is every value as it was written and possible at all, and what can be put away.

Merging loses and doubles no row for any reader, wherever it is killed. The merged shard and its record are committed
like any other; from then on its rows exist twice, which every reader takes for one row. They are read back, and only
then do the records of the small shards go, and after them their files. A later gc sees shards all of whose rows are
held by others and finishes the work. For the outcome to be the same whenever it was interrupted, sizes are counted before
compression, of the rows that are kept, so that they add up: what was merged is never small again.

A shard without a record may be one that a scorer is about to vouch for. It is removed only if nobody has the claim of its
chunk, and if it is old or a gc had written down that it was removing it. Were a scorer without claims suspended for
longer, then its record would name a shard that is missing: that is noticed, and scored again.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError, UsageError
from pipeline.schema import CACHE
from pipeline.stored import artifact, claims
from pipeline.stored.cache import REFERENCE_FILE, Cache, generation_of, usable, usable_sums
from pipeline.stored.keys import concat

TARGET_MIB = 128
_REMOVING = ".removing"  # what gc is about to remove
# What no scorer leaves lying for so long: between a shard and its record there are milliseconds.
OLD_SECONDS = 3600.0
# Keys that are compared at once; a cache with more is gone through once for each share of its keys.
_ROWS_AT_ONCE = 1 << 23
# Of a row, before compression: key, counts and sum, beside four bytes for each token.
_ROW_BYTES, _TOKEN_BYTES = 32, 4
# A log-prob is not above zero, but for the rounding of a head in low precision.
_MOST = 1e-3
_SUM_TOLERANCE = 1e-9


def find_caches(paths: Sequence[str]) -> list[Path]:
    """The folders of references among `paths` and directly in them."""
    found = []
    for path in map(Path, paths):
        here = (
            [path] if (path / REFERENCE_FILE).exists() else sorted(f.parent for f in path.glob(f"*/{REFERENCE_FILE}"))
        )
        if not here:
            raise UsageError(f"{path} holds no cache: no {REFERENCE_FILE} in it or in its folders. Name one.")
        found += here
    return found


# -- verify ----------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What is in a cache, and what is wrong with it."""

    folder: Path
    reference: str = ""
    shards: int = 0
    rows: int = 0
    failed: int = 0
    doubled: int = 0  # rows beyond the first of a key and numerics: harmless
    n_bytes: int = 0
    orphans: int = 0
    leftovers: int = 0
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong


def verify(folder: Path) -> Findings:
    """Every byte, page, row and sum of a cache."""
    findings = Findings(folder)
    try:
        cache = Cache(folder, None, every_byte=True)
    except IntegrityError as error:
        findings.damaged[REFERENCE_FILE] = str(error)
        return findings
    findings.reference = cache.reference["name"]
    findings.orphans, findings.leftovers = len(_orphans(folder)), len(_leftovers(folder))
    findings.damaged |= {path.name: reason for path, reason in cache.damaged.items()}
    whole = []
    for record in cache.records:
        try:
            reason = _wrong_content(cache, record)
        except (IntegrityError, FileNotFoundError) as error:
            reason = str(error)
        if reason:
            findings.damaged[record["file"]] = reason
            continue
        whole.append(record)
        findings.rows += record["rows"]
        findings.n_bytes += record["bytes"]
        findings.failed += int(np.isnan(cache.values(record)[1]).sum())
    findings.shards = len(whole)
    for kept in _kept(cache, whole).values():
        findings.doubled += int((~kept.rows).sum())
    return findings


def _wrong_content(cache: Cache, record: dict[str, Any]) -> str | None:
    """What no scorer would have written into a shard whose bytes are as they were written; None where all is well."""
    keys, _ = cache.values(record)
    if not keys.ascend():
        return "its keys are not in order, or one is there twice"
    for batch in cache.batches(record):
        if reason := _wrong_batch(batch, record):
            return reason
    return None


def _wrong_batch(batch: pa.Table, record: dict[str, Any]) -> str | None:
    if batch.schema.names != CACHE.names:
        return "it has other columns than a cache has"
    is_usable, sums, n_completion = usable(batch), usable_sums(batch), batch["n_completion"].to_numpy()
    is_there = batch["logp_sum"].is_valid().to_numpy()
    numerics = batch["numerics_id"].unique().to_pylist()
    logps = batch["logps"].combine_chunks()
    lists = logps.is_valid().to_numpy(zero_copy_only=False)
    lengths = logps.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    tokens = logps.flatten().to_numpy()
    # In float64 and in order, as bincount adds: pairwise sums differ in the last bits only.
    found = np.bincount(np.repeat(np.arange(len(lengths)), lengths), tokens.astype(np.float64), len(lengths))
    with np.errstate(invalid="ignore"):
        off = ~(np.abs(found - sums) <= _SUM_TOLERANCE * np.maximum(1.0, np.abs(sums)))
    wrong = {
        "a row's numerics are not those of its record": np.array(numerics != [record["numerics_id"]]),
        "a row has a value and its status says that it has none, or the other way round": is_usable != is_there,
        "a log-prob is not finite": np.concatenate([is_usable & ~np.isfinite(sums), ~np.isfinite(tokens)]),
        "a log-prob is above zero": np.concatenate([sums > _MOST * np.maximum(1, n_completion), tokens > _MOST]),
        "a row has another number of log-probs than its answer has tokens": lists & (lengths != n_completion),
        "logp_sum is not the sum of logps": lists & is_usable & off,
    }
    return next((reason for reason, rows in wrong.items() if rows.any()), None)


# -- gc --------------------------------------------------------------------------------------------------------------


@dataclass
class Removal:
    """What gc has done, or would do."""

    folder: Path
    leftovers: int = 0
    orphans: int = 0
    superseded: int = 0  # shards that others hold every row of
    merged: int = 0  # shards that became fewer
    into: int = 0
    doubled: int = 0  # rows that were there more than once
    shards: int = 0  # afterwards
    damaged: dict[str, str] = field(default_factory=dict)


def gc(folder: Path, target_bytes: int, dry_run: bool = False, old_seconds: float = OLD_SECONDS) -> Removal:
    """Remove what nothing needs, and merge small shards. Scorers and trainers may be at work."""
    if dry_run:
        return _gc(folder, target_bytes, True, old_seconds)
    with claims.claimed(claims.path_of(folder, "gc"), wait=False) as is_mine:
        if not is_mine:
            raise UsageError(f"Another gc is at work on {folder}. Wait for it, or stop it.")
        os.utime(claims.path_of(folder, "gc"))
        return _gc(folder, target_bytes, False, old_seconds)


def _gc(folder: Path, target_bytes: int, dry_run: bool, old_seconds: float) -> Removal:
    cache, done = Cache(folder, None, every_byte=True), Removal(folder)
    done.damaged = {path.name: reason for path, reason in cache.damaged.items()}
    done.leftovers = _remove_leftovers(folder, old_seconds, dry_run)
    done.orphans = _remove_orphans(folder, old_seconds, dry_run)
    kept = _kept(cache, cache.records)
    done.doubled = sum(int((~each.rows).sum()) for each in kept.values())
    superseded = [each.record for each in kept.values() if not each.rows.any()]
    done.superseded = len(superseded)
    if not dry_run:
        _remove(cache, superseded)
    for group in _groups(cache, [each for each in kept.values() if each.rows.any()], target_bytes):
        done.merged += len(group)
        done.into += 1
        if not dry_run:
            _merge(cache, group)
    done.shards = len(cache.records) - done.superseded - done.merged + done.into
    return done


@dataclass
class _Kept:
    """A shard, and which of its rows no other shard holds as well or better."""

    record: dict[str, Any]
    rows: np.ndarray


def _kept(cache: Cache, records: Sequence[dict[str, Any]]) -> dict[str, _Kept]:
    """Of each shard, by its file: the rows to keep, so that every key has one for each numerics.

    A value before a failure, then the smaller value, which is what readers take, then the later generation.
    """
    ordered = sorted(records, key=lambda record: (record["numerics_id"], -generation_of(record), record["file"]))
    rows = {record["file"]: np.ones(record["rows"], bool) for record in ordered}
    for numerics_id in dict.fromkeys(record["numerics_id"] for record in ordered):
        of_these = [record for record in ordered if record["numerics_id"] == numerics_id]
        n_shares = -(-sum(record["rows"] for record in of_these) // _ROWS_AT_ONCE)
        for share in range(n_shares):
            _drop_doubled(cache, of_these, rows, share, n_shares)
    return {record["file"]: _Kept(record, rows[record["file"]]) for record in ordered}


def _drop_doubled(
    cache: Cache, records: Sequence[dict[str, Any]], rows: dict[str, np.ndarray], share: int, n_shares: int
) -> None:
    """Mark the rows of one share of all keys that another row stands for."""
    keys, sums, shard, place = [], [], [], []
    for i, record in enumerate(records):
        theirs, values = cache.values(record)
        # Keys are hashes: their first bits deal them out evenly.
        at = np.flatnonzero((theirs.high >> np.uint64(40)) % np.uint64(n_shares) == share)
        keys.append(theirs.take(at))
        sums.append(values[at])
        shard.append(np.full(len(at), i, np.int32))
        place.append(at)
    every = concat(keys)
    twice = _occur_twice(every.high)
    if not len(twice):
        return
    key, value = every.take(twice), np.concatenate(sums)[twice]
    of_shard, of_place = np.concatenate(shard)[twice], np.concatenate(place)[twice]
    # nan, for a failure, sorts last.
    order = np.lexsort((of_place, of_shard, value, key.low, key.high))
    is_same = (key.high[order][1:] == key.high[order][:-1]) & (key.low[order][1:] == key.low[order][:-1])
    losers = order[1:][is_same]
    for i in np.unique(of_shard[losers]):
        rows[records[i]["file"]][of_place[losers[of_shard[losers] == i]]] = False


def _occur_twice(numbers: np.ndarray) -> np.ndarray:
    """Places of all numbers that are there more than once."""
    order = np.argsort(numbers)
    same = numbers[order][1:] == numbers[order][:-1]
    return order[np.concatenate([[False], same]) | np.concatenate([same, [False]])] if len(numbers) else order


def _groups(cache: Cache, kept: Sequence[_Kept], target_bytes: int) -> Iterator[list[_Kept]]:
    """Shards to write anew: each large one with rows to drop, and small ones together, up to the target."""
    small: dict[str, list[tuple[_Kept, int]]] = {}
    for each in sorted(kept, key=lambda each: str(each.record["file"])):
        tokens = cache.read(each.record, ["n_completion"])["n_completion"].to_numpy()[each.rows].sum(dtype=np.int64)
        weight = _ROW_BYTES * int(each.rows.sum()) + _TOKEN_BYTES * int(tokens)
        if 2 * weight < target_bytes:
            small.setdefault(each.record["numerics_id"], []).append((each, weight))
        elif not each.rows.all():
            yield [each]
    for numerics_id in sorted(small):
        yield from _filled(small[numerics_id], target_bytes)


def _filled(small: Sequence[tuple[_Kept, int]], target_bytes: int) -> Iterator[list[_Kept]]:
    group: list[_Kept] = []
    total = 0
    for each, weight in small:
        if total + weight > target_bytes:
            # More than half of the target, so that it is never small again.
            yield group
            group, total = [], 0
        group.append(each)
        total += weight
    if len(group) > 1 or (group and not group[0].rows.all()):
        yield group


def _merge(cache: Cache, group: Sequence[_Kept]) -> None:
    tables = [cache.read(each.record).cast(CACHE).filter(pa.array(each.rows)) for each in group]
    rows = pa.concat_tables(tables).sort_by("key")
    replaced = [each.record for each in group]
    merged = cache.commit_merged(rows, replaced)
    reason = artifact.damage(cache.folder, merged) or (
        merged["rows"] != len(rows) and "has other rows than were merged"
    )
    if reason:
        raise IntegrityError(
            f"{cache.folder / merged['file']} {reason}. Nothing is lost: what it was merged from is still there. "
            f"Delete {cache.record_path(merged)} and run gc again."
        )
    _remove(cache, replaced)


def _remove(cache: Cache, records: Sequence[dict[str, Any]]) -> None:
    """First the records: a record without its shard would be damage, a shard without its record is nothing."""
    if not records:
        return
    artifact.commit_bytes(cache.folder / _REMOVING, artifact.seal({"files": [record["file"] for record in records]}))
    for record in records:
        cache.record_path(record).unlink(missing_ok=True)
    descriptor = os.open(cache.folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for record in records:
        (cache.folder / record["file"]).unlink(missing_ok=True)
    (cache.folder / _REMOVING).unlink(missing_ok=True)


# -- what nothing vouches for ----------------------------------------------------------------------------------------


def _leftovers(folder: Path) -> list[Path]:
    """Temporaries and claims, of processes that are gone or still at work."""
    mine = claims.path_of(folder, "gc")
    return [path for pattern in (".*.tmp", f".*{claims.SUFFIX}") for path in folder.glob(pattern) if path != mine]


def _remove_leftovers(folder: Path, old_seconds: float, dry_run: bool) -> int:
    before = _leftovers(folder)
    if dry_run:
        return len(before)
    artifact.remove_leftovers(folder)
    claims.remove_free(folder)
    for path in _leftovers(folder):
        # Of another machine, whose processes cannot be asked for.
        if path.suffix == ".tmp" and _age(folder, path) > old_seconds:
            path.unlink(missing_ok=True)
    return len(before) - len(set(before) & set(_leftovers(folder)))


def _orphans(folder: Path) -> list[Path]:
    """Shards that no record names. They are listed before the records: a record comes after its shard."""
    shards = sorted(folder.glob("*.parquet"))
    cache = Cache(folder, None)
    named = {record["file"] for record in cache.records}
    unknown = {path.stem for path in cache.damaged}
    return [path for path in shards if path.name not in named and path.name.rpartition("-")[0] not in unknown]


def _remove_orphans(folder: Path, old_seconds: float, dry_run: bool) -> int:
    n, begun = 0, _begun(folder)
    for path in _orphans(folder):
        if path.name not in begun and _age(folder, path) <= old_seconds:
            continue
        if dry_run:
            n += 1
            continue
        with claims.claimed(claims.path_of(folder, path.name.rpartition("-")[0]), wait=False) as is_free:
            if is_free and path in _orphans(folder):
                path.unlink(missing_ok=True)
                n += 1
    if not dry_run:
        (folder / _REMOVING).unlink(missing_ok=True)
    return n


def _begun(folder: Path) -> set[str]:
    """The files that a gc had begun to remove when it was killed."""
    try:
        return set(artifact.unseal(folder / _REMOVING)["files"])
    except IntegrityError:
        return set()


def _age(folder: Path, path: Path) -> float:
    """By the clock of the file system, which other machines write by, too."""
    clock = claims.path_of(folder, "gc")
    try:
        now = clock.stat().st_mtime if clock.exists() else time.time()
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
