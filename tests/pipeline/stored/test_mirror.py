"""A cache in an object store, read and written through its mirror on this machine, by a real S3 server."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.stored import artifact, signatures
from prefcache.pipeline.stored import mirror as mirror_module
from prefcache.pipeline.stored.cache_maintenance import gc, verify
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.mirror import find_mirror
from prefcache.pipeline.stored.signatures import SigningKey
from tests.helpers.caches import MINE, MODEL, NUMERICS, PAIRS, REFERENCE, Cache, expected, fill, reopen, scored
from tests.helpers.machines import EXPECTED, LISTS, names, token_lists, values
from tests.helpers.project import ROOT
from tests.helpers.ssh_keys import make_key
from tests.helpers.stores import KEY_ID, SECRET


def test_another_machine_reads_what_one_has_scored(machine, s3):
    here = fill(machine("here"), PAIRS)
    assert values(here) == EXPECTED
    there = machine("there")
    assert there.folder != here.folder and there.place == here.place == f"{s3.url}/{here.folder.name}"
    assert there.plan(PAIRS, [MINE], 30).n_missing == 0
    assert values(there) == EXPECTED and token_lists(there) == LISTS


def test_the_store_holds_what_a_folder_would_hold_byte_for_byte(machine, s3, tmp_path):
    fill(machine("here"), PAIRS)
    folder = fill(Cache(create_cache(tmp_path / "local", "org/tiny model", REFERENCE).folder, MODEL), PAIRS).folder
    files = {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: s3.read(name) for name in s3.objects()} == files


def test_opening_again_asks_for_a_listing_and_reads_no_object_twice(machine, s3):
    fill(machine("here"), PAIRS)
    values(machine("there"))
    before = s3.server_requests
    cache = reopen(machine("there"))
    values(cache)
    asked = s3.server_requests - before
    # reference.json is looked at each time; records and rows are here.
    assert asked["get"] <= 2 and asked["put"] <= 1, asked


def test_values_are_read_without_the_lists_of_tokens(machine, s3):
    cache = create_large(machine("here"))
    size = sum(record.bytes for record in cache.records)
    there = machine("there")
    store = find_mirror(there.folder).store
    store.bytes.clear()
    there.logps([LARGE["chosen_key"]], [MINE])
    assert 0 < store.bytes["received"] < size / 4


# Answers of 100 to 399 tokens, so that rows are mostly lists.
def _large_pairs(n: int):
    from tests.helpers.caches import prepared

    random = np.random.default_rng(0)
    ids = lambda low, high: random.integers(0, 90, random.integers(low, high)).tolist()  # noqa: E731
    return prepared([([i, *ids(3, 9)], ids(100, 400), ids(100, 400)) for i in range(n)])


LARGE = _large_pairs(300)


def create_large(cache: Cache) -> Cache:
    return fill(cache, LARGE, budget=40_000)


def test_few_rows_are_read_without_the_whole_shard(machine, s3, monkeypatch):
    monkeypatch.setattr("prefcache.pipeline.stored.cache_writer._ROWS_PER_GROUP", 20)
    here = create_large(machine("here"))
    gc(here.folder, 1 << 30)  # one shard of 600 rows, 30 row groups
    (record,) = reopen(here).records
    there = machine("there")
    few = LARGE.slice(7, 2)
    store = find_mirror(there.folder).store
    store.bytes.clear()
    assert token_lists(there, few) == [[-i / 8 for i in ids] for ids in few["chosen_ids"].to_pylist()]
    assert store.bytes["received"] < record.bytes / 3
    assert not (there.folder / record.file).exists()


def test_many_rows_are_read_as_a_whole_shard(machine, s3):
    create_large(machine("here"))
    there = machine("there")
    token_lists(there, LARGE)
    assert all((there.folder / record.file).is_file() for record in there.records)
    assert not list((there.folder.parent / ".parts").glob("*.parquet"))


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x5A
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["*/*.parquet", ".parts/*.parquet", ".parts/*.blocks", "*/*.json", ".*.json"])
def test_damage_of_a_mirror_is_never_damage_of_the_store(machine, s3, what):
    """Bytes are flipped in every copy, which is then read as if nothing was wrong."""
    create_large(machine("here"))
    stored = {name: s3.read(name) for name in s3.objects()}
    there = machine("there")
    sums = there.join(LARGE, [MINE])["ref_chosen_logp"].tolist()
    if what == "*/*.parquet":
        there.fetch_shards()
        reopen(there)
    paths = list(there.folder.parent.glob(what))
    assert paths
    for path in paths:
        for place in range(3, len(path.read_bytes()), 1 + len(path.read_bytes()) // 5):
            flip(path, place)
    again = machine("there")
    assert again.join(LARGE, [MINE])["ref_chosen_logp"].tolist() == sums == expected(LARGE, "chosen")
    assert token_lists(again, LARGE) == [[-i / 8 for i in ids] for ids in LARGE["chosen_ids"].to_pylist()]
    again.discard_damaged()
    assert {name: s3.read(name) for name in s3.objects()} == stored


def test_a_copy_that_is_dropped_just_before_it_is_opened_is_no_damage_of_the_store(machine, s3, monkeypatch):
    here, has_whole = fill(machine("here"), PAIRS), mirror_module.Mirror.has_whole

    def look_then_lose(mirror, folder, record):
        answer = has_whole(mirror, folder, record)
        (folder / record.file).unlink(missing_ok=True)  # as trim or verify of another process may
        return answer

    monkeypatch.setattr(mirror_module.Mirror, "prefetch", lambda *arguments: None)
    monkeypatch.setattr(mirror_module.Mirror, "has_whole", look_then_lose)
    assert values(here) == EXPECTED and not here.damaged


def test_what_this_machine_lacks_is_no_damage_of_the_store(machine, s3, monkeypatch):
    """Scoring deletes the records of damaged shards, for everybody."""
    fill(machine("here"), PAIRS)
    there, opened = machine("there"), os.open

    def refuse(path, *arguments, **options):
        if ".parts" in str(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(mirror_module.Mirror, "prefetch", lambda *arguments: None)
    with pytest.raises(ResourceError, match=r"cannot be read on this machine .*Too many open files"):
        values(there)
    assert not there.damaged


def test_a_mirror_may_be_deleted_at_any_time(machine, s3):
    here = fill(machine("here"), PAIRS)
    shutil.rmtree(here.folder.parent)
    assert values(machine("here")) == EXPECTED


def test_a_mirror_that_is_deleted_while_a_scorer_fills_the_store_costs_nothing(machine, s3):
    cache = machine("here")
    writer = CacheWriter(cache)
    with writer.flushing():
        for slots in cache.plan(PAIRS, [MINE], 30).chunks:
            rows = scored(PAIRS, slots)
            with writer.claim(rows["key"].to_pylist(), MINE) as claim:
                assert claim == "mine"
                writer.commit(rows, NUMERICS[MINE], MINE, None, in_background=True)
            shutil.rmtree(cache.folder.parent, ignore_errors=True)  # a record may just be coming back
    shutil.rmtree(cache.folder.parent, ignore_errors=True)
    assert values(reopen(cache)) == EXPECTED and len(names(s3, ".parquet")) == 6


def test_a_shard_that_the_store_has_changed_counts_for_nothing_and_is_scored_again(machine, s3):
    fill(machine("here"), PAIRS)
    name = names(s3, ".parquet")[0]
    data = bytearray(s3.read(name))
    data[20] ^= 1
    s3.write(name, bytes(data))
    there = machine("there")
    with pytest.raises(IntegrityError, match=r"1 of 6 shards of s3://.* are damaged"):
        there.logps([PAIRS["chosen_key"], PAIRS["rejected_key"]], [MINE])
    there = fill_again(there)
    assert values(there) == EXPECTED and values(machine("third")) == EXPECTED


def fill_again(cache: Cache) -> Cache:
    """Score what is missing, as the stage does."""
    cache.discard_damaged()
    cache.plan(PAIRS, [MINE], 30)
    cache.discard_damaged()
    return fill(cache, PAIRS)


def test_a_damaged_shard_that_another_has_scored_again_stays(machine, s3):
    """Both have found the damage; the one that is slower deletes nothing of the other's work."""
    fill(machine("here"), PAIRS)
    name = names(s3, ".parquet")[0]
    s3.remove(name)
    quick, slow = machine("quick"), machine("slow")
    assert len(quick.damaged) == len(slow.damaged) == 1
    time.sleep(2.1)  # the store's times are in seconds
    quick.discard_damaged()
    chunk = f"{name.rpartition('-')[0]}.json"
    for slots in quick.plan(PAIRS, [MINE], 30).chunks:
        quick.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    assert chunk in s3.objects()
    slow.discard_damaged()
    assert chunk in s3.objects() and not slow.damaged
    assert values(machine("third")) == EXPECTED == values(reopen(slow))


@pytest.mark.parametrize("change", ["missing", "short", "long", "empty"])
def test_a_shard_of_another_size_is_seen_without_reading_it(machine, s3, change):
    fill(machine("here"), PAIRS)
    name = names(s3, ".parquet")[2]
    data = s3.read(name)
    if change == "missing":
        s3.remove(name)
    else:
        s3.write(name, {"short": data[:-1], "long": data + b"x", "empty": b""}[change])
    there = machine("there")
    (reason,) = there.damaged.values()
    assert "object store" in reason and name.rpartition("/")[2] in reason
    assert values(fill_again(there)) == EXPECTED


def test_a_damaged_reference_is_written_anew_in_the_store(machine, s3):
    fill(machine("here"), PAIRS)
    (name,) = names(s3, "reference.json")
    content = s3.read(name)
    s3.write(name, content[:-20])
    assert values(machine("there")) == EXPECTED and s3.read(name) == content
    s3.write(name, artifact.seal(artifact.unseal_bytes(content, Path(name)) | {"schema_version": 99}))
    with pytest.raises(IntegrityError, match="has schema version 99"):
        machine("third")  # a newer version's, which is not ours to replace


def test_a_record_that_changed_in_the_store_is_read_again(machine, s3):
    fill(machine("here"), PAIRS)
    there = machine("there")
    record = names(s3, ".json")[0]
    s3.write(record, b'{"not": "a record"}')
    damaged = reopen(there).damaged
    assert [path.name for path in damaged] == [record.rpartition("/")[2]]


def test_a_record_that_is_gone_in_the_store_is_gone_here(machine, s3):
    fill(machine("here"), PAIRS)
    there = machine("there")
    s3.remove(names(s3, ".json")[0])
    again = reopen(there)
    assert len(again.records) == 5 and not again.damaged


@pytest.mark.parametrize("name", ["../evil.json", ".."])
def test_a_store_with_an_object_whose_name_leads_elsewhere_is_refused(machine, s3, name):
    here = fill(machine("here"), PAIRS)
    s3.client.put_object(Bucket=s3.name, Key=f"refs/{here.folder.name}/{name}", Body=b"{}")
    with pytest.raises(UsageError, match="has an object whose name is not a path"):
        machine("there")


@pytest.mark.parametrize("name", ["a/b.json", "evil.json", "0" * 32 + ".json.sig", "merged-x.json"])
def test_objects_of_other_names_are_left_alone(machine, s3, tmp_path, name):
    here = fill(machine("here"), PAIRS)
    s3.client.put_object(Bucket=s3.name, Key=f"refs/{here.folder.name}/{name}", Body=b"{}")
    there = machine("there")
    assert values(there) == EXPECTED and len(there.records) == 6
    assert not list(tmp_path.rglob("evil.json"))


def test_a_store_that_was_emptied_is_a_new_cache(machine, s3):
    here = fill(machine("here"), PAIRS)
    for name in s3.objects():
        s3.remove(name)
    again = machine("here")
    assert not again.records and list(s3.objects()) == [f"{here.folder.name}/reference.json"]
    assert values(fill(again, PAIRS)) == EXPECTED == values(machine("there"))


# -- several at once -------------------------------------------------------------------------------------------------


def test_of_two_values_of_one_chunk_the_first_stays_on_every_machine(machine):
    first, second = machine("first"), machine("second")
    (slots, *_) = first.plan(PAIRS, [MINE], 30).chunks
    first.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    second.commit(scored(PAIRS, slots, shift=1e-4), NUMERICS[MINE], MINE, None)
    served = [
        reopen(each).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() for each in (first, second, machine("third"))
    ]
    assert served[0] == served[1] == served[2]
    assert set(served[0]) - {None} <= set(EXPECTED["chosen"])
    of_no_use = {path.name for path in second.folder.glob("*.parquet")} - {path.name for path in first.folder.glob("*")}
    assert not of_no_use


def test_rows_that_gc_merges_while_they_are_read_are_found(machine, s3):
    fill(machine("here"), PAIRS)
    there = machine("there")
    gc(machine("third").folder, 1 << 30, old_seconds=-1)
    gc(machine("third").folder, 1 << 30, old_seconds=-1)  # the shards of the former records go as well
    assert len(names(s3, ".parquet")) == 1
    assert values(there) == EXPECTED and token_lists(reopen(there)) == LISTS


def test_what_is_sent_during_a_listing_keeps_its_copy(machine, s3, monkeypatch):
    cache = fill(machine("here"), PAIRS)
    mirror = find_mirror(cache.folder)
    (slots, *_) = cache.plan(PAIRS, ["another"], 90).chunks
    listing = type(mirror.store).list_objects

    def list_then_send(store, prefix=""):
        found = listing(store, prefix)
        monkeypatch.undo()
        cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
        return found

    monkeypatch.setattr(type(mirror.store), "list_objects", list_then_send)
    mirror.refresh(cache.folder)
    assert len(list(cache.folder.glob("*.parquet"))) == 7 == len(reopen(cache).records)


def test_a_statement_is_sent_though_another_process_lists_the_store_meanwhile(machine, s3, tmp_path, monkeypatch):
    cache = fill(machine("here"), PAIRS)
    mirror, key = find_mirror(cache.folder), SigningKey(make_key(tmp_path / "ann"))
    put = type(mirror.store).put

    def list_then_put(store, name, data):
        mirror_module.Mirror(cache.folder.parent, store).refresh(cache.folder)  # as another process does
        put(store, name, data)

    monkeypatch.setattr(type(mirror.store), "put", list_then_put)
    described = [signatures.describe(cache.folder, record) for record in cache.records]
    CacheWriter(cache, key).sign(described, key)
    (statement,) = signatures.list_statements(cache.folder)
    assert {name.rpartition("/")[2] for name in s3.objects() if "signed-" in name} == {
        statement.name,
        f"{statement.name}.sig",
    }


def test_verify_leaves_a_shard_that_a_scorer_is_about_to_send(machine, s3, monkeypatch):
    cache = fill(machine("here"), PAIRS)
    (slots, *_) = cache.plan(PAIRS, ["another"], 90).chunks
    send = mirror_module.Mirror.send

    def verify_then_send(mirror, folder, *what):
        monkeypatch.undo()
        assert not verify(cache.folder).damaged
        return send(mirror, folder, *what)

    monkeypatch.setattr(mirror_module.Mirror, "send", verify_then_send)
    cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    assert len(reopen(cache).records) == 7


def test_processes_may_share_a_mirror(machine, s3, tmp_path):
    fill(machine("here"), PAIRS)
    machine("shared")
    script = (
        "import sys; from tests.helpers.machines import *; from prefcache.pipeline.stored.cache_maintenance import verify\n"
        "cache = open_cache(sys.argv[1])\n"
        "assert values(cache) == EXPECTED and token_lists(cache) == LISTS and not verify(cache.folder).damaged\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, s3.url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for child in children:
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0, said


# -- the mirror itself -----------------------------------------------------------------------------------------------


def test_copies_that_nobody_used_for_long_go_when_the_mirror_is_full(machine, s3, monkeypatch):
    create_large(machine("here"))
    there = machine("there")
    there.fetch_shards()
    copies = list(there.folder.glob("*.parquet"))
    assert len(copies) == len(there.records) > 2
    long_ago = time.time() - 2 * mirror_module._KEPT_SECONDS
    for age, path in enumerate(copies[:-1]):
        os.utime(path, (long_ago - age, long_ago - age))
    size = sum(path.stat().st_blocks * 512 for path in copies)
    # There is room for two of them.
    monkeypatch.setenv("PREFCACHE_MIRROR_GIB", str(size * 2.5 / len(copies) / 2**30))
    process = mirror_module.Mirror(there.folder.parent, find_mirror(there.folder).store)  # another one
    process._note_fetched(1)
    process.trim()
    left = set(there.folder.glob("*.parquet"))
    assert left == {copies[0], copies[-1]}  # the youngest, and the one that was just used
    assert len(token_lists(there, LARGE)) == 300


def test_what_a_reader_has_asked_for_stays_though_it_was_here_for_long(machine, monkeypatch):
    """DuckDB reads the files after all of them were fetched; the time of the last use is not noted on every disk."""
    create_large(machine("here"))
    there = machine("there")
    there.fetch_shards()
    copies = list(there.folder.glob("*.parquet"))
    copies[0].unlink()
    long_ago = time.time() - 2 * mirror_module._KEPT_SECONDS
    for path in copies[1:]:
        os.utime(path, (long_ago, long_ago))
    monkeypatch.setenv("PREFCACHE_MIRROR_GIB", "0.000001")
    there.fetch_shards()
    assert len(list(there.folder.glob("*.parquet"))) == len(there.records)


def test_short_processes_keep_the_mirror_within_its_limit_too(machine, s3, monkeypatch):
    create_large(machine("here"))
    there = machine("there")
    there.fetch_shards()
    copies = list(there.folder.glob("*.parquet"))
    long_ago = time.time() - 2 * mirror_module._KEPT_SECONDS
    for path in copies:
        os.utime(path, (long_ago, long_ago))
    size = sum(path.stat().st_blocks * 512 for path in copies)
    monkeypatch.setenv("PREFCACHE_MIRROR_GIB", str(size / 2 / 2**30))
    # A process that fetches less than a fiftieth of the limit.
    process = mirror_module.Mirror(there.folder.parent, find_mirror(there.folder).store)
    process._note_fetched(1)
    process.trim()
    assert sum(path.stat().st_blocks * 512 for path in there.folder.glob("*.parquet")) <= size / 2


def test_what_is_in_use_stays_though_the_mirror_is_full(machine, monkeypatch):
    monkeypatch.setenv("PREFCACHE_MIRROR_GIB", "0.000001")
    create_large(machine("here"))
    there = machine("there")
    there.fetch_shards()
    assert len(list(there.folder.glob("*.parquet"))) == len(there.records)


def test_a_folder_from_elsewhere_does_not_say_which_store_is_used(machine, s3, tmp_path):
    """Verified, collected or scored, it would be changed to what that store has, and send rows there."""
    here = fill(machine("here"), PAIRS)
    from_elsewhere = shutil.copytree(here.folder.parent, tmp_path / "from_elsewhere")
    before = s3.server_requests
    with pytest.raises(UsageError, match=r"store.json says that the folder is a mirror of s3://.*Name the URL instead"):
        verify(from_elsewhere / here.folder.name)
    assert s3.server_requests == before
    (from_elsewhere / "store.json").unlink()
    assert not verify(from_elsewhere / here.folder.name).damaged


def test_the_limit_of_a_mirror_is_a_number(machine, monkeypatch):
    fill(machine("here"), PAIRS)
    monkeypatch.setenv("PREFCACHE_MIRROR_GIB", "much")
    with pytest.raises(UsageError, match="PREFCACHE_MIRROR_GIB is 'much'; expected a number of GiB"):
        values(machine("there"))


def test_no_file_holds_credentials(machine, s3, tmp_path):
    fill(machine("here"), PAIRS)
    values(machine("there"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert KEY_ID.encode() not in path.read_bytes() and SECRET.encode() not in path.read_bytes(), path


def test_a_signed_shard_whose_copy_is_dropped_is_read_again_by_its_sha256(machine, s3):
    create_large(machine("here"))
    there = machine("there")
    record, mirror = there.records[0], find_mirror(there.folder)
    sha256 = hashlib.sha256(s3.read(f"{there.folder.name}/{record.file}")).hexdigest()
    mirror.demand(record, {sha256})
    assert len(there.read(record, ["key"])) == record.rows
    assert mirror.has_whole(there.folder, record)  # never in parts
    mirror.demand(record, {"0" * 64})
    mirror.forget(there.folder, record)
    with pytest.raises(IntegrityError, match="has other bytes in the object store than were signed"):
        there.read(record, ["key"])


def test_damage_among_token_values_that_verify_finds_is_scored_again(machine, s3):
    """Scoring reads sums alone, which are in other blocks."""
    create_large(machine("here"))
    there = machine("there")
    record = there.records[0]
    name = f"{there.folder.name}/{record.file}"
    data = bytearray(s3.read(name))
    data[record.blocks[0].bytes + record.blocks[1].bytes // 2] ^= 1
    s3.write(name, bytes(data))
    assert not reopen(there).damaged
    assert list(verify(there.folder).damaged) == [record.name]
    again = machine("there")
    assert [path.name for path in again.damaged] == [record.name]
    again.discard_damaged()
    again = create_large(reopen(again))
    assert not verify(again.folder).damaged and not reopen(again).damaged
    assert token_lists(machine("third"), LARGE) == [[-i / 8 for i in ids] for ids in LARGE["chosen_ids"].to_pylist()]


def test_verify_reads_the_store_and_not_copies_of_it(machine, s3):
    here = fill(machine("here"), PAIRS)
    name = names(s3, ".parquet")[0]
    data = bytearray(s3.read(name))
    data[len(data) // 2] ^= 1
    s3.write(name, bytes(data))
    assert (here.folder / name.rpartition("/")[2]).is_file()
    assert list(verify(here.folder).damaged) == [f"{name.rpartition('/')[2][:32]}.json"]


def test_a_reference_that_is_damaged_in_the_store_is_named_there_by_what_only_reads(machine, s3):
    here = fill(machine("here"), PAIRS)
    s3.write(f"{here.folder.name}/reference.json", b"{")
    find_mirror(here.folder).refresh_references()
    with pytest.raises(IntegrityError) as said:
        reopen(here)
    assert f"Remove {here.place}/reference.json, of which it is a copy, and score again" in str(said.value)
