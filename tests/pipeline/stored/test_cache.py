"""A cached row is right or missing: found by its tokens, believed by its checksum, used only for its own model."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IdentityError, IntegrityError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.schema import PREPARED
from prefcache.pipeline.stored import artifact, verified_shards
from prefcache.pipeline.stored.cache_writer import create_cache
from prefcache.pipeline.stored.memos import VerifiedMemo, WeightsMemo
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.prepared import Sequences
from prefcache.pipeline.stored.records import MalformedError
from tests.helpers.caches import (
    BUDGET,
    MINE,
    MODEL,
    NUMERICS,
    OTHER,
    PAIRS,
    REFERENCE,
    Cache,
    create,
    expected,
    fill,
    flip,
    keys_of,
    prepared,
    reopen,
    scored,
)

# -- plan ------------------------------------------------------------------------------------------------------------


def test_an_empty_cache_lacks_every_sequence(tmp_path):
    plan = create(tmp_path).plan(PAIRS, [MINE], BUDGET)
    n_tokens = sum(
        len(p) + len(a)
        for side in ("chosen", "rejected")
        for p, a in zip(PAIRS["prompt_ids"].to_pylist(), PAIRS[f"{side}_ids"].to_pylist(), strict=True)
    )
    assert (plan.n_sequences, plan.n_hits, plan.n_missing, plan.n_failed) == (24, 0, 24, 0)
    assert (plan.n_tokens, plan.other_numerics) == (n_tokens, {})
    assert sorted(slot for chunk in plan.chunks for slot in chunk) == list(range(24))


def test_a_sequence_that_occurs_twice_is_scored_once(tmp_path):
    # Pair 1 has pair 0's answers the other way round; pair 2 has one of them again. Three sequences, not six.
    table = prepared([([1], [2], [3]), ([1], [3], [2]), ([1], [2], [4, 4])])
    plan = create(tmp_path).plan(table, [MINE], BUDGET)
    # [1] + [2] and [1] + [3] have 2 tokens, [1] + [4, 4] has 3; answers 1 + 1 + 2.
    assert (plan.n_sequences, plan.n_tokens, plan.n_completion_tokens) == (3, 7, 4)
    assert sum(len(chunk) for chunk in plan.chunks) == 3
    cache = fill(create(tmp_path), table)
    values = cache.join(table, [MINE])
    assert values["ref_chosen_logp"].tolist() == [-0.25, -0.375, -0.25]
    assert values["ref_rejected_logp"].tolist() == [-0.375, -0.25, -1.0]


def test_the_same_tokens_cut_elsewhere_are_another_sequence(tmp_path):
    table = prepared([([1], [2, 3], [9]), ([1, 2], [3], [9])])
    assert create(tmp_path).plan(table, [MINE], BUDGET).n_sequences == 4


def test_chunks_hold_the_answers_of_a_prompt_together_the_longest_first_within_the_budget(tmp_path):
    plan = create(tmp_path).plan(PAIRS, [MINE], BUDGET)
    lengths = [[Sequences(PAIRS)[slot].n_tokens for slot in chunk] for chunk in plan.chunks]
    slots = [int(slot) for chunk in plan.chunks for slot in chunk]
    # Every prompt of these pairs is another, so what stands together are the two slots of a row.
    assert all({one ^ 1} == {other} for one, other in zip(slots[::2], slots[1::2], strict=True))
    flat = [n for chunk in lengths for n in chunk]
    assert flat[::2] == sorted(flat[::2], reverse=True) and len(lengths) > 3
    assert all(longer >= shorter for longer, shorter in zip(flat[::2], flat[1::2], strict=True))
    # A chunk ends with the sequence that reaches the next multiple of the budget, and may exceed it by that one.
    assert all(sum(chunk) < BUDGET + chunk[-1] for chunk in lengths)


def test_chunks_of_a_resumed_scorer_are_those_of_the_first(tmp_path):
    cache = create(tmp_path)
    first = cache.plan(PAIRS, [MINE], BUDGET)
    for slots in first.chunks[::2]:
        cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    resumed = reopen(cache).plan(PAIRS, [MINE], BUDGET)
    assert [chunk.tolist() for chunk in resumed.chunks] == [chunk.tolist() for chunk in first.chunks[1::2]]
    assert resumed.n_hits == sum(len(chunk) for chunk in first.chunks[::2])
    assert resumed.probe.tolist() == first.probe.tolist()
    # Nor do they depend on the order of the examples.
    turned = PAIRS.take(list(range(len(PAIRS)))[::-1])
    assert keys_of(turned, reopen(cache).plan(turned, [MINE], BUDGET)) == keys_of(PAIRS, resumed)


def test_appended_examples_are_all_that_is_missing_and_a_full_cache_lacks_nothing(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 9))
    plan = cache.plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_hits, plan.n_missing) == (18, 6)
    assert {slot // 2 for chunk in plan.chunks for slot in chunk} == {9, 10, 11}
    plan = fill(cache, PAIRS).plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_missing, plan.chunks, plan.n_tokens) == (0, [], 0)


def test_rows_of_other_numerics_are_counted_and_not_used(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 5), OTHER)
    plan = cache.plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_hits, plan.other_numerics) == (0, {OTHER: 10})
    # Named, they are hits.
    accepted = cache.plan(PAIRS, [MINE, OTHER], BUDGET)
    assert (accepted.n_hits, accepted.n_missing, accepted.other_numerics) == (10, 14, {})


def test_no_examples_need_no_plan_and_no_values(tmp_path):
    cache, nothing = create(tmp_path), PREPARED["pairs"].empty_table()
    plan = cache.plan(nothing, [MINE], BUDGET)
    assert (plan.n_sequences, plan.chunks, len(plan.probe)) == (0, [], 0)
    assert [len(values) for values in fill(cache, PAIRS).join(nothing, [MINE]).values()] == [0, 0]


# -- join ------------------------------------------------------------------------------------------------------------


def test_join_returns_values_in_the_order_of_the_rows(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    order = np.random.default_rng(0).permutation(len(PAIRS))
    for table in (PAIRS, PAIRS.take(order), PAIRS.slice(5, 3), PAIRS.take([4, 4, 0])):
        values = cache.join(table, [MINE])
        for side in ("chosen", "rejected"):
            assert not np.ma.getmaskarray(values[f"ref_{side}_logp"]).any()
            assert values[f"ref_{side}_logp"].tolist() == expected(table, side)
            assert values[f"ref_{side}_logp"].dtype == np.float64


def test_join_masks_what_is_not_there(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 3))
    values = cache.join(PAIRS, [MINE])
    for values_B in values.values():
        assert np.ma.getmaskarray(values_B).tolist() == [False] * 3 + [True] * 9
    assert all(np.ma.getmaskarray(v).all() for v in create(tmp_path / "empty").join(PAIRS, [MINE]).values())


def test_failed_rows_are_hits_but_masked(tmp_path):
    cache = create(tmp_path)
    failing = PAIRS.slice(0, 2)
    fill(cache, failing, fail=True)
    cache = fill(reopen(cache), PAIRS)
    plan = cache.plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_missing, plan.n_failed) == (0, 4)  # not tried again and again
    for values_B in cache.join(PAIRS, [MINE]).values():
        assert np.ma.getmaskarray(values_B).tolist() == [True, True] + [False] * 10


def test_the_numerics_named_first_win(tmp_path):
    cache = fill(create(tmp_path), PAIRS, MINE)
    cache = fill(cache, PAIRS.slice(0, 6), OTHER, shift=1000.0)
    right = expected(PAIRS, "chosen")
    assert cache.join(PAIRS, [MINE, OTHER])["ref_chosen_logp"].tolist() == right
    assert cache.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == right
    other_first = [value + 1000 if i < 6 else value for i, value in enumerate(right)]
    assert cache.join(PAIRS, [OTHER, MINE])["ref_chosen_logp"].tolist() == other_first
    only_other = cache.join(PAIRS, [OTHER])["ref_chosen_logp"]
    assert np.ma.getmaskarray(only_other).tolist() == [False] * 6 + [True] * 6


def test_of_two_values_that_differ_by_rounding_always_the_same_is_served(tmp_path):
    # Two scorers that cut their chunks differently. Neither the names nor the order of shards decides.
    for name, shifts in (("one", (0.0, -1e-9)), ("two", (-1e-9, 0.0))):
        cache = create(tmp_path / name)
        for shift, budget in zip(shifts, (BUDGET, 10_000), strict=True):
            for slots in create(tmp_path / "plan").plan(PAIRS, [MINE], budget).chunks:
                cache.commit(scored(PAIRS, slots, shift=shift), NUMERICS[MINE], MINE, None)
        smaller = [value - 1e-9 for value in expected(PAIRS, "chosen")]
        assert reopen(cache).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == smaller


def test_columns_are_answered_in_their_order_and_nulls_are_masked(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    gaps = pa.chunked_array([pa.array([None, *PAIRS["rejected_key"].to_pylist()[1:3], None], pa.binary(16))])
    chosen, nothing, rejected = cache.logps([PAIRS["chosen_key"], PAIRS["chosen_key"].slice(0, 0), gaps], [MINE])
    assert chosen.tolist() == expected(PAIRS, "chosen") and len(nothing) == 0
    right = expected(PAIRS, "rejected")
    assert rejected.tolist() == [None, right[1], right[2], None]


def test_a_cache_that_an_older_version_wrote_is_read_and_hashed_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)
    cache = fill(create(tmp_path), PAIRS)
    for record in cache.records:
        old = {key: value for key, value in record.facts().items() if key != "values_xxh3_128"}
        artifact.commit_bytes(cache.record_path(record), artifact.seal(old))
    assert reopen(cache).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    hashed = []
    damage = artifact.damage
    monkeypatch.setattr(artifact, "damage", lambda f, e: hashed.append(e.file) or damage(f, e))
    reopen(cache)
    assert len(hashed) == len(cache.records)


def test_a_value_under_one_numerics_stands_in_for_a_failure_under_another(tmp_path):
    cache = fill(create(tmp_path), PAIRS, MINE, fail=True)
    cache = fill(cache, PAIRS, OTHER)
    assert cache.join(PAIRS, [MINE, OTHER])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    plan = cache.plan(PAIRS, [MINE, OTHER], BUDGET)
    assert (plan.n_hits, plan.n_failed) == (24, 0)


# -- identity --------------------------------------------------------------------------------------------------------


def test_each_model_has_a_folder_named_after_it_and_that_of_another_is_refused(tmp_path):
    first = create(tmp_path)
    second = create_cache(tmp_path / "cache", "org/tiny model", REFERENCE | {"model_id": "b" * 32})
    assert first.folder.name == "tiny_model-aaaaaaaaaaaa" and second.folder.name == "tiny_model-bbbbbbbbbbbb"
    assert create(tmp_path).folder == first.folder
    with pytest.raises(
        IdentityError, match=r"org/tiny model@aaaaaaaa; this run names a model @bbbbbbbb.*prefcache score"
    ):
        Cache(first.folder, "b" * 32)


def test_a_damaged_reference_file_is_an_integrity_error(tmp_path):
    cache = create(tmp_path)
    flip(cache.folder / "reference.json")
    with pytest.raises(IntegrityError, match=r"reference\.json"):
        reopen(cache)


def test_identify_remembers_hashes_beside_the_caches(tmp_path, model):
    found = identify(Reference(model), tmp_path / "cache")
    path = WeightsMemo.path(tmp_path / "cache")
    memo = WeightsMemo.recall(path)
    # A remembered hash is believed: one that is wrong shows that nothing was hashed again.
    ((stamp, tensors),) = memo.tensors.items()
    wrong = {name: (dtype, shape, "0" * 64) for name, (dtype, shape, _) in tensors.items()}
    WeightsMemo(tensors={stamp: wrong}).remember(path)
    assert identify(Reference(model), tmp_path / "cache")["model_id"] != found["model_id"]
    path.write_text("{")
    assert identify(Reference(model), tmp_path / "cache") == found


# -- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "shard-flipped-first": lambda shard, record: flip(shard, 0),
    "shard-flipped-middle": lambda shard, record: flip(shard),
    "shard-flipped-last": lambda shard, record: flip(shard, 0.999),
    "shard-truncated": lambda shard, record: cut(shard),
    "shard-empty": lambda shard, record: shard.write_bytes(b""),
    "shard-missing": lambda shard, record: shard.unlink(),
    "record-flipped": lambda shard, record: flip(record),
    "record-truncated": lambda shard, record: cut(record),
    "record-empty": lambda shard, record: record.write_bytes(b""),
    "record-of-another": lambda shard, record: record.write_bytes(b"[]"),
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_and_only_that_shard_is_scored_again(tmp_path, damages):
    cache = fill(create(tmp_path), PAIRS)
    assert len(cache.records) > 3 and not cache.damaged
    whole = cache.plan(PAIRS, [MINE], BUDGET)
    broken = cache.records[1]
    lost = set(pq.read_table(cache.folder / broken.file)["key"].to_pylist())
    record = cache.folder / f"{broken.file.rpartition('-')[0]}.json"
    damages(cache.folder / broken.file, record)

    found = reopen(cache)
    assert list(found.damaged) == [record] and len(found.records) == len(cache.records) - 1
    with pytest.raises(IntegrityError, match=f"1 of {len(cache.records)} shards .* are damaged.*{record.stem}"):
        found.refuse_damage()
    found.discard_damaged()
    plan = reopen(found).plan(PAIRS, [MINE], BUDGET)
    assert keys_of(PAIRS, plan) == [lost] and plan.n_hits == whole.n_sequences - len(lost)

    restored = fill(reopen(found), PAIRS)
    assert not restored.damaged
    assert restored.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")


def test_no_byte_of_the_lists_can_rot_unnoticed(tmp_path):
    """Sums have a checksum of their own; of the log-probs of single tokens, Parquet's pages have the only one that is read."""
    cache = fill(create(tmp_path), PAIRS)
    record = cache.records[0]
    path = cache.folder / record.file
    columns = pq.read_metadata(path).row_group(0)
    lists = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema.startswith("logps."))
    data, written = path.read_bytes(), cache.read(record, ["logps"])
    start = lists.dictionary_page_offset or lists.data_page_offset
    for at in range(start, start + lists.total_compressed_size):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with contextlib.suppress(IntegrityError):
            assert cache.read(record, ["logps"]) == written, f"byte {at - start} of {lists.total_compressed_size}"


def test_a_missing_record_means_missing_rows(tmp_path):
    # As after a kill between a shard and its record.
    cache = fill(create(tmp_path), PAIRS)
    cache.refuse_damage()
    cache.discard_damaged()
    assert len(reopen(cache).records) == len(cache.records)  # nothing is damaged, so nothing is discarded
    lost = cache.records[0]
    (cache.folder / f"{lost.file.rpartition('-')[0]}.json").unlink()
    found = reopen(cache)
    assert not found.damaged
    assert found.plan(PAIRS, [MINE], BUDGET).n_missing == lost.rows
    assert not fill(found, PAIRS).plan(PAIRS, [MINE], BUDGET).n_missing


# -- several scorers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1e-6])
def test_two_scorers_of_one_chunk_leave_the_first_ones_shard_whole(tmp_path, shift):
    # Rounding may differ between machines of the same versions; bytes of one must never meet the record of the other.
    one, other = create(tmp_path), create(tmp_path)
    (slots, *_) = one.plan(PAIRS, [MINE], 10_000).chunks
    keys = [Sequences(PAIRS)[slot].key() for slot in slots]
    assert not one.has_chunk(keys, MINE)
    one.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    assert other.has_chunk(keys, MINE) and other.has_chunk(keys[::-1], MINE) and not other.has_chunk(keys, OTHER)
    other.commit(scored(PAIRS, slots[::-1], shift=shift), NUMERICS[MINE], MINE, None)  # in another order
    found = reopen(one)
    assert len(found.records) == 1 and not found.damaged
    assert len(list(found.folder.glob("*.parquet"))) == (2 if shift else 1)
    assert found.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")


def test_scorers_that_race_leave_a_whole_cache(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import test_cache as t; cache = t.create(Path(sys.argv[2]))\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "t.fill(cache, t.PAIRS)\n"
    )
    arguments = [str(Path(__file__).parent), str(tmp_path), str(time.time() + 2)]
    racers = [subprocess.Popen([sys.executable, "-c", code, *arguments]) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    found = create(tmp_path)
    assert not found.damaged and found.plan(PAIRS, [MINE], BUDGET).n_missing == 0
    assert found.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    assert not list(found.folder.glob(".*.tmp"))


def test_a_claimed_chunk_is_taken_until_it_is_committed_and_done_then(tmp_path):
    one, other = create(tmp_path), create(tmp_path)
    (slots, *_) = one.plan(PAIRS, [MINE], 10_000).chunks
    keys = [Sequences(PAIRS)[slot].key() for slot in slots]
    with one.claim(keys, MINE) as claim:
        assert claim == "mine"
        with other.claim(keys[::-1], MINE) as second, other.claim(keys, OTHER) as elsewhere:
            assert (second, elsewhere) == ("taken", "mine")
        one.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, None)
    for wait in (False, True):
        with other.claim(keys, MINE, wait=wait) as claim:
            assert claim == "done"
    assert not list(one.folder.glob(".*"))


def test_a_chunk_whose_scorer_was_killed_is_anothers_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import test_cache as t; cache = t.create(Path(sys.argv[2]))\n"
        "with cache.claim([b'k' * 16], t.MINE) as claim: print(claim, flush=True); time.sleep(60)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "mine\n"
    cache = create(tmp_path)
    with cache.claim([b"k" * 16], MINE) as claim:
        assert claim == "taken"
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {first.pid}"])
    with cache.claim([b"k" * 16], MINE, wait=True) as claim:
        assert claim == "mine"
    assert first.wait() == -9 and killer.wait() == 0 and not list(cache.folder.glob(".*"))


# -- where it lies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["it's", "key=7", "a[1]", 'ü "b"'])
def test_the_name_of_a_folder_does_not_change_what_is_read(tmp_path, name):
    cache = fill(create(tmp_path / name), PAIRS)
    assert cache.plan(PAIRS, [MINE], BUDGET).n_missing == 0
    assert cache.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")


def test_the_record_says_what_the_shard_was_computed_with(tmp_path):
    cache = create(tmp_path)
    (slots, *_) = cache.plan(PAIRS, [MINE], 10_000).chunks
    cache.commit(scored(PAIRS, slots), NUMERICS[MINE], MINE, {"max": 1e-6})
    (record,) = reopen(cache).records
    assert record.rows == 24 and record.numerics == NUMERICS[MINE] and record.parity.max == 1e-6
    assert reopen(cache).numerics() == {MINE: NUMERICS[MINE]}
    shard = cache.folder / record.file
    assert artifact.describe(shard) == record.model_dump(include={"file", "bytes", "xxh3_128"})
    table = pq.read_table(shard)
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    for row in table.to_pylist():
        assert row["logp_sum"] == sum(row["logps"]) and len(row["logps"]) == row["n_completion"]


# -- other people's files --------------------------------------------------------------------------------------------


def test_only_files_named_as_records_are_records(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    (cache.folder / "notes.json").write_text('{"mine": true}')
    (cache.folder / "folder.json").mkdir()
    (cache.folder / f"{'a' * 32}.json").mkdir()
    (cache.folder / ".y.claim").mkdir()
    # Opened to be read, a pipe waits for a writer that never comes.
    for name in ("aaaa.json", f"{'b' * 32}.json"):
        os.mkfifo(cache.folder / name)
    found = create(tmp_path)
    assert not found.damaged and found.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    found.discard_damaged()
    assert (cache.folder / "notes.json").read_text() == '{"mine": true}' and (cache.folder / "aaaa.json").exists()


def test_a_pipe_is_refused_as_a_record_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "reference.json")
    with pytest.raises(IntegrityError, match="not a regular file"):
        Cache(tmp_path, MODEL)


def test_the_folder_that_holds_the_cache_is_found_whatever_lies_beside_it(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    (tmp_path / "cache" / f"a-{MODEL[:12]}").mkdir()
    (tmp_path / "cache" / f"b-{MODEL[:12]}").write_bytes(b"")
    assert create(tmp_path).folder == cache.folder
    # One that lost its reference.json comes before an empty one, too, whatever name this run gives the model.
    (cache.folder / "reference.json").unlink()
    found = create_cache(tmp_path / "cache", "another name", REFERENCE)
    assert found.folder == cache.folder and reopen(found).plan(PAIRS, [MINE], BUDGET).n_missing == 0


def test_a_reference_record_that_is_whole_and_malformed_is_not_replaced(tmp_path):
    path = create(tmp_path).folder / "reference.json"
    planted = artifact.seal({"schema_version": 1, "name": 3, "model_id": MODEL})
    path.write_bytes(planted)
    for opened in (create_cache, Cache.preview):
        with pytest.raises(
            MalformedError, match=r"reference\.json is not a valid record: name = 3.*Remove it and score"
        ):
            opened(tmp_path / "cache", "org/tiny model", REFERENCE)
        assert path.read_bytes() == planted
    # A damaged one is made anew.
    flip(path)
    assert create(tmp_path).reference.name == "org/tiny model"


def test_a_shard_that_holds_two_values_of_one_sequence_is_named_once(tmp_path):
    cache = create(tmp_path)
    (slots,) = cache.plan(PAIRS, [MINE], 10_000).chunks
    rows = pa.concat_tables([scored(PAIRS, slots), scored(PAIRS, slots[:1], shift=-50.0)])
    cache.commit(rows, NUMERICS[MINE], MINE, None)
    found = reopen(cache)
    found.plan(PAIRS, [MINE], BUDGET)
    (reason,) = found.damaged.values()
    (file,) = (record.file for record in cache.reopen().records)
    assert reason.startswith(f"{cache.folder / file} holds two different log-probs for one sequence, ")


@pytest.mark.parametrize("memo", [VerifiedMemo(known={}), WeightsMemo(files={"stamp": "0" * 64})])
def test_a_memo_that_a_newer_version_wrote_is_kept(tmp_path, memo):
    path = tmp_path / "memo.json"
    newer = artifact.seal({"schema_version": 2, "anything": []})
    path.write_bytes(newer)
    memo.remember(path)
    assert type(memo).recall(path) is None and path.read_bytes() == newer
    path.write_bytes(newer[:-9])  # damaged: this one is written anew
    memo.remember(path)
    assert type(memo).recall(path) == memo


def test_a_scan_keeps_the_memo_that_a_newer_version_wrote(tmp_path, monkeypatch):
    cache = fill(create(tmp_path), PAIRS)
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -60.0)  # shards this young are noted, too
    memo = cache.folder.parent / f".verified-{cache.folder.name}.json"
    memo.write_bytes(artifact.seal({"schema_version": 2}))
    before = memo.read_bytes()
    assert not create(tmp_path).damaged and memo.read_bytes() == before


def test_a_relative_folder_with_a_colon_is_a_folder(tmp_path, monkeypatch):
    # Arrow would take a:b/... for a URI of the scheme a, and every shard for a damaged one.
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path)
    cache = fill(create(Path("a:b")), PAIRS.slice(0, 2))
    assert cache.records and not cache.damaged
    assert {row["status"] for record in cache.records for row in cache.read(record).to_pylist()} == {"ok"}
