"""What a loss takes over a batch does not depend on how memory and processes cut it, and its gradient is the exact one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefcache.pipeline.training.losses import LOSSES
from tests.helpers.processes import launch
from tests.helpers.project import pair, write_config
from tests.helpers.runs import metrics

COUPLED = [name for name, loss in LOSSES.items() if loss.statistics or loss.over_batch]
# sft beside another loss, whose parts come from one pass.
MIXED = {"mixed": {"aot_unpaired": 0.5, "kto_pair": 1.0, "sft": 0.25}}
STEPS = 10
Weights = dict[str, torch.Tensor]
TRAIN = {"batch_size": 8, "learning_rate": 1e-3, "samples": 0, "epochs": 10 / 6, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model) -> Path:
    """48 graded pairs, prepared and scored as pairs and as labels."""
    from click.testing import CliRunner

    from prefcache.cli import main

    folder = tmp_path_factory.mktemp("scope")
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(48):
            file.write(json.dumps(pair(i) | {"chosen_score": 3.0 + i % 4, "rejected_score": 1.0 + i % 2}) + "\n")
    config = write_config(folder, model, **TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in ("pairs", "labels"):
            for stage in ("prepare", "score"):
                result = CliRunner().invoke(main, [stage, str(config), *settings(kind)])
                assert result.exit_code == 0, result.stderr
    return folder


def settings(kind: str) -> list[str]:
    said = [f"out=runs/{kind}", f"prepare.examples={kind}", "prepare.held_out=0", "cache=cache", "train.device=cpu"]
    return [word for each in said for word in ("--set", each)]


def kind_of(name: str) -> str:
    return "pairs" if name in MIXED else LOSSES[name].kind


def loss_of(name: str) -> str:
    return json.dumps(MIXED.get(name, name))


def arguments(name: str, run: str, *more: str) -> list[str]:
    # 96 labels make 12 steps an epoch, 48 pairs 6.
    epochs = STEPS / (6 if kind_of(name) == "pairs" else 12)
    said = [f"train.loss={loss_of(name)}", f"train.run={run}-{name}", f"train.epochs={epochs}", *more]
    # Strong enough that what a batch has in common matters.
    said += ["train.beta=1"] if name in MIXED or "beta" in LOSSES[name].hyperparameters else []
    return ["train", "config.yaml", *settings(kind_of(name)), *(word for each in said for word in ("--set", each))]


@pytest.fixture(scope="module")
def two_processes(experiment) -> Path:
    """All of them, in one start of two processes."""
    launch(experiment, *(arguments(name, "two") for name in [*COUPLED, *MIXED]), seconds=500)
    return experiment


def trained(folder: Path, name: str, run: str) -> Weights:
    return load_file(folder / "runs" / kind_of(name) / f"{run}-{name}" / "model/model.safetensors")


def train(prefcache, monkeypatch, folder: Path, name: str, run: str, *more: str) -> Weights:
    monkeypatch.chdir(folder)
    prefcache(*arguments(name, run, *more))
    return trained(folder, name, run)


@pytest.mark.parametrize("name", [*COUPLED, *MIXED])
def test_one_process_two_and_single_micro_batches_give_the_same_parameters(
    prefcache, monkeypatch, two_processes, model, name
):
    whole = train(prefcache, monkeypatch, two_processes, name, "whole")
    single = train(prefcache, monkeypatch, two_processes, name, "single", "train.micro_batch_size=1")
    two = trained(two_processes, name, "two")
    start = load_file(model / "model.safetensors")
    # Adam turns the rounding of a gradient that is nearly 0 into a step; so by the whole way, not by its worst parameter.
    assert apart(single, whole, start) < 3e-4
    assert apart(two, whole, start) < 3e-4


def apart(one: Weights, other: Weights, start: Weights) -> float:
    """How far two ends lie apart, as a share of the way to them."""
    way = sum(float((other[key] - start[key]).square().sum()) for key in start)
    assert way > 1e-3, "nothing was learned"
    return (sum(float((one[key] - other[key]).square().sum()) for key in start) / way) ** 0.5


@pytest.mark.parametrize("name", ["kto", "aot"])
def test_scope_micro_takes_each_micro_batch_for_the_batch(prefcache, monkeypatch, experiment, model, name):
    micro = ["train.scope=micro", "train.micro_batch_size=2"]
    whole = train(prefcache, monkeypatch, experiment, name, "batch")
    cut = train(prefcache, monkeypatch, experiment, name, "micro", *micro)
    one = train(prefcache, monkeypatch, experiment, name, "one", "train.scope=micro", "train.micro_batch_size=8")
    assert apart(cut, whole, load_file(model / "model.safetensors")) > 1e-2
    assert all(torch.equal(whole[key], one[key]) for key in whole)


def test_scope_micro_takes_micro_batches_of_its_size_whatever_room_they_take(prefcache, monkeypatch, experiment, model):
    micro = ["train.scope=micro", "train.micro_batch_size=4"]
    wide = train(prefcache, monkeypatch, experiment, "kto_pair", "wide", *micro)
    narrow = train(prefcache, monkeypatch, experiment, "kto_pair", "narrow", *micro, "train.tokens_per_micro_batch=1")
    assert apart(narrow, wide, load_file(model / "model.safetensors")) < 3e-4


def test_scope_micro_without_a_size_is_refused(prefcache, monkeypatch, experiment):
    monkeypatch.chdir(experiment)
    refused = prefcache(*arguments("kto", "sizeless", "train.scope=micro"), code=2)
    assert "set train.micro_batch_size" in refused.stderr


def test_a_killed_run_of_bco_remembers_its_delta(prefcache, monkeypatch, experiment):
    """The mean of all rewards so far is in the checkpoint: a run cut at step 5 and one that was not are the same."""
    from prefcache.pipeline.training import run_log

    every = "train.checkpoint_every=5"
    whole = train(prefcache, monkeypatch, experiment, "bco", "uncut", every)
    log = run_log.RunLog.add_metrics

    def dies_at_7(self, row):
        if row["step"] == 7:
            raise KeyboardInterrupt
        log(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log.RunLog, "add_metrics", dies_at_7)
        monkeypatch.chdir(experiment)
        prefcache(*arguments("bco", "cut", every), code=130)
    again = train(prefcache, monkeypatch, experiment, "bco", "cut", every)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    runs = (experiment / "runs/labels" / f"{run}-bco" for run in ("uncut", "cut"))
    uncut, cut = ([row["delta"] for row in metrics(run)] for run in runs)
    assert uncut == cut and len(set(uncut)) > 5
