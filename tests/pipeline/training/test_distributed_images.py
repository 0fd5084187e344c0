"""With pictures, too, the result of several processes is that of one: also where one of them has none in a micro-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import vision_data, vision_models
from tests.helpers.project import ROOT, invoke, options
from tests.helpers.runs import metrics

# Micro-batches of one: of four prompts one has no picture, so that a process often computes no tower while the other does.
SETTINGS = ["train.micro_batch_size=1", "train.batch_size=5", "train.device=cpu", "train.warmup_steps=0"]
SETTINGS += ["train.epochs=2", "train.learning_rate=1e-3", "train.samples=1"]
RUNS = {
    "frozen": ["train.vision=frozen"],
    "trained": ["train.vision=trained", "train.weight_decay=0.1"],
    "recomputed": ["train.vision=trained", "train.gradient_checkpointing=true"],
    "padded": ["train.vision=trained", "train.rows=padded"],
}
SHARING = {"copies": "train.shard=none", "shards": "train.shard=fsdp"}
JOBS = [("copies", "frozen"), ("shards", "trained")]
MORE_JOBS = [
    ("copies", "trained"),
    ("copies", "padded"),
    ("shards", "frozen"),
    ("shards", "recomputed"),
]  # in slow runs
# SigLIP has a pooling head, which nothing reads: a parameter without a gradient.
FAMILY = "gemma3"


def command(run: str, name: str, *more: str) -> list[str]:
    return ["train", "config.yaml", *options(f"train.run={run}", *SETTINGS, *RUNS[name], *more)]


def in_each_process() -> None:
    from prefcache.cli import main

    for each in json.loads(Path("jobs.json").read_text()):
        main(each, standalone_mode=False)
    refused = command("refused", "padded", SHARING["shards"])
    with pytest.raises(click.ClickException, match=r"takes a forward of its own, .* train.shard=none"):
        main(refused, standalone_mode=False)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    folder = vision_data.write_project(tmp_path_factory.mktemp("devices"), vision_models.save(FAMILY))
    invoke(folder, "score", "config.yaml", *options("score.parity_sample=2"))
    return folder


@pytest.fixture(scope="module")
def trained(scored) -> Path:
    return train_both_ways(scored, JOBS)


@pytest.fixture(scope="module")
def trained_with_more_settings(scored) -> Path:
    return train_both_ways(scored, MORE_JOBS)


def train_both_ways(folder: Path, jobs: list[tuple[str, str]]) -> Path:
    """Train in two processes, and then in one; return the folder of the runs."""
    commands = [command(f"{how}-{name}", name, SHARING[how]) for how, name in jobs]
    (folder / "jobs.json").write_text(json.dumps(commands))
    # First by two processes, which also share the pictures among them.
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", __name__],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for name in {name for _, name in jobs}:
        invoke(folder, *command(f"one-{name}", name))
    return folder / "runs/tiny"


@pytest.mark.parametrize(("how", "name"), JOBS)
def test_two_processes_train_as_one_does(trained, name, how):
    assert_same(trained / f"{how}-{name}", trained / f"one-{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "name"), MORE_JOBS)
def test_two_processes_train_as_one_does_with_more_settings(trained_with_more_settings, name, how):
    folder = trained_with_more_settings
    assert_same(folder / f"{how}-{name}", folder / f"one-{name}")


def assert_same(two: Path, one: Path) -> None:
    ours, theirs = ([row["loss"] for row in metrics(run)] for run in (one, two))
    assert theirs == pytest.approx(ours, abs=2e-4) and len({*ours}) > 2
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    far = {key for key in ours if not torch.allclose(ours[key], theirs[key], atol=2e-3)}
    assert not far


if __name__ == "__main__":
    in_each_process()
