"""gc on an object store: nothing is lost, and nothing goes that a scorer of the last day may still want."""

import json
import os
import time

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import store_writer
from prefcache.pipeline.stored.cache_maintenance import gc, verify
from tests.helpers.caches import MINE, NUMERICS, PAIRS, fill, reopen, scored
from tests.helpers.machines import EXPECTED, LISTS, names, token_lists, values

TARGET = 1 << 30


@pytest.fixture
def cache(machine):
    return fill(machine("here"), PAIRS)


def test_small_shards_become_one_and_every_machine_reads_the_same_values(cache, machine, s3):
    result = gc(machine("there").folder, TARGET)
    assert (result.merged, result.into, result.shards, result.kept) == (6, 1, 1, 6)
    for name in ("here", "there", "third"):
        assert values(reopen(machine(name))) == EXPECTED and token_lists(machine(name)) == LISTS
    assert len(names(s3, ".parquet")) == 7  # those without a record are kept
    assert gc(cache.folder, TARGET).shards == 1


def test_replaced_shards_go_a_day_after_they_were_replaced(cache, s3):
    gc(cache.folder, TARGET)
    kept = gc(cache.folder, TARGET)
    assert (kept.orphans, kept.kept) == (0, 6)
    assert gc(cache.folder, TARGET, old_seconds=-1).orphans == 6
    (left,) = names(s3, ".parquet")
    assert left.startswith(f"{cache.folder.name}/merged-") and not [
        name for name in s3.objects() if "/removed/" in name
    ]
    assert values(reopen(cache)) == EXPECTED


def test_a_shard_without_a_record_goes_when_it_is_old(cache, s3):
    record = names(s3, ".json")[0]
    s3.remove(record)
    young = gc(cache.folder, 1)
    assert (young.orphans, young.kept) == (0, 1)
    assert gc(cache.folder, 1, old_seconds=-1).orphans == 1
    assert len(names(s3, ".parquet")) == 5


def test_a_shard_whose_record_comes_meanwhile_stays(cache, s3, monkeypatch):
    from prefcache.pipeline.stored import cache_maintenance

    record = names(s3, ".json")[0]
    content = s3.read(record)
    s3.remove(record)
    find = cache_maintenance._find_orphans

    def find_then_commit(*arguments):
        found = find(*arguments)
        s3.write(record, content)
        return found

    monkeypatch.setattr(cache_maintenance, "_find_orphans", find_then_commit)
    assert gc(cache.folder, 1, old_seconds=-1).orphans == 0
    assert values(reopen(cache)) == EXPECTED


def test_claims_of_the_dead_go_when_they_are_old(cache, s3):
    s3.write(f"{cache.folder.name}/claims/{'a' * 32}", b"{}")
    assert gc(cache.folder, 1).leftovers == 0 and verify(cache.folder).leftovers == 1
    assert gc(cache.folder, 1, old_seconds=-1).leftovers == 1
    assert not [name for name in s3.objects() if "/claims/" in name]


def test_gc_goes_on_where_one_on_another_machine_was_killed(cache, s3, monkeypatch):
    monkeypatch.setattr(store_writer, "_STALE_SECONDS", 1.5)
    elsewhere = {"id": "x", "host": "elsewhere", "pid": os.getpid(), "boot": "another", "time": 0.0}
    s3.write(f"{cache.folder.name}/claims/gc", json.dumps(elsewhere).encode())
    with pytest.raises(UsageError, match="Another gc is at work"):
        gc(cache.folder, TARGET)
    time.sleep(3)
    assert gc(cache.folder, TARGET).merged == 6
    assert not [name for name in s3.objects() if "/claims/" in name]


def test_a_dry_run_changes_nothing_in_the_store(cache, s3):
    s3.remove(names(s3, ".json")[0])
    s3.write(f"{cache.folder.name}/claims/{'a' * 32}", b"{}")
    before = {name: s3.read(name) for name in s3.objects()}
    would = gc(cache.folder, TARGET, dry_run=True, old_seconds=-1)
    assert (would.merged, would.orphans, would.leftovers) == (5, 1, 1)
    assert {name: s3.read(name) for name in s3.objects()} == before


def test_doubled_rows_are_removed(cache, machine, s3):
    """Chunks of another size have the same rows once more."""
    for slots in cache.plan(PAIRS, ["another"], 90).chunks:
        cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    assert verify(cache.folder).doubled == 24
    gc(cache.folder, 1)
    after = verify(machine("there").folder)
    assert (after.rows, after.doubled, after.damaged) == (24, 0, {})
    assert values(machine("third")) == EXPECTED


def test_a_shard_that_is_damaged_in_the_store_is_named_and_not_merged(cache, s3):
    name = names(s3, ".parquet")[0]
    s3.write(name, s3.read(name)[:-1] + b"x")
    cache.folder.joinpath(name.rpartition("/")[2]).unlink()
    result = gc(cache.folder, TARGET)
    assert len(result.damaged) == 1 and result.merged == 5
    assert name in names(s3, ".parquet")
