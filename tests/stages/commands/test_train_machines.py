"""train on machines that share nothing but an object store."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.project import PREFCACHE, Done, invoke, options
from tests.helpers.separate_machines import Machine, finish, make_machine
from tests.helpers.stores import use_environment

TRAIN = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "samples": 0, "checkpoints_at_end": "keep"}


@pytest.fixture
def url(prefcache: Callable[..., Done], prepared: Path, s3) -> str:
    """Prepared data in a store with its scores."""
    prefcache("score", prepared, "--set", f"cache={s3.url}")
    return prefcache("upload", prepared, "--set", f"cache={s3.url}").stdout.splitlines()[-1]


def test_a_machine_that_has_only_the_store_scores_nothing_and_trains_the_same(
    prefcache, prepared, url, s3, tmp_path, monkeypatch
):
    settings = ["--set", f"cache={s3.url}", "--set", "train.epochs=1"]
    prefcache("train", prepared, *settings)
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(prepared, there)
    use_environment(s3.environment_of(s3.server.url, there / "mirror"), monkeypatch)
    invoke(there, "download", url, "--out", "runs/tiny")
    assert json.loads(invoke(there, "score", "config.yaml", *settings, "--json").stdout)["scored"] == 0
    assert "warning" not in invoke(there, "train", "config.yaml", *settings).stderr
    here, runs = tmp_path / "runs/tiny/trained", there / "runs/tiny/trained"
    assert (here / "model/model.safetensors").read_bytes() == (runs / "model/model.safetensors").read_bytes()


# -- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def machines(prefcache, url, model, s3, tmp_path) -> list[Machine]:
    """Two machines that have fetched the data, and know its scores."""
    machines = [make_machine(tmp_path / name, model, s3.environment) for name in ("a", "b")]
    for machine in machines:
        machine.write_config(s3.url, train=TRAIN)
        invoke(machine.work, "download", url, "--out", "runs/tiny")
    for scoring in [machine.start(PREFCACHE, "score", "config.yaml") for machine in machines]:
        finish(scoring)
    return machines


def train(machines: list[Machine], *settings: str, code: int = 0) -> list[Done]:
    """Train in a process on each of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    training = [
        machine.start(PREFCACHE, "train", "config.yaml", *options(*settings), **launch, RANK=str(rank))
        for rank, machine in enumerate(machines)
    ]
    return [finish(process, code) for process in training]


@pytest.mark.slow  # seven starts of two processes
def test_processes_with_nothing_in_common_but_the_store_train_as_one_does(prefcache, prepared, machines, s3):
    first, _ = train(machines)
    assert "has another folder runs/tiny/trained; the run is written on" in first.stderr
    a, b = (machine.work / "runs/tiny/trained" for machine in machines)
    assert (a / "model/model.safetensors").exists() and not b.exists()
    # As one process does on one machine, but for the order of sums.
    machines[0].run("train", "config.yaml", "--set", "train.run=alone")
    alone, two = (load_file(each / "model/model.safetensors") for each in (a.parent / "alone", a))
    assert all(torch.allclose(alone[name], two[name], atol=1e-5) for name in alone)

    # A finished run is finished for both, although one of them cannot see it.
    assert "nothing to do" in train(machines)[0].stderr

    # To go on, both need the run's folder.
    (a / "manifest.json").unlink()
    for done in train(machines, "train.epochs=2", code=2):
        assert "holds an unfinished run" in done.stderr
    for done in train(machines, code=2):
        assert "Process 1 on" in done.stderr and "does not have the state of the run" in done.stderr
    shutil.copytree(a, b)
    first, _ = train(machines)
    assert "resuming from step" in first.stderr


@pytest.mark.slow
def test_processes_that_would_train_on_something_else_are_refused(machines, tmp_path):
    machines[1].run("score", "config.yaml", "--set", "score.accept_numerics=[n123]")
    for done in train(machines, code=2):
        assert "Process 1 on" in done.stderr and "would train on something else" in done.stderr
    for done in train(machines, "train.best.metric=loss", "train.eval_every=3", code=2):
        assert "every process reads checkpoints from it" in done.stderr
