"""Interrupted at any moment, training goes on from its last whole checkpoint and ends with the same bytes."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline.training import checkpoints
from tests.helpers.project import default_signals, write_config
from tests.helpers.runs import table, write_turned_pairs

# The loss remembers a running mean, and checkpoints fall between evaluations, of which the best gets one as well.
SETTINGS = {
    "loss": "bco",
    "epochs": 6,
    "learning_rate": 3e-3,
    "eval_every": 2,
    "best": {"metric": "eval_loss"},
    "checkpoint_every": 3,
    "samples": 2,
}


@pytest.fixture
def scored(prefcache, model, tmp_path) -> Path:
    write_turned_pairs(tmp_path / "pairs.jsonl")
    config = write_config(tmp_path, model, **SETTINGS)
    for stage in ("prepare", "score"):
        prefcache(stage, config, "--set", "prepare.examples=labels")
    return config


@pytest.fixture
def start(scored, tmp_path) -> Callable[[], ForkServerProcess]:
    """The command as a process of its own. One that is there once has done its imports, which take longer than training."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["prefcache.cli", "prefcache.commands.train", "prefcache.pipeline.training.train_loop", __name__]
    )

    def run() -> ForkServerProcess:
        process = processes.Process(target=train, args=(scored, tmp_path))
        process.start()
        return process

    return run


def train(config: Path, folder: Path) -> None:
    from prefcache import interrupts
    from prefcache.cli import main

    default_signals()
    interrupts.install()
    os.chdir(folder)
    sys.stderr = open(folder / "said", "w", buffering=1)
    main(["train", str(config)])


def wait(process: ForkServerProcess, until: Callable[[], bool]) -> None:
    while process.is_alive() and not until():
        time.sleep(0.0002)


def trains(root: Path) -> bool:
    """Whether the next that the process does is a step."""
    said = (root / "said").read_text() if (root / "said").exists() else ""
    return "start checked" in said or "resuming from step" in said


def last_step(run: Path) -> int:
    """Of the checkpoints that are there."""
    return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*.tmp"))


def contents(run: Path) -> dict[str, bytes]:
    """What a run has computed, byte for byte. How long its steps took is no part of that."""
    folders = ("model", "metrics", "steps", "events", "checkpoints", "samples.parquet", "before.json")
    files = (path for name in folders for path in [run / name, *(run / name).rglob("*")] if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize("n_kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_with_the_same_bytes(prefcache, scored, start, tmp_path, n_kills):
    prefcache("train", scored, "--set", "train.run=whole")
    run, whole, dice = tmp_path / "runs/tiny/trained", tmp_path / "runs/tiny/whole", random.Random(0)
    a_step = float(np.median([row["seconds"] for row in table(whole, "throughput")]))
    reached, n_half_written = [], 0
    for kill in range(n_kills):
        (tmp_path / "said").unlink(missing_ok=True)
        goal, process = last_step(run) + dice.randrange(6), start()
        wait(process, lambda goal=goal: trains(tmp_path) and last_step(run) >= goal)
        if kill % 2:
            time.sleep(dice.uniform(0, 4 * a_step))
        else:
            wait(process, lambda: bool(half_written(run)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        n_half_written += bool(half_written(run))
        found = checkpoints.find_newest(run, pytest.fail)  # none is damaged
        reached.append(found[1].step if found else 0)
    assert reached == sorted(reached) and len(set(reached)) > n_kills / 2
    assert sum(step > 0 for step in reached) > n_kills / 2 and n_half_written > n_kills / 4
    assert "resuming from step" in prefcache("train", scored).stderr
    assert contents(run) == contents(whole)
    # The best one is among its checkpoints only because it is the best.
    assert len(list((run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_interrupted_it_ends_with_exit_code_130_and_goes_on_later(prefcache, scored, start, tmp_path, number):
    process = start()
    wait(process, lambda: last_step(tmp_path / "runs/tiny/trained") > 0)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130 and "run the same command to resume" in (tmp_path / "said").read_text()
    assert "resuming from step" in prefcache("train", scored).stderr
