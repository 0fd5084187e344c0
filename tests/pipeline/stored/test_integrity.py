"""No wrong value is served: whatever bit flips and wherever a file ends, it is noticed, and only that shard is missing."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact, shards, verified_shards
from prefcache.pipeline.stored.cache_maintenance import verify
from prefcache.pipeline.stored.memos import VerifiedMemo
from prefcache.pipeline.stored.records import ShardRecord
from tests.helpers.caches import BUDGET, MINE, MODEL, PAIRS, Cache, create, expected, fill, keys_of, reopen, rot

RIGHT = {f"ref_{side}_logp": expected(PAIRS, side) for side in ("chosen", "rejected")}


def flipped(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(8 * len(data))
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def truncated(data: bytes, dice: random.Random) -> bytes:
    # More than the line end of a record, which means nothing.
    return data[: dice.randrange(len(data) - 1)]


def files_of(cache: Cache) -> list[tuple[Path, dict]]:
    """Every shard and every record, with the record that it belongs to."""
    return [
        (path, record) for record in cache.records for path in (cache.folder / record.file, cache.record_path(record))
    ]


@pytest.mark.parametrize(
    ("change", "times"),
    [
        pytest.param(flipped, 300, id="flips"),
        pytest.param(truncated, 100, id="truncations"),
        pytest.param(flipped, 2000, id="more flips", marks=pytest.mark.slow),
    ],
)
def test_every_change_is_noticed_and_costs_one_shard(tmp_path, change: Callable, times: int):
    cache = fill(create(tmp_path), PAIRS)
    held = {record.file: keys_of_shard(cache, record) for record in cache.records}
    dice, files = random.Random(0), files_of(cache)
    for i in range(times):
        path, record = dice.choice(files)
        data = path.read_bytes()
        path.write_bytes(change(data, dice))
        found = reopen(cache)
        assert [*found.damaged] == [cache.record_path(record)]
        with pytest.raises(IntegrityError, match="prefcache score"):
            found.refuse_damage()
        assert set().union(*keys_of(PAIRS, found.plan(PAIRS, [MINE], BUDGET))) == held[record.file]
        check_served(found, missing=held[record.file])
        if i % 50 == 0:
            assert [*verify(cache.folder).damaged] == [cache.record_path(record).name]
        path.write_bytes(data)
    assert not reopen(cache).damaged and not verify(cache.folder).damaged


def keys_of_shard(cache: Cache, record: dict) -> set[bytes]:
    return set(cache.read(record, ["key"])["key"].to_pylist())


def check_served(cache: Cache, missing: set[bytes]) -> None:
    """Every value is right or, as those of the damaged shard, not there."""
    cache.damaged = {}  # what is left of it, as a scorer sees it that has discarded the shard
    for side in ("chosen", "rejected"):
        values = cache.join(PAIRS, [MINE])[f"ref_{side}_logp"]
        is_missing = [key in missing for key in PAIRS[f"{side}_key"].to_pylist()]
        assert np.ma.getmaskarray(values).tolist() == is_missing
        for value, right in zip(values.tolist(), RIGHT[f"ref_{side}_logp"], strict=True):
            assert value is None or value == right


def test_what_rots_unseen_by_the_file_system_is_noticed_where_it_is_read(tmp_path, monkeypatch):
    # As if every shard looked to the file system as it did when it was last found whole.
    cache = fill(create(tmp_path), PAIRS)
    monkeypatch.setattr(verified_shards.VerifiedShards, "find_damage", lambda *_: None)
    dice, n_noticed = random.Random(1), 0
    for _ in range(1000):
        record = dice.choice(cache.records)
        path = cache.folder / record.file
        data = path.read_bytes()
        path.write_bytes(flipped(data, dice))
        found = reopen(cache)
        assert not found.damaged
        try:
            served = {name: values.tolist() for name, values in found.join(PAIRS, [MINE]).items()}
            assert served == RIGHT  # the bit was in a column that is not read
        except IntegrityError as error:
            assert path.name in str(error) and [*found.damaged] == [cache.record_path(record)]
            n_noticed += 1
        path.write_bytes(data)
    assert n_noticed > 400


@pytest.mark.parametrize("column", ["key", "logp_sum", "status"])
def test_a_bit_that_rots_in_what_is_read_is_noticed_scored_again_and_then_right(tmp_path, monkeypatch, column):
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)
    cache = reopen(fill(create(tmp_path), PAIRS))
    record = cache.records[2]
    rot(cache, record, column)
    found = reopen(cache)
    assert not found.damaged  # opening has not read it
    with pytest.raises(IntegrityError, match=rf"{record.file} .*prefcache score"):
        found.join(PAIRS, [MINE])
    # From now on it is known, and the scorer computes what it held: also one that planned before it was known.
    again = reopen(cache)
    assert [*again.damaged] == [cache.record_path(record)]
    again.discard_damaged()
    for scorer in (reopen(again), found):
        assert {k: v.tolist() for k, v in fill(scorer, PAIRS).join(PAIRS, [MINE]).items()} == RIGHT


def test_unchanged_shards_are_not_hashed_again_and_changed_ones_are(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)
    cache = reopen(fill(create(tmp_path), PAIRS))
    hashed = []
    damage = artifact.damage
    monkeypatch.setattr(artifact, "damage", lambda f, e: hashed.append(e.file) or damage(f, e))
    reopen(cache)
    assert hashed == []
    shard = cache.folder / cache.records[1].file
    os.utime(shard)
    reopen(cache)
    assert hashed == [shard.name]
    Cache(cache.folder, MODEL, every_byte=True)
    assert sorted(hashed[1:]) == sorted(record.file for record in cache.records)


def test_a_shard_younger_than_the_clock_can_tell_is_hashed_again(tmp_path):
    # Written again within the same tick, it would look the same.
    fill(create(tmp_path), PAIRS)
    reopen(create(tmp_path))
    memo = next((tmp_path / "cache").glob(".verified-*"), None)
    assert memo is None or VerifiedMemo.read(memo).known == {}


def test_a_cache_that_cannot_be_written_to_opens_all_the_same(tmp_path, monkeypatch):
    cache = fill(create(tmp_path), PAIRS)
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artifact, "commit_bytes", refuses)
    assert reopen(cache).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == RIGHT["ref_chosen_logp"]


def test_rows_that_a_record_does_not_name_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """Any number of rows of one key are a few hundred bytes of Parquet."""
    cache = fill(create(tmp_path), PAIRS)
    (first, *_) = cache.records
    many = artifact.parquet(pa.concat_tables([cache.read(first).slice(0, 1)] * 1000), float_lists=["logps"])
    facts = {"bytes": len(many), "xxh3_128": artifact.checksum_bytes(many), "blocks": shards.describe_blocks(many)}
    record = ShardRecord.make(**{**first.facts(), **facts, "rows": 2})
    (cache.folder / record.file).write_bytes(many)
    read = []
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, *arguments, **options: read.append(self))
    with pytest.raises(IntegrityError, match="has 1000 rows, 2 were written"):
        shards.read_rows(cache.folder, record)
    assert not read
