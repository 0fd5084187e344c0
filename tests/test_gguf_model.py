"""A config whose model is a GGUF file, through every command that a user would type."""

import json
from pathlib import Path

from tests.helpers.gguf import write_gguf
from tests.helpers.project import options, write_config, write_pairs
from tests.helpers.runs import metrics


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_gguf_file_is_trained_as_the_folder_that_it_was_made_from(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 24)
    write_gguf(model, tmp_path / "tiny.gguf")
    config = write_config(tmp_path, Path("tiny.gguf"), epochs=1, samples=1)
    before = files(tmp_path)
    assert "why" in prefcache("preview", config).stdout
    doctor = json.loads(prefcache("doctor", config, "--json").stdout)
    (state,) = [each for each in doctor["findings"] if "is not converted yet" in each["what"]]
    assert state["state"] == "absent" and state["remedy"] == "prefcache prepare CONFIG"
    assert not [each for each in doctor["findings"] if each["state"] == "problem"]
    assert files(tmp_path) == before

    prepared = prefcache("prepare", config)
    assert "tiny.gguf is converted once, into float32 safetensors in cache/.gguf/tiny-" in prepared.stderr
    assert "tiny.gguf" in (tmp_path / "runs/tiny/prepared/inputs.mk").read_text()  # make notices another file
    before = files(tmp_path)
    assert "to score" in prefcache("score", config, "--dry-run").stdout
    assert files(tmp_path) == before
    for stage in ("score", "train"):
        assert "converted" not in prefcache(stage, config).stderr

    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, *options(f"model={model}", "out=runs/folder", "cache=cache-folder"))
    losses = [[row["loss"] for row in metrics(tmp_path / f"runs/{out}/trained")] for out in ("tiny", "folder")]
    assert losses[0] == losses[1]
    assert all(each["fresh"] for each in json.loads(prefcache("doctor", config, "--why", "--json").stdout)["why"])


def test_a_dry_run_with_another_cache_says_what_to_run_first(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 8)
    write_gguf(model, tmp_path / "tiny.gguf")
    config = write_config(tmp_path, Path("tiny.gguf"))
    prefcache("prepare", config)
    done = prefcache("score", config, "--dry-run", "--set", "cache=elsewhere", code=2)
    assert "tiny.gguf has not been converted yet" in done.stderr and not (tmp_path / "elsewhere").exists()
    # The stage itself converts it there.
    assert (
        "into float32 safetensors in elsewhere/.gguf/tiny-"
        in prefcache("score", config, "--set", "cache=elsewhere").stderr
    )


def test_the_policy_may_start_from_a_gguf_file_and_an_adapter_on_it_be_merged(prefcache, scored, other_model, tmp_path):
    write_gguf(other_model, tmp_path / "start.gguf")
    settings = options("train.model=start.gguf", "train.epochs=0.5", "train.lora={}", "train.samples=0")
    done = prefcache("train", scored, *settings)
    assert "start.gguf is converted once" in done.stderr
    prefcache("merge", tmp_path / "runs/tiny/trained/model")
