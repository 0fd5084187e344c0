"""How long a run is: a number of steps instead of epochs, and a warm-up in steps."""

import json
import math
import shutil

import pytest

from prefcache.pipeline.stored import artifact
from tests.helpers.project import options
from tests.helpers.runs import batches_of, metrics


def test_a_number_of_steps_ends_the_run_and_the_schedule_in_the_order_of_the_epochs(prefcache, scored, tmp_path):
    prefcache("train", scored, *options("train.epochs=2", "train.run=epochs"))
    n_whole = len(metrics(tmp_path / "runs/tiny/epochs")) - 1
    n = n_whole - 1  # within the second epoch
    # The epochs of the config are replaced.
    prefcache("train", scored, *options(f"train.max_steps={n}", "train.epochs=0.1", "train.run=steps"))
    epochs, steps = (batches_of(tmp_path / f"runs/tiny/{run}") for run in ("epochs", "steps"))
    assert len(steps) == n and n % (n_whole // 2) and steps == {step: epochs[step] for step in range(1, n + 1)}
    # Cosine, after a warm-up of a tenth of the steps, rounded up.
    warmup = math.ceil(0.1 * n)
    expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * (n - 1 - warmup) / (n - warmup)))
    assert metrics(tmp_path / "runs/tiny/steps")[-1]["learning_rate"] == pytest.approx(expected)
    # Other epochs are the same run.
    said = prefcache("train", scored, *options(f"train.max_steps={n}", "train.epochs=3", "train.run=steps")).stderr
    assert "nothing to do" in said


def test_a_run_of_some_steps_resumes_with_the_same_bytes(prefcache, scored, tmp_path):
    length = options(
        "train.max_steps=11", "train.warmup_steps=4", "train.checkpoint_every=3", "train.keep_checkpoints=9"
    )
    prefcache("train", scored, *length)
    run = tmp_path / "runs/tiny/trained"
    expected, rates = (run / "model/model.safetensors").read_bytes(), [row["learning_rate"] for row in metrics(run)[1:]]
    # Four steps of warm-up: none of the rate at the first, then a quarter more each.
    assert rates[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3]) and len(rates) == 11
    (run / artifact.MANIFEST).unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step 9" in prefcache("train", scored, *length).stderr
    assert (run / "model/model.safetensors").read_bytes() == expected


def test_a_dry_run_plans_the_number_of_steps(prefcache, prepared):
    found = json.loads(prefcache("train", prepared, "--dry-run", "--json", *options("train.max_steps=3")).stdout)
    assert found["steps"] == 3


def test_a_warm_up_beyond_the_last_step_says_how_far_the_rate_rises(prefcache, scored):
    said = prefcache("train", scored, *options("train.max_steps=3", "train.warmup_steps=8")).stderr
    # The third step has the rate after two of eight.
    assert "train.warmup_steps is 8 and the run has 3 steps: the learning rate rises to 0.00025 only" in said
