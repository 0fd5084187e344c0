"""Looking after a cache changes no value: what is wrong is named, what nothing needs goes, small shards become large."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact, cache_maintenance, folder_upkeep
from prefcache.pipeline.stored.cache_maintenance import gc, verify
from prefcache.pipeline.stored.folder_upkeep import OLD_SECONDS
from tests.helpers.caches import (
    BUDGET,
    MINE,
    NUMERICS,
    OTHER,
    PAIRS,
    Cache,
    create,
    expected,
    fill,
    flip,
    keys_of,
    reopen,
    scored,
)
from tests.helpers.project import ROOT

LARGE = 1 << 27


def fingerprint(cache: Cache) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(cache.folder.iterdir())}


def served(cache: Cache) -> list[list[float]]:
    return [values.tolist() for values in reopen(cache).join(PAIRS, [MINE]).values()]


RIGHT = [expected(PAIRS, "chosen"), expected(PAIRS, "rejected")]


def rows_on_disk(cache: Cache) -> list[tuple[bytes, str]]:
    """Keys and numerics of every shard that counts, as another reader sees them."""
    found = reopen(cache)
    tables = [pq.read_table(shard, page_checksum_verification=True) for shard in found.shards]
    return [(row["key"], row["numerics_id"]) for table in tables for row in table.to_pylist()]


def make_old(path: Path) -> None:
    old = time.time() - 2 * OLD_SECONDS
    os.utime(path, (old, old))


# -- gc merges -------------------------------------------------------------------------------------------------------


def test_gc_merges_small_shards_into_one_that_serves_the_same(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    n_shards = len(cache.records)
    rows = [row for shard in cache.shards for row in pq.read_table(shard).to_pylist()]
    done = gc(cache.folder, LARGE)
    assert (done.merged, done.into, done.shards) == (n_shards, 1, 1)
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [".json", ".json", ".parquet"]  # reference.json is one
    assert served(cache) == RIGHT
    (record,) = reopen(cache).records
    assert record.rows == 24 and record.numerics == NUMERICS[MINE] and record.generation == 1
    table = pq.read_table(cache.folder / record.file)
    assert table.schema.equals(CACHE) and table.to_pylist() == sorted(rows, key=lambda row: row["key"])
    assert reopen(cache).plan(PAIRS, [MINE], BUDGET).n_missing == 0
    assert not verify(cache.folder).damaged


def test_a_second_gc_finds_nothing_to_do(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    for target in (400, 800, LARGE):
        gc(cache.folder, target)
        before = fingerprint(cache)
        done = gc(cache.folder, target)
        assert (done.merged, done.superseded, fingerprint(cache)) == (0, 0, before)


def test_merged_shards_stay_within_the_target(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    gc(cache.folder, 700)
    shards = [pq.read_table(shard) for shard in reopen(cache).shards]
    # Of a row: 32 bytes and 4 for each token, before compression.
    weights = [32 * len(t) + 4 * pc.sum(t["n_completion"]).as_py() for t in shards]
    assert 1 < len(weights) < len(cache.records)
    assert max(weights) <= 700 and sum(2 * weight < 700 for weight in weights) <= 1
    assert served(cache) == RIGHT


def test_numerics_are_never_merged_with_one_another(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    cache = fill(cache, PAIRS, OTHER, shift=-1000.0)
    gc(cache.folder, LARGE)
    assert sorted(record.numerics_id for record in reopen(cache).records) == [MINE, OTHER]
    assert served(cache) == RIGHT
    assert reopen(cache).join(PAIRS, [OTHER])["ref_chosen_logp"].tolist() == [v - 1000 for v in RIGHT[0]]


def with_doubled_rows(folder: Path) -> Cache:
    """What two scorers leave that cut their chunks differently, and whose values differ by rounding."""
    cache = fill(create(folder), PAIRS)
    for slots in create(folder / "other").plan(PAIRS.slice(2, 6), [MINE], 45).chunks:
        cache.commit(scored(PAIRS.slice(2, 6), slots, shift=-1e-9), NUMERICS[MINE], MINE, None)
    return cache


def test_rows_that_are_there_twice_become_one_and_the_same_value_is_served(tmp_path, monkeypatch):
    cache, second = with_doubled_rows(tmp_path / "one"), with_doubled_rows(tmp_path / "two")
    before, n_rows = served(cache), len(rows_on_disk(cache))
    assert n_rows == 24 + 12
    assert verify(cache.folder).doubled == 12
    done = gc(cache.folder, LARGE)
    assert done.doubled == 12 and len(rows_on_disk(cache)) == 24 == len(set(rows_on_disk(cache)))
    assert served(cache) == before
    # In small steps through the keys the outcome is the same.
    monkeypatch.setattr(cache_maintenance, "_ROWS_AT_ONCE", 5)
    gc(second.folder, LARGE)
    assert fingerprint(cache) == fingerprint(second)


def test_a_large_shard_loses_only_the_rows_that_another_stands_for(tmp_path):
    # Two shards that are too large to merge and share 8 sequences: 20 + 12 rows for 24 keys.
    cache = create(tmp_path)
    for table in (PAIRS.slice(0, 10), PAIRS.slice(6, 6)):
        (slots,) = create(tmp_path / "plan").plan(table, [MINE], 10_000).chunks
        cache.commit(scored(table, slots), NUMERICS[MINE], MINE, None)
    done = gc(cache.folder, 100)
    assert (done.doubled, done.into) == (8, 1)
    assert len(rows_on_disk(cache)) == 24 and served(cache) == RIGHT
    assert gc(cache.folder, 100).merged == 0


def test_a_value_stands_for_a_failure(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 3), fail=True)
    fill(create(tmp_path / "whole"), PAIRS)
    for shard in sorted((tmp_path / "whole").glob("cache/*/*")):
        if shard.name != "reference.json":
            shutil.copy2(shard, cache.folder / shard.name)
    gc(cache.folder, LARGE)
    assert set(rows_on_disk(cache)) == set(rows_on_disk(cache)) and len(rows_on_disk(cache)) == 24
    assert served(cache) == RIGHT


def test_damaged_shards_are_left_alone_and_named(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    broken = cache.records[1].file
    flip(cache.folder / broken)
    done = gc(cache.folder, LARGE)
    assert [*done.damaged] == [f"{broken.rpartition('-')[0]}.json"]
    assert done.merged == len(cache.records) - 1 and (cache.folder / broken).exists()
    found = reopen(cache)
    found.discard_damaged()
    assert served(fill(reopen(found), PAIRS)) == RIGHT


def test_the_worst_parity_speaks_for_a_merged_shard(tmp_path):
    cache = create(tmp_path)
    for i, slots in enumerate(cache.plan(PAIRS, [MINE], BUDGET).chunks):
        cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, {"max": i / 8} if i else None)
    worst = max(record.parity.max for record in reopen(cache).records if record.parity)
    gc(cache.folder, LARGE)
    assert [record.parity.max for record in reopen(cache).records] == [worst]


def test_a_dry_run_changes_nothing_and_says_what_it_would(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    (cache.folder / f"{'abc0' * 8}-00000000.parquet").write_bytes(b"")
    make_old(cache.folder / f"{'abc0' * 8}-00000000.parquet")
    before = fingerprint(cache)
    said = gc(cache.folder, LARGE, dry_run=True)
    assert fingerprint(cache) == before
    assert said == gc(cache.folder, LARGE)


# -- gc removes ------------------------------------------------------------------------------------------------------


def test_only_old_shards_without_a_record_that_nobody_claims_are_removed(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    young, old, claimed = (cache.folder / f"{c * 32}-00000000.parquet" for c in "abc")
    for path in (young, old, claimed):
        path.write_bytes(b"x")
    make_old(old)
    make_old(claimed)
    with open(cache.folder / f".{'c' * 32}.claim", "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert gc(cache.folder, LARGE).orphans == 1
        assert (young.exists(), old.exists(), claimed.exists()) == (True, False, True)
    assert gc(cache.folder, LARGE).orphans == 1 and not claimed.exists() and young.exists()


def test_a_shard_whose_record_comes_while_gc_takes_its_claim_is_kept(tmp_path, monkeypatch):
    """A scorer that was stopped for hours between the two goes on just then."""
    cache = fill(create(tmp_path), PAIRS)
    record = cache.record_path(cache.records[0])
    shard, content = cache.folder / cache.records[0].file, record.read_bytes()
    record.unlink()
    make_old(shard)
    claim = folder_upkeep.claims.claim

    @contextlib.contextmanager
    def claimed_late(path, **how):
        if path.name.startswith(f".{record.stem}"):
            record.write_bytes(content)
        with claim(path, **how) as is_mine:
            yield is_mine

    monkeypatch.setattr(folder_upkeep.claims, "claim", claimed_late)
    assert gc(cache.folder, 1).orphans == 0
    assert record.exists() and shard.exists() and served(cache) == RIGHT


def test_gc_removes_no_file_but_the_caches_own(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    theirs = [cache.folder / name for name in ("mine.parquet", "abc-00000000.parquet", ".mine.tmp")]
    for path in theirs:
        path.write_bytes(b"x")
        make_old(path)
    for name in ("x.parquet", f"{'d' * 32}-00000000.parquet", ".y.claim", ".z.host-1.tmp", "w.json"):
        (cache.folder / name).mkdir()
        theirs.append(cache.folder / name)
        make_old(theirs[-1])
    os.mkfifo(cache.folder / "aaaa.json")
    found = verify(cache.folder)
    assert not found.damaged and (found.orphans, found.leftovers) == (0, 0)
    done = gc(cache.folder, LARGE)
    assert (done.orphans, done.leftovers, done.into) == (0, 0, 1) and all(path.exists() for path in theirs)


def test_while_a_newer_record_is_there_no_shard_is_an_orphan(tmp_path):
    """The record may name any of them, under a rule that this version does not know."""
    cache = fill(create(tmp_path), PAIRS)
    newer, shards = cache.record_path(cache.records[0]), [Path(shard) for shard in cache.shards]
    newer.write_bytes(artifact.seal({**artifact.unseal(newer), "schema_version": 99}))
    orphan = cache.folder / f"{'a' * 32}-00000000.parquet"
    orphan.write_bytes(b"x")
    make_old(orphan)
    done = gc(cache.folder, 1)
    assert done.orphans == 0 and [*done.damaged] == [newer.name]
    assert orphan.exists() and newer.exists() and all(shard.exists() for shard in shards)
    newer.unlink()
    assert gc(cache.folder, 1).orphans == 1 and not orphan.exists()


def test_records_are_gone_from_the_disk_before_their_shards_are(tmp_path, monkeypatch):
    """Else a machine that loses power could wake up with a record and no shard: damage, where nothing was lost."""
    cache = fill(create(tmp_path), PAIRS)
    old = [*cache.records]
    left = []

    def synced(descriptor: int, real=os.fsync) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == cache.folder:
            there = [path.exists() for each in old for path in (cache.record_path(each), cache.folder / each.file)]
            left.append((any(there[::2]), all(there[1::2])))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    gc(cache.folder, LARGE)
    # Synced with all records gone and all shards still there.
    assert (False, True) in left and not any((cache.folder / each.file).exists() for each in old)


def test_temporaries_of_the_dead_and_old_ones_of_other_machines_are_removed(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = artifact._HOST
    names = [f".a.parquet.{here}-{dead.pid}.tmp", f".b.parquet.{here}-{os.getpid()}.tmp"]
    names += [".c.parquet.elsewhere-1.tmp", ".d.parquet.elsewhere-1.tmp", ".e.claim"]
    for name in names:
        (cache.folder / name).write_bytes(b"x")
    make_old(cache.folder / names[3])
    assert gc(cache.folder, LARGE).leftovers == 3
    assert sorted(path.name for path in cache.folder.glob(".*")) == sorted([names[1], names[2]])


def test_two_gcs_do_not_work_on_one_cache(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    with open(cache.folder / ".gc.claim", "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another gc is at work"):
            gc(cache.folder, LARGE)
    assert gc(cache.folder, LARGE).into == 1


# -- gc beside others ------------------------------------------------------------------------------------------------


def test_a_reader_that_was_open_before_gc_goes_on(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    reader = reopen(cache)
    gc(cache.folder, LARGE)
    assert reader.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == RIGHT[0]
    reader = reopen(cache)
    gc(cache.folder, LARGE)
    assert reader.plan(PAIRS, [MINE], BUDGET).n_missing == 0


def test_a_scorer_that_planned_before_gc_knows_what_was_merged(tmp_path):
    late = create(tmp_path)
    plan = late.plan(PAIRS, [MINE], BUDGET)
    early = fill(create(tmp_path), PAIRS.slice(0, 12))
    gc(early.folder, LARGE)
    for keys in keys_of(PAIRS, plan):
        assert late.has_chunk(sorted(keys), MINE) and not late.has_chunk(sorted(keys), OTHER)
        with late.claim(sorted(keys), MINE) as claim:
            assert claim == "done"
    assert not late.has_chunk([b"\0" * 16], MINE)


def test_gc_beside_a_scorer_and_a_reader_loses_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import tests.helpers.caches as t; from prefcache.pipeline.stored.cache_maintenance import gc\n"
        "folder = t.create(Path(sys.argv[2])).folder\n"
        "for _ in range(40): gc(folder, 1 << 27)\n"
    )
    cache = fill(create(tmp_path), PAIRS.slice(0, 6))
    collector = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path)])
    part, seen = PAIRS.slice(0, 6), 0
    while collector.poll() is None:
        # Every chunk once more, under keys that are not yet there, while shards are merged.
        cache = fill(create(tmp_path), PAIRS)
        assert cache.join(part, [MINE])["ref_chosen_logp"].tolist() == expected(part, "chosen")
        seen += 1
    assert collector.returncode == 0 and seen > 1
    gc(cache.folder, LARGE)
    assert served(cache) == RIGHT and len(rows_on_disk(cache)) == 24


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_counts_what_is_there(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 2), fail=True)
    cache = fill(cache, PAIRS)
    (cache.folder / f"{'abc0' * 8}-00000000.parquet").write_bytes(b"")
    (cache.folder / ".x.claim").write_bytes(b"")
    found = verify(cache.folder)
    assert (found.rows, found.failed, found.doubled, found.orphans, found.leftovers) == (24, 4, 0, 1, 1)
    assert found.shards == len(reopen(cache).records) and not found.damaged
    assert found.n_bytes == sum(Path(shard).stat().st_size for shard in reopen(cache).shards)


def write(tmp_path: Path, change) -> Path:
    """A cache that a faulty scorer wrote: its checksums are right, its values are not."""
    cache = create(tmp_path)
    (slots,) = cache.plan(PAIRS, [MINE], 10_000).chunks
    rows = scored(PAIRS, slots).sort_by("key").to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=CACHE)
    record = {"numerics_id": MINE, "numerics": NUMERICS[MINE], "parity": None, "schema_version": 1}
    data = artifact.parquet(table, float_lists=["logps"])
    entry = artifact.commit_file(cache.folder / f"{'a' * 32}-00000000.parquet", data, rows=len(rows))
    artifact.commit_bytes(cache.folder / f"{'a' * 32}.json", artifact.seal({**record, **entry}))
    return cache.folder


def with_logps(row: dict, logps: list[float]) -> None:
    row["logps"], row["logp_sum"] = logps, sum(logps)


FAULTS = {
    "not in order": lambda rows: rows.reverse(),
    "twice": lambda rows: rows.insert(0, rows[0]),
    "not the sum": lambda rows: rows[3].update(logp_sum=rows[3]["logp_sum"] - 1e-6),
    "another number of log-probs": lambda rows: rows[3].update(n_completion=1000),
    "above zero": lambda rows: with_logps(rows[3], [0.01, *rows[3]["logps"][1:]]),
    "not finite": lambda rows: with_logps(rows[3], [float("-inf"), *rows[3]["logps"][1:]]),
    "has a value and its status": lambda rows: rows[3].update(status="failed: why"),
    "or the other way round": lambda rows: rows[3].update(logp_sum=None, logps=None),
    "numerics": lambda rows: rows[3].update(numerics_id=OTHER),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_verify_finds_what_no_right_scorer_writes(tmp_path, reason):
    found, shard = verify(write(tmp_path, FAULTS[reason])), f"{'a' * 32}-00000000.parquet"
    assert [*found.damaged] == [shard] and reason in found.damaged[shard]


@pytest.mark.parametrize("reason", FAULTS)
def test_gc_neither_merges_nor_keeps_for_another_what_no_right_scorer_writes(tmp_path, reason):
    folder, shard = write(tmp_path, FAULTS[reason]), f"{'a' * 32}-00000000.parquet"
    wrong = (folder / shard).read_bytes()
    # The same sequences in another shard, right: gc must not take it for superseded by the wrong one.
    cache = Cache(folder, None)
    for slots in create(tmp_path / "other").plan(PAIRS, [MINE], BUDGET).chunks:
        cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    n_right = len(reopen(cache).records) - 1
    done = gc(folder, LARGE)
    assert [*done.damaged] == [shard] and reason in done.damaged[shard]
    assert (done.merged, done.superseded, done.into) == (n_right, 0, 1)
    assert (folder / shard).read_bytes() == wrong and len(reopen(cache).records) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: None,
        lambda rows: [row.update(logps=None) for row in rows],  # score.logps: false
        lambda rows: rows[3].update(status="ok: computed in float32"),
        lambda rows: rows[3].update(status="failed: why", logp_sum=None, logps=None),
        lambda rows: rows[3].update(n_completion=0, logps=[], logp_sum=0.0),
        lambda rows: with_logps(rows[3], [1e-6] * rows[3]["n_completion"]),  # rounding
    ],
)
def test_verify_takes_no_offence_at_what_is_right(tmp_path, change):
    folder = write(tmp_path, change)
    assert verify(folder).damaged == {}
    cache = Cache(folder, None)
    n_failed = cache.plan(PAIRS, [MINE], BUDGET).n_failed
    assert n_failed == sum(row["status"].startswith("failed") for row in cache.read(cache.records[0]).to_pylist())


def test_values_computed_again_in_float32_are_served_as_any_other(tmp_path):
    folder = write(tmp_path, lambda rows: [row.update(status="ok: computed in float32") for row in rows])
    assert served(Cache(folder, None)) == RIGHT


def test_verify_names_a_damaged_reference_record(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    flip(cache.folder / "reference.json")
    assert [*verify(cache.folder).damaged] == ["reference.json"]


def test_what_to_do_is_said_of_each_kind_of_damage(prefcache, tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    flip(cache.folder / cache.records[0].file)
    newer, planted = (cache.record_path(record) for record in cache.records[1:3])
    newer.write_bytes(artifact.seal(artifact.unseal(newer) | {"schema_version": 99}))
    planted.write_bytes(artifact.seal(artifact.unseal(planted) | {"rows": -1}))
    done = prefcache("verify", code=4)
    said = done.stderr[done.stderr.index("error:") :]
    assert f"1 file of {cache.folder.relative_to(tmp_path)} is damaged. Score again" in said
    names = [path.relative_to(tmp_path) for path in (planted, newer)]
    assert (
        f"{names[0]} is unchanged since written, but not valid" in said
        and f"{names[1]} was written by a newer prefcache" in said
    )
    assert "Remove it, then score again" in said and "Upgrade prefcache to read it; do not remove it." in said
    # Each is named once.
    named = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    assert len(named) == 3 and all(line.count(".json") + line.count(".parquet") == 1 for line in named)
    # Of newer ones alone, nothing says that they are to be scored again or removed.
    for record in (cache.records[0], cache.records[2]):
        cache.record_path(record).unlink()
    said = prefcache("gc", code=4).stderr.partition("error: ")[2]
    assert "Upgrade prefcache" in said and "core again" not in said and "Remove" not in said


# -- the commands ----------------------------------------------------------------------------------------------------


def test_verify_and_gc_as_commands(prefcache, config, tmp_path):
    prefcache("prepare", config)
    prefcache("score", config)
    n_shards = len(list(tmp_path.glob("cache/*/*.parquet")))
    (found,) = json.loads(prefcache("verify", "--json").stdout)["caches"]
    assert (found["rows"], found["shards"], found["damaged"]) == (120, n_shards, {})
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    long = tmp_path / ("a" * 60) / "of-a-name-that-a-column-would-cut-1234567890ab"
    shutil.copytree(folder, long)
    said = prefcache("verify", "-q", long).stdout
    assert said.splitlines()[0] == str(long) and " 120 " in said
    shutil.rmtree(long)
    assert f"{n_shards} shards would be merged into 1" in prefcache("gc", "--dry-run").stdout
    assert len(list(tmp_path.glob("cache/*/*.parquet"))) == n_shards
    assert f"{n_shards} shards merged into 1" in prefcache("gc").stdout
    assert len(list(tmp_path.glob("cache/*/*.parquet"))) == 1
    prefcache("verify")
    # Training on it neither fails nor needs a new scoring; and scoring finds nothing to compute.
    assert "nothing to do" not in prefcache("train", config).stderr
    assert json.loads(prefcache("score", config, "--json").stdout)["scored"] == 0
    (counted,) = json.loads(prefcache("sql", "select count(*) as n from reference", "--json").stdout)
    assert counted == {"n": 120}


def test_what_gc_merges_under_a_query_or_an_export_is_read_again(prefcache, config, tmp_path, monkeypatch):
    from prefcache.pipeline import views
    from prefcache.pipeline.stored import duckdb_connection

    prefcache("prepare", config)
    prefcache("score", config)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    saved, real = shutil.copytree(folder, tmp_path / "saved"), duckdb_connection.define

    def merged_before_it_is_read(con, name, files, schema):
        real(con, name, files, schema)
        if name == "cached":
            gc(folder, LARGE)

    def as_it_was():
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)

    # Before the views are made, and after.
    ask, query = views.ask, ["sql", "select count(logps) from reference", "runs/tiny"]
    for module, name, instead in (
        (duckdb_connection, "define", merged_before_it_is_read),
        (views, "ask", lambda *asked: gc(folder, LARGE) and ask(*asked)),
    ):
        as_it_was()
        with monkeypatch.context() as patched:
            patched.setattr(module, name, instead)
            said = prefcache(*query, code=4).stderr
        assert (
            "merged" in said
            and "Run the query again" in said
            and "No files found" not in said
            and "disabled" not in said
        )
        assert "120" in prefcache(*query).stdout
    as_it_was()
    monkeypatch.setattr(duckdb_connection, "define", merged_before_it_is_read)
    prefcache("export", config, "--output", "o.parquet", "--per-token")
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert all(sum(row["ref_chosen_token_logps"]) == pytest.approx(row["ref_chosen_logps"]) for row in rows)


def test_verify_and_gc_end_with_exit_code_4_and_say_what_to_do(prefcache, config, tmp_path):
    folder = write(tmp_path / "wrong", FAULTS["another number of log-probs"])
    prefcache("prepare", config)
    prefcache("score", config)
    shard = sorted(tmp_path.glob("cache/*/*.parquet"))[1]
    flip(shard)
    for command in ("verify", "gc"):
        done = prefcache(command, folder, code=4)
        assert "another number of log-probs" in done.stdout and "damaged" in done.stderr
        done = prefcache(command, code=4)
        assert f"{shard.name} has other bytes than were written" in done.stdout and "prefcache score" in done.stderr
    assert json.loads(prefcache("score", config, "--json").stdout)["scored"] > 0
    prefcache("verify")


def test_a_place_without_a_cache_is_a_usage_error(prefcache, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("verify", "gc"):
        assert "holds no cache" in prefcache(command, "empty", code=2).stderr
