"""doctor: what is there, what would be used, and what is wrong, with its remedy."""

import json
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from prefcache.commands import doctor
from tests.helpers.project import invoke, write_config, write_pairs


def examined(prefcache, *arguments):
    found = json.loads(prefcache("doctor", *arguments, "--json").stdout)
    assert found["problems"] == sum(each["state"] == "problem" for each in found["findings"])
    return {
        area: [each for each in found["findings"] if each["area"] == area]
        for area in dict.fromkeys(each["area"] for each in found["findings"])
    }


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """A folder with an experiment that was prepared, scored and trained once."""
    folder = tmp_path_factory.mktemp("doctor")
    write_pairs(folder / "pairs.jsonl", 60)
    config = write_config(folder, model, checkpoint_every=5)
    for stage in ("prepare", "score", "train"):
        invoke(folder, stage, config)
    return folder


@pytest.fixture
def trained(finished, tmp_path, prefcache) -> Path:
    """A copy of it in the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "config.yaml"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_a_config_it_is_about_the_environment(prefcache):
    found = examined(prefcache)
    assert set(found) == {"packages", "machine"}
    assert f"duckdb {version('duckdb')}" in found["packages"][0]["what"]
    machine = " ".join(each["what"] for each in found["machine"])
    assert f"{os.cpu_count()} cores" in machine and "GiB of disk are free for ." in machine


def test_pytorch_is_described_as_it_describes_itself(prefcache):
    # On a machine with a GPU, the GPUs are listed instead.
    machine = " ".join(each["what"] for each in examined(prefcache)["machine"])
    if torch.cuda.is_available():
        assert f"GPU 0: {torch.cuda.get_device_name(0)}" in machine
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        assert f"no GPU: PyTorch {torch.__version__}, {built}, sees none" in machine


@pytest.mark.parametrize(
    ("build", "may"),
    [
        ({"cuda": None, "hip": None}, False),
        ({"cuda": None}, False),
        ({"cuda": None, "hip": "6.4"}, True),  # its drivers have no library of a known name
    ],
)
def test_a_build_without_cuda_or_hip_sees_no_gpu(build, may):
    assert doctor._may_see_gpu(build) is may


def test_a_build_for_cuda_may_see_a_gpu_where_its_driver_is(monkeypatch):
    libraries = {"libcuda.so.1"}

    def load(name: str) -> None:
        if name not in libraries:
            raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", load)
    assert doctor._may_see_gpu({"cuda": "12.8", "hip": None})
    libraries.clear()
    assert not doctor._may_see_gpu({"cuda": "12.8", "hip": None})


def test_a_whole_experiment_has_no_problem_and_is_left_as_it_is(prefcache, trained, tmp_path):
    before = contents(tmp_path)
    found = examined(prefcache, trained)
    assert all(each["state"] != "problem" for area in found.values() for each in area)
    assert found["data"][0]["what"].endswith("60 pairs, 0 records in quarantine")
    assert "120 sequences" in found["scores"][0]["what"]
    steps = json.loads((tmp_path / "runs/tiny/trained/manifest.json").read_text())["steps"]
    assert f"trained: sigmoid, {steps} steps, finished" in found["runs"][0]["what"]
    assert found["engines"][0]["what"].startswith("transformers (this config): torch")
    assert contents(tmp_path) == before


def test_what_is_not_there_yet_names_the_command_that_makes_it(prefcache, config):
    found = examined(prefcache, config)
    assert [(each["state"], each["remedy"]) for each in found["data"]] == [("absent", "prefcache prepare CONFIG")]
    prefcache("prepare", config)
    assert [(each["state"], each["remedy"]) for each in examined(prefcache, config)["scores"]] == [
        ("absent", "prefcache score CONFIG")
    ]


def test_the_memory_of_a_training_step_is_said_with_the_command_that_says_more(prefcache, config):
    assert "training" not in examined(prefcache, config)  # nothing is prepared yet
    prefcache("prepare", config)
    (found,) = examined(prefcache, config)["training"]
    planned = json.loads(prefcache("train", config, "--dry-run", "--json").stdout)
    assert f"a step with {planned['micro_batch_tokens']:,} tokens a micro-batch takes 0.0 GiB" in found["what"]
    assert found["state"] == "ok" and found["remedy"].startswith("prefcache train CONFIG --dry-run")


def test_damage_is_named_with_its_remedy_and_nothing_is_taken_back(prefcache, trained, tmp_path):
    shard = next(tmp_path.glob("cache/*/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    weights = tmp_path / "runs/tiny/trained/model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    found = examined(prefcache, trained)
    assert found["scores"][0]["state"] == found["runs"][0]["state"] == "problem"
    assert shard.name in found["scores"][0]["what"] and "prefcache score" in found["scores"][0]["remedy"]
    assert str(weights.relative_to(tmp_path)) in found["runs"][0]["what"]
    assert (tmp_path / "runs/tiny/scored/manifest.json").exists()
    assert (tmp_path / "runs/tiny/trained/manifest.json").exists()


def test_data_that_changed_since_it_was_scored_is_said(prefcache, trained, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 5, start=60, mode="a")
    prefcache("prepare", trained)
    assert "changed since" in examined(prefcache, trained)["scores"][0]["what"]


def test_an_unfinished_run_says_where_it_goes_on_and_by_what_command(prefcache, trained, tmp_path):
    run = tmp_path / "runs/tiny/trained"
    (run / "manifest.json").unlink()
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    (found,) = examined(prefcache, trained)["runs"]
    assert found["what"].endswith("it resumes at step 10")
    _, *command = shlex.split(found["remedy"])
    assert "resuming from step 10" in prefcache(*command).stderr
    (found,) = examined(prefcache, trained)["runs"]
    assert found["state"] == "ok"


def test_the_command_is_for_a_run_that_gave_way_to_another_under_the_name_it_has_now(prefcache, trained, tmp_path):
    prefcache("train", trained, "--set", "train.beta=0.3")
    weights = tmp_path / "runs/tiny/trained-1/model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    damaged, whole = sorted(examined(prefcache, trained)["runs"], key=lambda found: found["state"], reverse=True)
    assert (damaged["state"], whole["state"]) == ("problem", "ok")
    prefcache(*shlex.split(damaged["remedy"])[1:])
    assert [found["state"] for found in examined(prefcache, trained)["runs"]] == ["ok", "ok"]


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
    done = prefcache("doctor", config)
    printed = done.stdout
    assert done.stderr == ""  # no progress bar for weights that are not loaded
    assert "  ok transformers (this config)" in printed and "     prefcache prepare CONFIG\n" in printed
    assert printed.endswith("no problems\n")


def explained(prefcache, *arguments) -> dict[str, dict]:
    result = json.loads(prefcache("doctor", *arguments, "--why", "--json").stdout)
    return {each["what"]: each for each in result["why"]}


def test_why_names_the_input_that_has_changed_for_each_stage(prefcache, trained, tmp_path):
    assert "No config" in prefcache("doctor", "--why", code=2).stderr
    why = explained(prefcache, trained, "--set", "out=elsewhere")
    for what, reason in [("preparation", "does not exist yet"), ("run", "holds no finished preparation")]:
        assert reason in why[what]["sentence"]
    before = contents(tmp_path)
    assert [each["fresh"] for each in explained(prefcache, trained).values()] == [True] * 4
    for setting, stale, what, stored, now in [
        ("prepare.held_out=0.5", "preparation", "config.held_out", 0.2, 0.5),
        ("score.logps=false", "scoring", "config.logps", True, False),
        ("score.dtype=bfloat16", "rows", "numerics.dtype", "float32", "bfloat16"),
        ("train.beta=0.3", "run", "rewards.beta", 0.1, 0.3),
    ]:
        why = explained(prefcache, trained, "--set", setting)[stale]
        assert not why["fresh"] and {"what": what, "stored": stored, "now": now} in [
            {key: each[key] for key in ("what", "stored", "now")} for each in why["differences"]
        ]
        assert f"{stored}" in why["sentence"] and f"(now {now})" in why["sentence"]
    printed = prefcache("doctor", trained, "--why", "--set", "train.beta=0.3").stdout
    assert "  -- run: runs/tiny/trained is out of date: loss.sigmoid.beta 0.1 (now 0.3); rewards.beta" in printed
    assert "  ok scoring: runs/tiny/scored is up to date\n" in printed
    assert contents(tmp_path) == before

    # The stages give the same reasons before they do the work.
    write_pairs(tmp_path / "pairs.jsonl", 1, start=60, mode="a")
    (changed,) = explained(prefcache, trained)["preparation"]["differences"]
    assert changed["what"] == "data.0.pairs.jsonl.xxh3_128"
    assert "runs/tiny/prepared is out of date: data.0.pairs.jsonl.xxh3_128" in prefcache("prepare", trained).stderr
    why = explained(prefcache, trained)
    assert why["rows"]["sentence"].endswith("2 of 122 sequences were never scored")
    assert "runs/tiny/scored is out of date: prepared " in prefcache("score", trained).stderr
    assert why["run"]["sentence"].startswith("runs/tiny/trained is out of date: prepared ")
