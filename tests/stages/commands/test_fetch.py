"""fetch takes what somebody has published, and nothing of a source of which anything is wrong."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact, shards
from prefcache.pipeline.stored.object_store import ObjectStore
from prefcache.pipeline.stored.records import ShardRecord
from tests.helpers import vision_models
from tests.helpers.hub import client_settings, run_hub
from tests.helpers.kills import killed_at
from tests.helpers.project import options, pair, write_config
from tests.helpers.published import rewrite
from tests.helpers.scored import cache_folder
from tests.helpers.sessions import open_session
from tests.helpers.ssh_keys import allow, make_key

N = 120  # sequences of the 60 pairs


@pytest.fixture
def theirs(prepared, scored_once, tmp_path) -> Path:
    """The scored cache of somebody else, next to an experiment that is only prepared."""
    return shutil.copytree(cache_folder(scored_once), tmp_path / "theirs")


def fetch(prefcache, config, source, *arguments, code: int = 0) -> dict:
    done = prefcache("fetch", "-q", config, source, "--json", *arguments, code=code)
    return json.loads(done.stdout if code == 0 else done.stderr.splitlines()[-1])


def refuse(prefcache, config, source, *arguments, code: int = 4) -> str:
    """The sentence of a refusal, after which nothing of the source is in the cache."""
    message = fetch(prefcache, config, source, *arguments, code=code)["error"]["message"]
    assert not list(config.parent.glob("cache/*/*.parquet")) and not list(config.parent.glob("runs/tiny/.fetched*"))
    return message


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values(folder: Path) -> dict[bytes, tuple]:
    rows = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return {row["key"]: (row["logp_sum"], tuple(row["logps"]), row["numerics_id"]) for row in rows}


def test_what_was_fetched_is_what_was_published_and_score_computes_nothing(prefcache, prepared, theirs, tmp_path):
    before = tree(theirs)
    result = fetch(prefcache, prepared, "theirs")
    assert (result["needed"], result["rows"], result["compared"], result["use"]) == (N, N, 32, None)
    assert 0 < result["deviation"] < 1e-5
    assert values(cache_folder(tmp_path)) == values(theirs)
    (parity,) = {ShardRecord.read(each).parity for each in shards.list_records(cache_folder(tmp_path))}
    assert parity == ShardRecord.read(shards.list_records(theirs)[0]).parity
    scored = json.loads(prefcache("score", "-q", prepared, "--json").stdout)
    assert (scored["scored"], scored["tokens"], scored["cached_before"]) == (0, 0, N)
    prefcache("train", "-q", prepared, "--set", "train.max_steps=2")
    assert "nothing is missing" in prefcache("fetch", prepared, "theirs").stdout
    assert tree(theirs) == before


def test_a_store_that_may_only_be_read_is_refused_before_a_model_is_loaded(
    prefcache, prepared, theirs, s3, monkeypatch
):
    def refuse_access(self, name, data):
        raise UsageError("access was refused")

    monkeypatch.setattr(ObjectStore, "create", refuse_access)
    message = prefcache("fetch", prepared, "theirs", "--set", f"cache={s3.url}", code=2).stderr
    assert f"{s3.url}/" in message and "cannot be written, and some sequences are missing in it" in message
    assert "computing" not in message


def test_of_a_cache_with_several_references_the_one_of_the_model_is_the_source(
    prefcache, prepared, theirs, other_model, tmp_path
):
    other = options(f"model={other_model}", "cache=shared", "out=runs/other")
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", prepared, *other)
    assert "shared/other-" in refuse(prefcache, prepared, "shared", code=5)
    shutil.move(theirs, tmp_path / "shared" / theirs.name)
    quantized = options("score.quantization=4bit")  # the same weights, and yet another reference
    assert "has no cache of this model" in refuse(prefcache, prepared, "shared", *quantized, code=5)
    assert fetch(prefcache, prepared, "shared")["source"] == "shared/theirs"


@pytest.mark.slow  # a model that sees
def test_rows_about_pictures_are_compared_with_the_pictures(prefcache, tmp_path):
    rows = []
    for n in range(3):
        vision_models.picture(20 + 4 * n, 30, seed=n).save(tmp_path / f"{n}.png")
        rows.append(pair(n) | {"prompt": f"<image>{pair(n)['prompt']}", "images": [f"{n}.png"]})
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = write_config(tmp_path, vision_models.save("qwen2.5-vl"))
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", config)
    result = fetch(prefcache, config, "cache", "--set", "cache=mine")
    assert (result["rows"], result["compared"]) == (6, 6) and result["deviation"] < 1e-4
    assert json.loads(prefcache("score", "-q", config, "--set", "cache=mine", "--json").stdout)["tokens"] == 0


def test_only_what_is_needed_and_missing_is_taken(prefcache, prepared, theirs, tmp_path):
    """The cache has the first 20 pairs already, the experiment the first 40, and the source all 60."""
    for n, out in ((20, "runs/some"), (40, "runs/more")):
        lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[:n]
        (tmp_path / f"{out[5:]}.jsonl").write_text("".join(lines))
        settings = ["--set", f"out={out}", "--set", f"prepare.data={out[5:]}.jsonl"]
        prefcache("prepare", "-q", prepared, *settings)
        if n == 20:
            prefcache("score", "-q", prepared, *settings)
    folder = cache_folder(tmp_path)
    mine, every = set(values(folder)), set(values(theirs))
    plan = fetch(prefcache, prepared, "theirs", *settings, "--dry-run")
    assert (plan["needed"], plan["rows"], set(values(folder))) == (40, 40, mine)
    result = fetch(prefcache, prepared, "theirs", *settings)
    assert (result["rows"], len(values(folder)), len(every)) == (40, 80, N)
    assert sum(len(pq.read_table(file)) for file in folder.glob("*.parquet")) == 80


def test_a_dry_run_changes_nothing(prefcache, prepared, theirs, tmp_path):
    before = tree(tmp_path)
    plan = fetch(prefcache, prepared, "theirs", "--dry-run")
    assert (plan["dry_run"], plan["rows"], sum(plan["numerics"].values())) == (True, N, N)
    assert tree(tmp_path) == before


def test_rows_of_other_numerics_are_used_where_they_are_accepted(prefcache, prepared, tmp_path):
    bf16 = ["--set", "score.dtype=bfloat16", "--set", "cache=theirs", "--set", "out=runs/theirs"]
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", prepared, *bf16)
    (source,) = (path for path in (tmp_path / "theirs").iterdir() if path.is_dir())
    result = fetch(prefcache, prepared, source)
    (numerics_id,) = result["numerics"]
    assert result["use"] == f"--set score.accept_numerics=[{numerics_id}]"
    assert numerics_id in prefcache("score", "-q", prepared, code=5).stderr
    scored = json.loads(prefcache("score", "-q", prepared, "--json", *result["use"].split()).stdout)
    assert (scored["scored"], scored["tokens"]) == (0, 0)


@pytest.mark.slow  # a fetch for each of 40 steps on the disk
def test_a_fetch_that_is_killed_is_continued_and_takes_no_row_twice(prefcache, prepared, theirs, tmp_path):
    command = ["fetch", prepared, "theirs", "--set", "score.parity_sample=0"]
    n_killed = 0
    for step in range(0, 400, 10):
        n_killed += killed_at(step, lambda: prefcache(*command))
        prefcache(*command)
        folder = cache_folder(tmp_path)
        assert sum(len(pq.read_table(file)) for file in folder.glob("*.parquet")) == len(values(folder)) == N
        assert json.loads(prefcache("verify", "--json").stdout)["damaged"] == 0
        shutil.rmtree(tmp_path / "cache")
    assert n_killed > 10


# -- what is refused -------------------------------------------------------------------------------------------------


def test_rows_of_other_weights_are_refused_by_the_names_of_both(prefcache, prepared, theirs, other_model):
    message = refuse(prefcache, prepared, "theirs", "--set", f"model={other_model}", code=5)
    assert "theirs holds log-probs of" in message and f"this config names {other_model}@" in message


def test_a_place_that_is_no_published_cache_is_refused(prefcache, prepared, theirs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no cache: no reference.json" in refuse(prefcache, prepared, "empty", code=2)
    assert "neither a folder, nor the name of a data set" in refuse(prefcache, prepared, "a/b/c", code=2)
    assert "--revision is for a data set on the hub" in refuse(prefcache, prepared, "theirs", "--revision", "x", code=2)
    (theirs / "reference.json").write_text("{}")
    assert "Nothing was taken from theirs." in refuse(prefcache, prepared, "theirs")


def positive(rows):
    rows[0] |= {"logps": [0.5] * rows[0]["n_completion"], "logp_sum": 0.5 * rows[0]["n_completion"]}


def not_a_number(rows):
    rows[0]["logp_sum"] = float("nan")


def other_sum(rows):
    rows[-1]["logp_sum"] -= 1


def other_length(rows):
    rows[0]["logps"] = [*rows[0]["logps"], -1.0]
    rows[0]["logp_sum"] -= 1


def longer_answer(rows):
    """Its list is as long as it says, but the sequence is shorter."""
    rows[0] |= {"logps": [*rows[0]["logps"], -1.0], "n_completion": rows[0]["n_completion"] + 1}
    rows[0]["logp_sum"] -= 1


def other_prompt(rows):
    rows[0]["n_prompt"] += 1


def unsorted(rows):
    rows.reverse()


def foreign_numerics(rows):
    rows[0]["numerics_id"] = "n" + "0" * 15


def wrong_values(rows):
    """Possible, and all of them half as large as they should be."""
    for row in rows:
        row["logps"] = [float(np.float32(logp / 2)) for logp in row["logps"]]
        row["logp_sum"] = float(np.array(row["logps"], np.float32).sum(dtype=np.float64))


@pytest.mark.parametrize(
    "change, says",
    [
        (positive, "a log-prob is above zero"),
        (not_a_number, "a log-prob is not finite"),
        (other_sum, "logp_sum is not the sum of logps"),
        (other_length, "another number of log-probs than its answer has tokens"),
        (longer_answer, "whose n_completion is not that of its sequence"),
        (other_prompt, "whose n_prompt is not that of its sequence"),
        (unsorted, "its keys are not in order"),
        (foreign_numerics, "a row's numerics are not those of its record"),
        (wrong_values, "nats off a token on average; 0.0001 is rounding in float32"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_values_that_the_model_does_not_give_are_refused(prefcache, prepared, theirs, change, says):
    rewrite(theirs, change)
    message = refuse(prefcache, prepared, "theirs")
    assert says in message and message.endswith("Nothing was taken from theirs.")


def test_one_wrong_row_is_found_wherever_it_is_if_all_are_compared(prefcache, prepared, theirs):
    record = shards.list_records(theirs)[4]
    rewrite(theirs, lambda rows: None)
    n_rows = ShardRecord.read(record).rows
    at = iter([n_rows // 2])

    def change_one(rows):
        if len(rows) == n_rows and (i := next(at, None)) is not None:
            wrong_values([rows[i]])

    rewrite(theirs, change_one)
    message = refuse(prefcache, prepared, "theirs", "--set", f"score.parity_sample={N}")
    assert "is rounding in float32" in message
    done = prefcache("fetch", prepared, "theirs", "--set", "score.parity_sample=0")
    assert "nothing of what was fetched is compared with the model" in done.stderr


def test_the_rows_that_are_compared_are_drawn_by_lot(prefcache, prepared, theirs, monkeypatch):
    """Keys are hashes, but whoever knows that the smallest are compared could be right about those alone."""
    from prefcache.commands import fetch as command

    seen: Counter[int] = Counter()

    def count_sums(samples, *arguments, **options):
        seen.update(total for sample in samples for total in sample.sums)
        return [np.zeros(len(sample.sums)) for sample in samples]

    monkeypatch.setattr(command, "compare_with_plain_forward", count_sums)
    for i in range(8):
        fetch(prefcache, prepared, "theirs", "--set", f"cache=cache{i}", "--set", "score.parity_sample=8")
    # 64 draws of 8 from 120: that all are of the same 16 has a chance below 1e-30.
    assert sum(seen.values()) == 64 and len(seen) > 16


def flip_a_byte(folder):
    shard = next(folder.glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def cut_a_shard(folder):
    shard = next(folder.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])


def remove_a_shard(folder):
    next(folder.glob("*.parquet")).unlink()


def link_a_shard(folder):
    shard = next(folder.glob("*.parquet"))
    shutil.move(shard, folder.parent / "elsewhere.parquet")
    shard.symlink_to(folder.parent / "elsewhere.parquet")


def change_a_record(folder):
    record = shards.list_records(folder)[0]
    record.write_bytes(record.read_bytes().replace(b'"rows"', b'"Rows"'))


def plant_a_path(folder):
    record = shards.list_records(folder)[0]
    record.write_bytes(artifact.seal(artifact.unseal(record) | {"file": "../../../pairs.jsonl"}))


def make_a_newer_record(folder):
    record = shards.list_records(folder)[0]
    record.write_bytes(artifact.seal(artifact.unseal(record) | {"schema_version": 99}))


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, cut_a_shard, remove_a_shard, link_a_shard, change_a_record, plant_a_path, make_a_newer_record],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_or_malformed_source_is_refused_whole(prefcache, prepared, theirs, damage):
    damage(theirs)
    assert refuse(prefcache, prepared, "theirs").endswith("Nothing was taken from theirs.")


def test_a_row_that_says_that_scoring_failed_is_neither_taken_nor_counted(prefcache, prepared, theirs, tmp_path):
    first = iter([True])

    def fail_one(rows):
        if next(first, False):
            rows[0] |= {"status": "too long", "logp_sum": None, "logps": None}

    rewrite(theirs, fail_one)
    result = fetch(prefcache, prepared, "theirs")
    assert (result["needed"], result["rows"]) == (N, N - 1) and sum(result["numerics"].values()) == N - 1
    assert len(values(cache_folder(tmp_path))) == N - 1


def test_a_source_that_changes_after_it_was_checked_changes_nothing(prefcache, prepared, theirs, monkeypatch, tmp_path):
    from prefcache.commands import fetch as command

    before, compare = values(theirs), command.compare_with_plain_forward

    def compare_then_change(*arguments, **options):
        means = compare(*arguments, **options)
        for record in map(ShardRecord.read, shards.list_records(theirs)):
            rows = pq.read_table(theirs / record.file).to_pylist()
            wrong_values(rows)
            table = pa.Table.from_pylist(rows, schema=CACHE)
            (theirs / record.file).write_bytes(artifact.parquet(table, float_lists=["logps"]))
        return means

    monkeypatch.setattr(command, "compare_with_plain_forward", compare_then_change)
    fetch(prefcache, prepared, "theirs")
    assert values(cache_folder(tmp_path)) == before


# -- signatures ------------------------------------------------------------------------------------------------------


def test_a_demanded_signature_has_to_cover_every_shard(prefcache, prepared, theirs, tmp_path):
    ann, eve = make_key(tmp_path / "ann"), make_key(tmp_path / "eve")
    allowed = allow(tmp_path / "allowed", ann)
    demand = ("--allowed-signers", allowed)
    assert "is not signed by anybody in" in refuse(prefcache, prepared, "theirs", *demand)
    prefcache("sign", "theirs", "--key", eve)
    assert "No principal matched" in refuse(prefcache, prepared, "theirs", *demand)
    prefcache("sign", "theirs", "--key", ann)
    signed = shutil.copytree(theirs, tmp_path / "signed")
    rewrite(theirs, other_prompt)
    assert "is not what was signed" in refuse(prefcache, prepared, "theirs", *demand)
    result = fetch(prefcache, prepared, signed, *demand)
    assert (result["rows"], result["signers"]) == (N, ["ann@example.com"])


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def publish_and_fetch(tmp_path):
    """The hub, and commands in a process of its own, for the hub's client reads its settings once."""
    with run_hub() as hub, open_session(tmp_path, {**os.environ, **client_settings(hub, tmp_path / "home")}) as run:
        yield hub, run


def test_a_published_cache_is_fetched_from_the_hub_with_its_signature(publish_and_fetch, scored, tmp_path):
    hub, run = publish_and_fetch
    ann = make_key(tmp_path / "ann")
    run("publish", "-q", scored, "me/rows", "--sign", ann)
    refused = run("publish", "-q", scored, "me/rows", code=2, HF_TOKEN="hf_another").stderr
    assert "the token may not write it" in refused and "client" not in refused.lower()
    first = hub.repositories["datasets/me/rows"].commits[-1][0]
    hub.repositories["datasets/me/rows"].add({"README.md": b"all gone"})
    theirs = values(cache_folder(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "runs/tiny/scored")
    assert "there is no reference.json in it" in run("fetch", "-q", scored, "me/rows", code=2).stderr
    assert "has no such data set" in run("fetch", "-q", scored, "me/other", code=2).stderr
    assert "has no such data set" in run("fetch", "-q", scored, "me/rows", code=2, HF_TOKEN="hf_another").stderr
    demand = ("--revision", first, "--allowed-signers", allow(tmp_path / "allowed", ann))
    result = json.loads(run("fetch", "-q", scored, "me/rows", *demand, "--json").stdout)
    assert (result["rows"], result["signers"]) == (N, ["ann@example.com"])
    assert result["source"] == f"me/rows@{first[:8]}" and values(cache_folder(tmp_path)) == theirs


def test_only_shards_with_a_needed_row_are_fetched_from_the_hub(publish_and_fetch, prefcache, scored, tmp_path):
    hub, run = publish_and_fetch
    run("publish", "-q", scored, "me/rows")
    names = {file.name for file in tmp_path.glob("cache/*/*.parquet")}
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[0])
    # Other tests compare a sample; without one, PyTorch is not loaded.
    settings = options("out=runs/one", "cache=mine", "prepare.held_out=0", "score.parity_sample=0")
    prefcache("prepare", "-q", scored, *settings)
    hub.served.clear()
    result = json.loads(run("fetch", "-q", scored, "me/rows", *settings, "--json").stdout)
    assert (result["rows"], result["shards"]) == (2, 1)  # both answers of a prompt are scored together
    assert {path for path, _, is_range in hub.served if is_range} == names  # their keys
    assert len([path for path, _, is_range in hub.served if not is_range and path.endswith(".parquet")]) == 1


def test_a_record_on_the_hub_that_would_fill_disk_and_memory_is_not_fetched(prefcache, prepared, monkeypatch):
    from prefcache.commands import fetch as command

    class Dataset:
        commit, sizes = "0" * 40, {"reference.json": 1 << 40}

        def __init__(self, name, revision):
            pass

        def download(self, names, folder):
            raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(command, "HubDataset", Dataset)
    assert "reference.json of me/rows@00000000 is larger than any record" in refuse(prefcache, prepared, "me/rows")


@pytest.mark.parametrize("lie", ["short", "other", "long"])
def test_a_hub_that_serves_other_bytes_than_were_published_is_refused(publish_and_fetch, scored, tmp_path, lie):
    hub, run = publish_and_fetch
    run("publish", "-q", scored, "me/rows")
    shutil.rmtree(tmp_path / "cache")
    change = {
        "short": lambda data: data[:-1],
        "other": lambda data: data[:40] + b"?" + data[41:],
        "long": lambda data: data + b"?",
    }
    hub.tampers = lambda path, data: change[lie](data) if path.endswith(".parquet") else data
    done = run("fetch", "-q", scored, "me/rows", code=None)
    assert done.returncode in (2, 4) and not list(tmp_path.glob("cache/*/*.parquet"))
