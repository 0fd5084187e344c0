"""train --dry-run: what a run would take, from the prepared data and a config.json alone."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from prefcache import row_layout
from prefcache.pipeline import config_file
from tests.helpers.project import invoke, options, write_config, write_pairs
from tests.helpers.shapes import LLAMA_8B, PARAMETERS, QWEN_7B, write_shape


def contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def dry_run(folder: Path, *arguments: str) -> dict:
    return json.loads(invoke(folder, "train", "config.yaml", "--dry-run", "--json", *arguments).stdout)


@pytest.fixture(scope="module")
def planned(scored_once) -> dict:
    before = contents(scored_once)
    found = dry_run(scored_once)
    assert contents(scored_once) == before
    return found


def test_it_says_what_the_run_takes(planned):
    assert planned["dry_run"] and planned["kind"] == "pairs" and planned["loss"] == "sigmoid"
    assert planned["parameters"] == planned["trained_parameters"] > 0
    assert sum(planned["memory"].values()) == planned["peak_bytes"]
    assert [fit["memory_bytes"] for fit in planned["fits"]] == [size * 10**9 for size in (24, 40, 80, 141, 192)]
    assert {fit["tokens"] for fit in planned["fits"]} == {planned["most_tokens"]}  # a tiny model fits everywhere
    assert planned["duration"] is None


def test_every_suggestion_can_be_set_and_adds_to_the_one_before(planned, scored_once):
    adapter, *ladder, shards = planned["savings"]
    for saving in planned["savings"]:
        with contextlib.chdir(scored_once):
            assert config_file.load("config.yaml", saving["settings"]).train
    assert [saving["settings"] for saving in (adapter, shards)] == [saving["added"] for saving in (adapter, shards)]
    for before, after in itertools.pairwise(ladder):
        assert after["settings"] == [*before["settings"], *after["added"]]
    assert shards["processes"] == 8 and "train.shard=fsdp" in shards["settings"]


def test_a_person_can_read_it_at_80_columns(scored_once, monkeypatch):
    monkeypatch.setattr(row_layout, "PIPE_WIDTH", 80)
    settings = options("train.gradient_checkpointing=true", "train.weights=bfloat16", "train.shard=fsdp")
    text = invoke(scored_once, "train", "config.yaml", "--dry-run", *settings).stdout
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80  # but for the model's folder
    assert "name a GPU, as in --gpu H100" in text and "32,768 or more" in text
    # What the run has is not suggested, but for an adapter, which has other weights.
    assert "train.weights=float32" in text and "train.weights=bfloat16" not in text
    assert text.count("train.gradient_checkpointing=true") == 1
    assert "adamw_8bit" not in text  # its moments are not sharded


def test_an_adapter_a_gpu_and_processes(scored_once):
    found = dry_run(scored_once, "--gpu", "h100", "--processes", "2", *options("train.lora.r=4"))
    # Two factors for each of seven layers: 32 -> 32 twice, 32 -> 16 twice, 32 -> 64 twice and 64 -> 32; in 2 layers.
    assert found["trained_parameters"] == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    times = found["duration"]
    assert times["gpu"] == "H100" and 0 < times["at_least_seconds"] <= times["seconds"] and times["mfu"] <= 0.4
    total = found["flops"] + sum(found["flops_without_gradients"].values())
    assert times["seconds"] == pytest.approx(total / (times["mfu"] * 2 * 989e12))
    assert "the traffic between processes takes time that is not counted" in found["notes"]
    # Nothing but settings of an adapter is suggested.
    added = [saving["added"] for saving in found["savings"]]
    assert added == [["train.gradient_checkpointing=true"], ["train.lora.base_dtype=bfloat16"]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "H100"], "--gpu needs --dry-run"),
        (["--processes", "2"], "--processes needs --dry-run"),
        (["--dry-run", "--gpu", "Z9"], "--gpu Z9: its rates are not known. Known are B200"),
        (["--dry-run", "--sweep", "train.beta=1,2"], "Leave --sweep out"),
        (["--dry-run", "--set", "train.loss=kto"], "holds pairs, not labelled answers"),
        (["--dry-run", "--set", "model=org/absent"], "could not be downloaded from the hub"),
        (["--dry-run", "--set", "out=elsewhere"], "Prepare first"),
    ],
)
def test_what_it_cannot_say_is_refused_with_a_remedy(prefcache, prepared, arguments, complaint):
    assert complaint in prefcache("train", prepared, *arguments, code=2).stderr


def test_a_model_without_config_is_refused(prefcache, prepared, model, tmp_path):
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    done = prefcache("train", prepared, "--dry-run", *options("train.model=bare"), code=2)
    assert "bare has no config.json" in done.stderr


# -- real sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B], ids=["llama", "qwen"])
def test_an_8b_model_is_prepared_and_estimated_without_weights(model, tmp_path, shape):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    config = write_config(tmp_path, write_shape(tmp_path / "shape", shape, model))
    invoke(tmp_path, "prepare", config)
    settings = options("train.gradient_checkpointing=true")
    found = json.loads(invoke(tmp_path, "train", config, "--dry-run", "--json", "--gpu", "H100", *settings).stdout)
    n = PARAMETERS[shape["model_type"]]
    assert found["parameters"] == n
    # So few tokens take next to nothing: 4 bytes a parameter for weights and gradients, 8 for two moments.
    held = {name: found["memory"][name] for name in ("weights", "gradients", "optimizer")}
    assert held == pytest.approx({"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}, rel=0.001)
    assert found["peak_bytes"] == pytest.approx(16 * n, rel=0.01)
    fits = {fit["memory_bytes"] // 10**9: fit["tokens"] for fit in found["fits"]}
    assert fits[24] == fits[40] == fits[80] == 0 < fits[141] <= fits[192]
    adapter, weights, moments, released, shards = found["savings"]
    assert 2 * n < adapter["peak_bytes"] < 2.6 * n  # and the head in float32
    assert weights["peak_bytes"] == pytest.approx(8 * n, rel=0.03)  # 2 for weights and gradients, 4 for moments
    assert moments["peak_bytes"] == pytest.approx((2 + 2 + 2 * (1 + 4 / 256)) * n, rel=0.03)
    assert released["peak_bytes"] < moments["peak_bytes"] - 1.5 * n  # of the 2 bytes a parameter that gradients took
    assert shards["processes"] == 8 and n < shards["peak_bytes"] < 4 * n
    assert [saving["fits_gb"] for saving in found["savings"]] == [24, 80, 80, 40, 24]
