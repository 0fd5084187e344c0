"""Two values of one sequence that differ by more than rounding: neither is served, merged or passed over in silence."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline import identity
from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.scoring.scorer import TOLERANCE
from prefcache.pipeline.stored import artifact, cache_maintenance, contradictions, records
from tests.helpers.caches import BUDGET, MINE, NUMERICS, PAIRS, Cache, create, expected, fill, reopen, scored

RIGHT = expected(PAIRS, "chosen")


def sums_only(rows: pa.Table) -> pa.Table:
    """Without the lists, which would not add up to shifted sums."""
    at = rows.schema.get_field_index("logps")
    return rows.set_column(at, CACHE.field(at), pa.nulls(len(rows), CACHE.field(at).type))


def with_another(tmp_path: Path, shift: float) -> tuple[Cache, list[str]]:
    """A cache that holds five sequences once more, their values shifted; the shards that hold them, by name."""
    found = fill(create(tmp_path), PAIRS)
    before = {record.file for record in found.records}
    (slots, *_) = found.plan(PAIRS, ["nobody"], 10_000).chunks
    rows = sums_only(scored(PAIRS, slots[:5], shift=shift))
    keys = {key.as_py() for key in rows["key"]}
    found.commit(rows, NUMERICS[MINE], MINE, None)
    held = [name for name in before if keys & {*pq.read_table(found.folder / name)["key"].to_pylist()}]
    (new,) = {record.file for record in reopen(found).records} - before
    return reopen(found), [new, *held]


def test_rounding_is_that_of_a_checked_engine():
    # A token may be 0.002 off in float32; over 100 of them such noise adds up to ten times as much.
    assert contradictions.tolerance({"dtype": "float32"}, 1) == 0.002
    assert contradictions.tolerance({"dtype": "float32"}, 100) == pytest.approx(0.02)
    assert contradictions.tolerance({"dtype": "bfloat16"}, 4) == 1.5
    # What names no dtype that is known here gets the benefit of the doubt.
    assert contradictions.tolerance({}, 1) == 0.75
    assert contradictions.TOKEN_TOLERANCE == TOLERANCE


def test_values_that_differ_by_rounding_are_one_value_and_the_smaller_is_served(tmp_path):
    # 2 to 10 tokens: 0.001 is below 0.002 * sqrt(2).
    found, _ = with_another(tmp_path, -0.001)
    served = found.join(PAIRS, [MINE])["ref_chosen_logp"]
    assert not found.damaged and min(served - RIGHT) == pytest.approx(-0.001)


@pytest.mark.parametrize("shift", [-0.5, 0.5, -40.0])
def test_neither_of_two_values_is_served_and_both_shards_are_named(tmp_path, shift):
    found, shards = with_another(tmp_path, shift)
    with pytest.raises(IntegrityError) as refused:
        found.join(PAIRS, [MINE])
    assert f"{len(shards)} of " in str(refused.value) and "hold different log-probs of one sequence" in str(
        refused.value
    )
    reasons = " ".join(found.damaged.values())
    assert {path.name for path in found.damaged} == {f"{name.rpartition('-')[0]}.json" for name in shards}
    assert all(name in reasons for name in shards)


def test_what_contradicts_itself_is_missing_and_scored_again_and_nothing_else(tmp_path):
    found, shards = with_another(tmp_path, -0.5)
    lost = {key for name in shards for key in pq.read_table(found.folder / name)["key"].to_pylist()}
    plan = found.plan(PAIRS, [MINE], BUDGET)
    assert plan.n_missing == len(lost) and len(found.damaged) == len(shards)
    found.discard_damaged()
    again = fill(reopen(found), PAIRS)
    assert again.join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == RIGHT


def test_other_numerics_do_not_contradict(tmp_path):
    numerics = {"engine": "another", "dtype": "float32"}
    other, found = identity.numerics_id(numerics), fill(create(tmp_path), PAIRS)
    (slots, *_) = found.plan(PAIRS, [other], 10_000).chunks
    found.commit(sums_only(scored(PAIRS, slots, other, shift=-5.0)), numerics, other, None)
    assert reopen(found).join(PAIRS, [MINE, other])["ref_chosen_logp"].tolist() == RIGHT
    assert cache_maintenance.verify(found.folder).damaged == {}


def test_a_failure_does_not_contradict_a_value(tmp_path):
    found = fill(create(tmp_path), PAIRS)
    (slots, *_) = found.plan(PAIRS, ["nobody"], 10_000).chunks
    found.commit(scored(PAIRS, slots[:5], fail=True), NUMERICS[MINE], MINE, None)
    assert reopen(found).join(PAIRS, [MINE])["ref_chosen_logp"].tolist() == RIGHT


def test_verify_names_them_and_gc_merges_all_but_them(tmp_path, monkeypatch):
    found, shards = with_another(tmp_path, -0.5)
    assert {*cache_maintenance.verify(found.folder).damaged} == {*shards}
    monkeypatch.setattr(cache_maintenance, "_ROWS_AT_ONCE", 5)  # in several steps through the keys
    assert {*cache_maintenance.find_contradictions(found)} == {*shards}
    done = cache_maintenance.gc(found.folder, 1 << 20)
    assert {*done.damaged} == {*shards} and done.merged == len(found.records) - len(shards)
    assert all((found.folder / name).exists() for name in shards)
    assert {record.generation for record in reopen(found).records} == {0, 1}


def test_every_command_names_a_planted_value_and_score_computes_it_again(prefcache, config, tmp_path):
    """From the command line: another shard of the same numerics, its seals right, its values half a nat off."""
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    folder = next((tmp_path / "cache").glob("tiny-*"))
    right = {record.file: pq.read_table(folder / record.file) for record in Cache(folder, None).records}
    record = Cache(folder, None).records[0]
    rows = [{**row, "logp_sum": row["logp_sum"] - 0.5, "logps": None} for row in right[record.file].to_pylist()[:3]]
    planted = f"{'e' * 32}-00000000.parquet"
    entry = artifact.commit_file(folder / planted, artifact.parquet(pa.Table.from_pylist(rows, schema=CACHE)), rows=3)
    facts = {**record.facts(), **entry}
    del facts["values_xxh3_128"], facts["blocks"]
    records.ShardRecord.make(**facts).commit(folder / f"{'e' * 32}.json")
    shutil.copy(tmp_path / "runs/tiny/scored/manifest.json", tmp_path / "scored.json")

    for command in (
        ["verify", "cache"],
        ["gc", "cache", "--dry-run"],
        ["doctor", config],
        ["sql", "select * from reference", "runs/tiny"],
        ["train", config],
    ):
        done = prefcache(*command, code=None)
        said = done.stdout + done.stderr
        assert done.returncode == 4 or (command[0] == "doctor" and "Neither is served" in said), said
        assert planted in said and record.file in said and f"{rows[0]['logp_sum']:.6g}"[:5] in said, said
    shutil.copy(tmp_path / "scored.json", tmp_path / "runs/tiny/scored/manifest.json")
    done = prefcache("score", config, "--json")
    assert planted in done.stderr and record.file in done.stderr
    assert json.loads(done.stdout)["scored"] == record.rows
    whole = Cache(folder, None)
    assert cache_maintenance.verify(folder).damaged == {} and planted not in {each.file for each in whole.records}
    found = {
        row["key"]: row["logp_sum"] for each in whole.records for row in pq.read_table(folder / each.file).to_pylist()
    }
    for table in right.values():
        for row in table.to_pylist():
            assert found[row["key"]] == pytest.approx(row["logp_sum"], abs=1e-3)
