"""train.report_to: TensorBoard has what the Parquet files have, each step once, whatever interrupted the run."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.project import write_config, write_pairs
from tests.helpers.runs import metrics, weights

REPORT = ["--set", "train.report_to=tensorboard"]


@pytest.fixture
def scored(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    config = write_config(tmp_path, model, epochs=2, samples=0, eval_every=2, checkpoint_every=3)
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    return config


def in_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def in_parquet(run: Path) -> dict[str, list[tuple[int, float]]]:
    rows = metrics(run)
    return {
        name: said
        for name in rows[0]
        if name != "step" and (said := [(row["step"], row[name]) for row in rows if row[name] is not None])
    }


def compare(run: Path) -> None:
    theirs, ours = in_tensorboard(run), in_parquet(run)
    assert theirs.keys() == ours.keys() >= {"loss", "rewards/margins", "eval_rewards/accuracies", "grad_norm"}
    for name, values in ours.items():
        # They are float32 there.
        assert [step for step, _ in theirs[name]] == [step for step, _ in values]
        assert [value for _, value in theirs[name]] == pytest.approx([value for _, value in values], rel=1e-6)


def test_tensorboard_has_every_metric_and_setting_and_each_step_once_after_an_interruption(prefcache, scored, tmp_path):
    prefcache("train", scored, *REPORT)
    run = tmp_path / "runs/tiny/trained"
    compare(run)
    (settings,) = (run / "tensorboard").rglob("hparams.yml")
    said = settings.read_text()
    assert "train.learning_rate: 0.001" in said and "prepare.held_out: 0.2" in said
    # As if it was killed with steps after its last checkpoint in TensorBoard's files, and with lost ones before.
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    events = next((run / "tensorboard").glob("events.*"))
    events.write_bytes(events.read_bytes()[:-200])
    assert "resuming from step" in prefcache("train", scored, *REPORT).stderr
    compare(run)


def test_where_metrics_go_changes_nothing_else(prefcache, scored, tmp_path):
    prefcache("train", scored)
    expected = weights(tmp_path / "runs/tiny/trained")
    assert "nothing to do" in prefcache("train", scored, *REPORT).stderr
    prefcache("train", scored, *REPORT, "--set", "train.run=reported")
    assert weights(tmp_path / "runs/tiny/reported") == expected
    assert not (tmp_path / "runs/tiny/trained/tensorboard").exists()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="it is installed")
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(prefcache, scored, tmp_path):
    done = prefcache("train", scored, "--set", "train.report_to=[tensorboard, trackio]", code=2)
    assert "trackio is not installed. Install it (pip install trackio)" in done.stderr
    assert not (tmp_path / "runs/tiny/trained").exists()
    done = prefcache("train", scored, "--set", "train.report_to=wndb", code=2)
    assert "expected 'tensorboard', 'wandb' or 'trackio'" in json.dumps(done.stderr).replace(
        "Input should be", "expected"
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_an_interrupted_run_as_one(prefcache, scored, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ["--set", "train.report_to=wandb"]
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    prefcache("train", scored, *settings)
    names = {path.stem for path in run.rglob("run-*.wandb")}
    assert len(names) == 1, names  # its id
