"""doctor: what is there, what would be used, and what is wrong, with its remedy."""

import json
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

from conftest import write_config, write_pairs


def examined(prefcache, *arguments):
    found = json.loads(prefcache("doctor", *arguments, "--json").stdout)
    assert found["problems"] == sum(each["state"] == "problem" for each in found["findings"])
    return {
        area: [each for each in found["findings"] if each["area"] == area]
        for area in dict.fromkeys(each["area"] for each in found["findings"])
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_a_config_it_is_about_the_environment(prefcache):
    found = examined(prefcache)
    assert set(found) == {"packages", "machine"}
    assert f"duckdb {version('duckdb')}" in found["packages"][0]["what"]
    machine = " ".join(each["what"] for each in found["machine"])
    assert f"{os.cpu_count()} cores" in machine and "GiB of disk are free for ." in machine


def test_a_whole_experiment_has_no_problem_and_is_left_as_it_is(prefcache, config, tmp_path):
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    steps = json.loads(prefcache("train", config, "--json").stdout)["steps"]
    before = contents(tmp_path / "runs")
    found = examined(prefcache, config)
    assert all(each["state"] != "problem" for area in found.values() for each in area)
    assert found["data"][0]["what"].endswith("60 pairs, 0 records in quarantine")
    assert "120 sequences" in found["scores"][0]["what"]
    assert f"trained: sigmoid, {steps} steps, finished" in found["runs"][0]["what"]
    assert found["engines"][0]["what"].startswith("transformers (this config): torch")
    assert contents(tmp_path / "runs") == before


def test_what_is_not_there_yet_names_the_command_that_makes_it(prefcache, config):
    found = examined(prefcache, config)
    assert [(each["state"], each["remedy"]) for each in found["data"]] == [("absent", "make prepare")]
    prefcache("prepare", config)
    assert [(each["state"], each["remedy"]) for each in examined(prefcache, config)["scores"]] == [
        ("absent", "make score")
    ]


def test_damage_is_named_with_its_remedy_and_nothing_is_taken_back(prefcache, config, tmp_path):
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    shard = next(tmp_path.glob("cache/*/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    weights = tmp_path / "runs/tiny/trained/model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    found = examined(prefcache, config)
    assert found["scores"][0]["state"] == found["runs"][0]["state"] == "problem"
    assert shard.name in found["scores"][0]["what"] and "make score" in found["scores"][0]["remedy"]
    assert str(weights.relative_to(tmp_path)) in found["runs"][0]["what"]
    assert (tmp_path / "runs/tiny/scored/manifest.json").exists()
    assert (tmp_path / "runs/tiny/trained/manifest.json").exists()


def test_data_that_changed_since_it_was_scored_is_said(prefcache, config, tmp_path):
    prefcache("prepare", config)
    prefcache("score", config)
    write_pairs(tmp_path / "pairs.jsonl", 5, start=60, mode="a")
    prefcache("prepare", config)
    assert "changed since" in examined(prefcache, config)["scores"][0]["what"]


def test_an_unfinished_run_says_where_it_goes_on_and_by_what_command(prefcache, config, tmp_path):
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    prefcache("train", config, "--set", "train.checkpoint_every=5")
    run = tmp_path / "runs/tiny/trained"
    (run / "manifest.json").unlink()
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    (found,) = examined(prefcache, config)["runs"]
    assert found["what"].endswith("it goes on from step 10")
    _, *command = shlex.split(found["remedy"])
    assert "going on from step 10" in prefcache(*command).stderr
    (found,) = examined(prefcache, config)["runs"]
    assert found["state"] == "ok"


def test_the_command_is_for_a_run_that_gave_way_to_another_under_the_name_it_has_now(prefcache, config, tmp_path):
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    prefcache("train", config, "--set", "train.beta=0.3")
    weights = tmp_path / "runs/tiny/trained-1/model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    damaged, whole = sorted(examined(prefcache, config)["runs"], key=lambda found: found["state"], reverse=True)
    assert (damaged["state"], whole["state"]) == ("problem", "ok")
    prefcache(*shlex.split(damaged["remedy"])[1:])
    assert [found["state"] for found in examined(prefcache, config)["runs"]] == ["ok", "ok"]


def test_engines_say_why_they_cannot(prefcache, config):
    settings = ["--set", "score.vllm.python=nowhere/python"]
    _, vllm = examined(prefcache, config, *settings)["engines"]
    assert vllm["state"] == "absent" and "nowhere/python" in vllm["what"]
    _, vllm = examined(prefcache, config, *settings, "--set", "score.engine=vllm")["engines"]
    assert vllm["state"] == "problem"


def test_a_model_that_cannot_share_rows_says_why(prefcache, model, tmp_path):
    chunked = shutil.copytree(model, tmp_path / "chunked")
    described = json.loads((chunked / "config.json").read_text()) | {"attention_chunk_size": 16}
    (chunked / "config.json").write_text(json.dumps(described))
    write_pairs(tmp_path / "pairs.jsonl", 3)
    found = examined(prefcache, write_config(tmp_path, chunked))["reference"]
    assert "rows are padded" in found[1]["what"] and "attention_chunk_size" in found[1]["what"]


def test_a_reference_that_is_not_there_is_a_problem(prefcache, config):
    found = examined(prefcache, config, "--set", "model=nowhere")
    assert found["reference"][0]["state"] == "problem" and "nowhere" in found["reference"][0]["what"]


def test_a_person_reads_signs_and_remedies(prefcache, config):
    printed = prefcache("doctor", config).stdout
    assert "  ok transformers (this config)" in printed and "     make prepare\n" in printed
    assert printed.endswith("no problems\n")
