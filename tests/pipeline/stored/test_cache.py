"""A cached row is right or missing: found by its tokens, believed by its checksum, used only for its own model."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import IdentityError, IntegrityError
from pipeline.identity import Reference
from pipeline.schema import CACHE, PREPARED, sequence_key
from pipeline.stored import artifact
from pipeline.stored import cache as cache_module
from pipeline.stored.cache import identify
from pipeline.stored.prepared import Sequences, sequence_table

MODEL = "a" * 32
REFERENCE = {"model_id": MODEL, "weights": {}, "config": {}}
MINE, OTHER = "mine", "other"
BUDGET = 30


class Cache(cache_module.Cache):
    """Asked about pairs, as the stages ask."""

    def plan(self, table, accepted, budget):
        return super().plan(sequence_table(table), accepted, budget)

    def join(self, table, accepted):
        values = self.logps([table["chosen_key"], table["rejected_key"]], accepted)
        return dict(zip(("ref_chosen_logp", "ref_rejected_logp"), values, strict=True))


def prepared(pairs: list[tuple[list[int], list[int], list[int]]]) -> pa.Table:
    rows = [
        {
            "example_id": f"e{i}",
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "chosen_key": sequence_key(prompt, chosen),
            "rejected_key": sequence_key(prompt, rejected),
            "n_prompt": len(prompt),
            "n_chosen": len(chosen),
            "n_rejected": len(rejected),
        }
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=PREPARED["pairs"])


# 12 pairs, 24 different sequences of 3 to 14 tokens.
PAIRS = prepared([([i + 1] * (1 + i % 4), [50 + i] * (2 + i % 9), [90 + i] * (3 + i % 5)) for i in range(12)])


def logp(ids: list[int]) -> float:
    """What these tests take for the log-prob of an answer: minus an eighth of every token id. Exact in float32."""
    return -sum(ids) / 8


def expected(table: pa.Table, side: str) -> list[float]:
    return [logp(ids) for ids in table[f"{side}_ids"].to_pylist()]


def scored(
    table: pa.Table, slots: np.ndarray, numerics_id: str = MINE, shift: float = 0.0, fail: bool = False
) -> pa.Table:
    rows = []
    for slot in slots:
        sequence = Sequences(table)[slot]
        logps = -sequence.completion_ids.astype(np.float32) / 8
        rows.append(
            {
                "key": sequence.key(),
                "n_prompt": len(sequence.prompt_ids),
                "n_completion": len(logps),
                "logp_sum": None if fail else float(logps.sum(dtype=np.float64)) + shift,
                "logps": None if fail else logps,
                "numerics_id": numerics_id,
                "status": "failed: a log-prob is not finite" if fail else "ok",
            }
        )
    return pa.Table.from_pylist(rows, schema=CACHE)


def create(tmp_path: Path) -> Cache:
    return Cache.create(tmp_path / "cache", "org/tiny model", REFERENCE)


def reopen(cache: Cache) -> Cache:
    return Cache(cache.folder, MODEL)


def fill(cache: Cache, table: pa.Table, numerics_id: str = MINE, budget: int = BUDGET, **how) -> Cache:
    for slots in cache.plan(table, [numerics_id], budget).chunks:
        cache.commit(scored(table, slots, numerics_id, **how), {"engine": numerics_id}, numerics_id, None)
    return reopen(cache)


def keys_of(table: pa.Table, plan) -> list[set[bytes]]:
    return [{Sequences(table)[slot].key() for slot in slots} for slots in plan.chunks]


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
        cache.commit(scored(PAIRS, slots), {}, MINE, None)
    resumed = reopen(cache).plan(PAIRS, [MINE], BUDGET)
    assert [chunk.tolist() for chunk in resumed.chunks] == [chunk.tolist() for chunk in first.chunks[1::2]]
    assert resumed.n_hits == sum(len(chunk) for chunk in first.chunks[::2])
    assert resumed.probe.tolist() == first.probe.tolist()


def test_chunks_do_not_depend_on_the_order_of_the_examples(tmp_path):
    cache = create(tmp_path)
    turned = PAIRS.take(list(range(len(PAIRS)))[::-1])
    assert keys_of(turned, cache.plan(turned, [MINE], BUDGET)) == keys_of(PAIRS, cache.plan(PAIRS, [MINE], BUDGET))


def test_appended_examples_are_all_that_is_missing(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 9))
    plan = cache.plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_hits, plan.n_missing) == (18, 6)
    assert {slot // 2 for chunk in plan.chunks for slot in chunk} == {9, 10, 11}


def test_a_full_cache_lacks_nothing(tmp_path):
    plan = fill(create(tmp_path), PAIRS).plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_missing, plan.chunks, plan.n_tokens) == (0, [], 0)


def test_rows_of_other_numerics_are_counted_and_not_used(tmp_path):
    cache = fill(create(tmp_path), PAIRS.slice(0, 5), OTHER)
    plan = cache.plan(PAIRS, [MINE], BUDGET)
    assert (plan.n_hits, plan.other_numerics) == (0, {OTHER: 10})
    # Named, they are hits.
    accepted = cache.plan(PAIRS, [MINE, OTHER], BUDGET)
    assert (accepted.n_hits, accepted.n_missing, accepted.other_numerics) == (10, 14, {})


def test_no_examples_need_no_plan(tmp_path):
    plan = create(tmp_path).plan(PREPARED["pairs"].empty_table(), [MINE], BUDGET)
    assert (plan.n_sequences, plan.chunks, len(plan.probe)) == (0, [], 0)


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


def test_join_of_no_rows_is_empty(tmp_path):
    values = fill(create(tmp_path), PAIRS).join(PREPARED["pairs"].empty_table(), [MINE])
    assert [len(values[name]) for name in ("ref_chosen_logp", "ref_rejected_logp")] == [0, 0]


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
                cache.commit(scored(PAIRS, slots, shift=shift), {}, MINE, None)
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
    monkeypatch.setattr(cache_module, "_SETTLED_SECONDS", -1.0)
    cache = fill(create(tmp_path), PAIRS)
    for record in cache.records:
        old = {key: value for key, value in record.items() if key != "values_xxh3_128"}
        artifact.commit_bytes(cache.record_path(record), artifact.seal(old))
    assert reopen(cache).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    hashed = []
    damage = artifact.damage
    monkeypatch.setattr(artifact, "damage", lambda f, e: hashed.append(e["file"]) or damage(f, e))
    reopen(cache)
    assert len(hashed) == len(cache.records)


def test_a_value_under_one_numerics_stands_in_for_a_failure_under_another(tmp_path):
    cache = fill(create(tmp_path), PAIRS, MINE, fail=True)
    cache = fill(cache, PAIRS, OTHER)
    assert cache.join(PAIRS, [MINE, OTHER])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")
    plan = cache.plan(PAIRS, [MINE, OTHER], BUDGET)
    assert (plan.n_hits, plan.n_failed) == (24, 0)


# -- identity --------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_model_is_refused(tmp_path):
    folder = create(tmp_path).folder
    with pytest.raises(IdentityError, match=r"org/tiny model@aaaaaaaa; this run names a model @bbbbbbbb.*make score"):
        Cache(folder, "b" * 32)


def test_each_model_has_a_folder_named_after_it(tmp_path):
    first = create(tmp_path)
    second = Cache.create(tmp_path / "cache", "org/tiny model", REFERENCE | {"model_id": "b" * 32})
    assert first.folder.name == "tiny_model-aaaaaaaaaaaa" and second.folder.name == "tiny_model-bbbbbbbbbbbb"
    assert create(tmp_path).folder == first.folder


def test_a_damaged_reference_file_is_an_integrity_error(tmp_path):
    cache = create(tmp_path)
    flip(cache.folder / "reference.json")
    with pytest.raises(IntegrityError, match=r"reference\.json"):
        reopen(cache)


def test_identify_remembers_hashes_beside_the_caches(tmp_path, model):
    found = identify(Reference(model), tmp_path / "cache")
    memo = tmp_path / "cache" / ".weights.json"
    assert list(json.loads(memo.read_text()).values()) == list(found["weights"].values())
    # A remembered hash is believed: one that is wrong shows that nothing was hashed again.
    memo.write_text(json.dumps(dict.fromkeys(json.loads(memo.read_text()), "remembered")))
    assert identify(Reference(model), tmp_path / "cache")["weights"] == {"model.safetensors": "remembered"}
    memo.write_text("{")
    assert identify(Reference(model), tmp_path / "cache") == found


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


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
    lost = set(pq.read_table(cache.folder / broken["file"])["key"].to_pylist())
    record = cache.folder / f"{broken['file'].rpartition('-')[0]}.json"
    damages(cache.folder / broken["file"], record)

    found = reopen(cache)
    assert list(found.damaged) == [record] and len(found.records) == len(cache.records) - 1
    with pytest.raises(IntegrityError, match=f"1 of {len(cache.records)} shards .* are damaged.*{record.stem}"):
        found.refuse_damage()
    found.discard_damaged()
    plan = reopen(found).plan(PAIRS, [MINE], BUDGET)
    assert keys_of(PAIRS, plan) == [lost] and plan.n_hits == whole.n_sequences - len(lost)

    mended = fill(reopen(found), PAIRS)
    assert not mended.damaged
    assert mended.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")


def test_a_missing_record_means_missing_rows(tmp_path):
    # As after a kill between a shard and its record.
    cache = fill(create(tmp_path), PAIRS)
    lost = cache.records[0]
    (cache.folder / f"{lost['file'].rpartition('-')[0]}.json").unlink()
    found = reopen(cache)
    assert not found.damaged
    assert found.plan(PAIRS, [MINE], BUDGET).n_missing == lost["rows"]
    assert not fill(found, PAIRS).plan(PAIRS, [MINE], BUDGET).n_missing


def test_an_undamaged_cache_refuses_nothing(tmp_path):
    cache = fill(create(tmp_path), PAIRS)
    cache.refuse_damage()
    cache.discard_damaged()
    assert len(reopen(cache).records) == len(cache.records)


# -- several scorers -------------------------------------------------------------------------------------------------


def test_two_scorers_of_one_chunk_leave_one_shard(tmp_path):
    one, other = create(tmp_path), create(tmp_path)
    (slots, *_) = one.plan(PAIRS, [MINE], 10_000).chunks
    keys = [Sequences(PAIRS)[slot].key() for slot in slots]
    assert not one.has_chunk(keys, MINE)
    one.commit(scored(PAIRS, slots), {}, MINE, None)
    assert other.has_chunk(keys, MINE) and other.has_chunk(keys[::-1], MINE) and not other.has_chunk(keys, OTHER)
    other.commit(scored(PAIRS, slots[::-1]), {}, MINE, None)  # in another order, the same rows
    found = reopen(one)
    assert len(found.records) == 1 and len(list(found.folder.glob("*.parquet"))) == 1
    assert found.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == expected(PAIRS, "chosen")


def test_two_scorers_that_disagree_leave_the_first_one_whole(tmp_path):
    # Rounding may differ between machines of the same versions; bytes of one must never meet the record of the other.
    one, other = create(tmp_path), create(tmp_path)
    (slots, *_) = one.plan(PAIRS, [MINE], 10_000).chunks
    one.commit(scored(PAIRS, slots), {}, MINE, None)
    other.commit(scored(PAIRS, slots, shift=1e-6), {}, MINE, None)
    found = reopen(one)
    assert len(found.records) == 1 and not found.damaged
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
        one.commit(scored(PAIRS, slots), {}, MINE, None)
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
    cache.commit(scored(PAIRS, slots), {"dtype": "float32"}, MINE, {"max": 1e-6})
    (record,) = reopen(cache).records
    assert record["rows"] == 24 and record["numerics"] == {"dtype": "float32"} and record["parity"] == {"max": 1e-6}
    assert reopen(cache).numerics() == {MINE: {"dtype": "float32"}}
    shard = cache.folder / record["file"]
    assert artifact.describe(shard) == {key: record[key] for key in ("file", "bytes", "xxh3_128")}
    table = pq.read_table(shard)
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    for row in table.to_pylist():
        assert row["logp_sum"] == sum(row["logps"]) and len(row["logps"]) == row["n_completion"]
