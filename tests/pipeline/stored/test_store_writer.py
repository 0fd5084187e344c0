"""Claims in an object store, and shards that are sent while the next one is computed."""

import json
import re
import subprocess
import sys
import time

import pytest

from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.stored import store_writer
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.mirror import Mirror
from prefcache.pipeline.stored.object_store import ObjectStore
from prefcache.pipeline.stored.store_writer import StoreClaims
from tests.helpers.caches import MINE, NUMERICS, PAIRS, fill, reopen, scored
from tests.helpers.machines import EXPECTED, values
from tests.helpers.project import ROOT
from tests.helpers.stores import Bucket

CHUNK = "a" * 32


@pytest.fixture
def claims(s3: Bucket):
    """Claims of another process each time."""
    made = []

    def make() -> StoreClaims:
        made.append(StoreClaims(ObjectStore(s3.url), "ref"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def pretend_other_host(s3: Bucket, name: str = CHUNK) -> None:
    """Make a claim look like one of another machine, whose processes cannot be looked for."""
    holder = json.loads(s3.read(f"ref/claims/{name}"))
    s3.write(f"ref/claims/{name}", json.dumps({**holder, "host": "elsewhere"}).encode())


def test_one_has_a_chunk_until_it_gives_it_up(claims, s3):
    one, other = claims(), claims()
    assert one.try_claim(CHUNK) and not other.try_claim(CHUNK)
    one.release(CHUNK)
    assert not s3.objects() and other.try_claim(CHUNK)


def test_the_chunk_of_a_killed_process_of_this_machine_is_free_at_once(claims, s3):
    script = (
        "import os, signal, sys; from prefcache.pipeline.stored.store_writer import *\n"
        f"assert StoreClaims(ObjectStore(sys.argv[1]), 'ref').try_claim('{CHUNK}')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, s3.url], cwd=ROOT)
    assert done.returncode == -9 and s3.objects()
    assert claims().try_claim(CHUNK)


def test_a_claim_that_nobody_touches_is_free_after_a_while_though_its_process_number_is_in_use(claims, s3, monkeypatch):
    """Of an interrupted call in this very process, or of one whose number another process has by now."""
    monkeypatch.setattr(store_writer, "_STALE_SECONDS", 0.3)
    interrupted, next_call = claims(), claims()
    assert interrupted.try_claim(CHUNK)
    interrupted.close()
    assert not next_call.try_claim(CHUNK)
    time.sleep(0.4)
    assert next_call.try_claim(CHUNK)


def test_a_process_of_another_container_with_the_same_hostname_is_not_taken_for_dead(claims, s3):
    one, other = claims(), claims()
    assert one.try_claim(CHUNK)
    holder = json.loads(s3.read(f"ref/claims/{CHUNK}"))
    # Its number means nothing here, where no process has it.
    elsewhere = {**holder, "pid": 2**22 + 1, "boot": re.sub(r"pid:\[\d+\]", "pid:[1]", holder["boot"])}
    assert elsewhere["boot"] != holder["boot"]
    s3.write(f"ref/claims/{CHUNK}", json.dumps(elsewhere).encode())
    assert not other.try_claim(CHUNK)


def test_the_chunk_of_a_machine_that_is_gone_is_free_after_a_while(claims, s3, monkeypatch):
    monkeypatch.setattr(store_writer, "_STALE_SECONDS", 0.5)
    gone, other, third = claims(), claims(), claims()
    assert gone.try_claim(CHUNK)
    gone.close()
    pretend_other_host(s3)
    assert not other.try_claim(CHUNK) and not third.try_claim(CHUNK)
    time.sleep(0.6)
    assert [other.try_claim(CHUNK), third.try_claim(CHUNK)] == [True, False]


def test_a_chunk_that_takes_long_stays_claimed(claims, s3, monkeypatch):
    monkeypatch.setattr(store_writer, "_STALE_SECONDS", 1.0)
    monkeypatch.setattr(store_writer, "_BEAT_SECONDS", 0.2)
    slow, other = claims(), claims()
    assert slow.try_claim(CHUNK)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert not other.try_claim(CHUNK)
        time.sleep(0.1)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"host": 1}', b"\xff"])
def test_a_claim_that_nobody_can_read_is_free_after_a_while(claims, s3, monkeypatch, content):
    monkeypatch.setattr(store_writer, "_STALE_SECONDS", 0.2)
    s3.write(f"ref/claims/{CHUNK}", content)
    one = claims()
    assert not one.try_claim(CHUNK)
    time.sleep(0.3)
    assert one.try_claim(CHUNK)


def test_a_cache_in_a_store_hands_out_each_chunk_once(machine):
    one, other = machine("one"), machine("other")
    with one.claim([b"k" * 16], MINE) as mine, other.claim([b"k" * 16], MINE) as taken:
        assert (mine, taken) == ("mine", "taken")
    fill(one, PAIRS)
    # `other` has an older listing, and finds out when it asks for the chunk.
    for slots in one.plan(PAIRS, ["another"], 30).chunks[:2]:
        with other.claim(scored(PAIRS, slots)["key"].to_pylist(), MINE) as claim:
            assert claim == "done"


def test_the_next_chunk_is_claimed_while_one_is_computed(machine, s3):
    cache = machine("one")
    writer, (first, second, *_) = CacheWriter(cache), cache.plan(PAIRS, [MINE], 30).chunks
    keys = [scored(PAIRS, slots)["key"].to_pylist() for slots in (first, second)]
    with writer.flushing():
        with writer.claim(keys[0], MINE) as claim:
            assert claim == "mine"
            writer.claim_ahead(keys[1], MINE)
            with machine("other").claim(keys[1], MINE, wait=False) as claim:
                deadline = time.monotonic() + 5
                while len(held(s3)) < 2 and time.monotonic() < deadline:
                    time.sleep(0.02)
        assert len(held(s3)) == 1
    assert not held(s3)  # also what was claimed ahead was given up


def held(s3: Bucket) -> list[str]:
    return [name for name in s3.objects() if "/claims/" in name]


def test_a_chunk_stays_claimed_until_its_shard_has_arrived(machine, s3, monkeypatch):
    cache = machine("one")
    writer, (slots, *_) = CacheWriter(cache), cache.plan(PAIRS, [MINE], 30).chunks
    send, arrived = Mirror.send, []

    def send_slowly(self, *arguments):
        time.sleep(0.5)
        arrived.append(len(held(s3)))
        return send(self, *arguments)

    monkeypatch.setattr(Mirror, "send", send_slowly)
    rows = scored(PAIRS, slots)
    begun = time.monotonic()
    with writer.flushing():
        with writer.claim(rows["key"].to_pylist(), MINE) as claim:
            assert claim == "mine"
            writer.commit(rows, NUMERICS[MINE], MINE, None, in_background=True)
        assert time.monotonic() - begun < 0.4 and not arrived
    assert arrived == [1] and not held(s3) and len(reopen(cache).records) == 1


def test_an_error_of_sending_is_raised_and_the_chunk_is_free_again(machine, s3, monkeypatch):
    cache = machine("one")
    writer, (slots, *_) = CacheWriter(cache), cache.plan(PAIRS, [MINE], 30).chunks

    def fail(self, *arguments):
        raise ResourceError("the network is down")

    monkeypatch.setattr(Mirror, "send", fail)
    rows = scored(PAIRS, slots)
    with (
        pytest.raises(ResourceError, match="down"),
        writer.flushing(),
        writer.claim(rows["key"].to_pylist(), MINE),
    ):
        writer.commit(rows, NUMERICS[MINE], MINE, None, in_background=True)
    assert not held(s3)
    monkeypatch.undo()


def test_a_store_that_may_only_be_read_is_refused_before_anything_is_computed(machine, monkeypatch):
    cache = machine("one")

    def refuse(self, name, data):
        raise UsageError("access was refused")

    monkeypatch.setattr(ObjectStore, "create", refuse)
    with pytest.raises(
        UsageError, match=r"s3://.* cannot be written, and some sequences are missing in it. access was"
    ):
        CacheWriter(cache).refuse_read_only()


def test_values_are_right_after_all_of_it(machine):
    assert values(fill(machine("one"), PAIRS)) == EXPECTED
