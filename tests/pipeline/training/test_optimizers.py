"""An optimizer's first step is AdamW's whatever its moments are kept in, and a resumed one goes on bit by bit."""

import json
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import get_scheduler

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.training import checkpoints, optimizers
from prefcache.pipeline.training.optimizers import (
    get_state,
    learning_rate,
    make_optimizer,
    refuse_missing,
    restore,
    take_step,
)
from prefcache.pipeline.training.policy import save_weights
from tests.helpers.project import options

CPU = torch.device("cpu")
KINDS = ["adamw", "adamw_8bit", "adamw_4bit"]
WEIGHTS = ["float32", "bfloat16"]
SHAPES = [(128, 64), (64,), (4, 4)]  # the first is large enough to be quantized


@pytest.fixture(autouse=True)
def _torchao(torchao, monkeypatch):
    monkeypatch.syspath_prepend(torchao)


def started(kind: str, **settings) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    dtype = getattr(torch, settings.get("weights", "float32"))
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return parameters, make_optimizer(parameters, Train(optimizer=kind, **settings), CPU)


def step(parameters, optimizer, seed: int, learnt: int = 3) -> None:
    """One step with random gradients, of the first so many parameters only."""
    dice = torch.Generator().manual_seed(seed)
    for parameter in parameters[:learnt]:
        parameter.grad = torch.randn(parameter.shape, generator=dice).to(parameter.dtype)
    take_step(optimizer, 1e-2 / seed, seed)
    optimizer.zero_grad()


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_adamws(kind):
    parameters, optimizer = started(kind, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    before = [each.detach().clone() for each in parameters]
    step(parameters, optimizer, 1)
    # Both moments, corrected for their start, are the gradient's own: g and g squared. A vector does not decay.
    dice = torch.Generator().manual_seed(1)
    for parameter, old in zip(parameters, before, strict=True):
        gradient = torch.randn(old.shape, generator=dice)
        decayed = old * (1 - 1e-2 * 0.1) if old.ndim >= 2 else old
        torch.testing.assert_close(parameter.detach(), decayed - 1e-2 * gradient / (gradient.abs() + 1e-6))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_state_takes_as_many_bytes_as_the_trial_leaves_for_it(kind, weights):
    dtype = getattr(torch, weights)
    parameters = [torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))]
    optimizer = make_optimizer(parameters, Train(optimizer=kind, weights=weights), CPU)
    step(parameters, optimizer, 1)
    n_bytes = sum(each.numel() * each.element_size() for each in get_state(optimizer).values())
    # Beside it there are the number of steps and two tables of what a code stands for.
    tables = {"adamw": 0, "adamw_8bit": 2 * 256 * 4, "adamw_4bit": 2 * 16 * 4}
    assert n_bytes == 256 * 256 * optimizers.state_bytes(kind, dtype) + 4 + tables[kind]


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_what_is_not_installed_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(optimizers, "version", missing)
    with pytest.raises(
        UsageError, match=r"needs torchao. Install it \(pip install 'prefcache\[optimizers\]'\), or take"
    ):
        refuse_missing(Train(optimizer="adamw_8bit"))
    refuse_missing(Train())


def test_a_sweep_is_told_before_its_first_run_trains(prefcache, config, tmp_path, monkeypatch):
    prefcache("prepare", config)
    prefcache("score", config)
    monkeypatch.setattr(optimizers, "version", missing)
    done = prefcache("train", config, "--sweep", "train.optimizer=adamw,adamw_8bit", code=2)
    assert "train.optimizer=adamw_8bit needs torchao" in done.stderr
    assert not (tmp_path / "runs/tiny/optimizer=adamw").exists()


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnt", [3, 2], ids=["all", "one-never-has-a-gradient"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bit_by_bit(kind, weights, learnt, tmp_path):
    parameters, optimizer = started(kind, weights=weights)
    for seed in (1, 2, 3):
        step(parameters, optimizer, seed, learnt)
    checkpoints.save(
        tmp_path,
        lambda folder: save_weights(folder, {}),
        get_state(optimizer),
        checkpoints.CheckpointState(step=3),
        1,
    )
    folder, _ = checkpoints.find_newest(tmp_path, pytest.fail)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}

    torch.manual_seed(9)  # another process has drawn other numbers
    resumed, again = started(kind, weights=weights)
    restore(again, checkpoints.read_optimizer(folder), folder)
    for old, new in zip(parameters, resumed, strict=True):
        new.data.copy_(old)
    # At last with gradients of all: what had none so far begins then.
    for seed, learns in ((4, learnt), (5, 3)):
        step(parameters, optimizer, seed, learns)
        step(resumed, again, seed, learns)
    assert all(torch.equal(old, new) for old, new in zip(parameters, resumed, strict=True))
    found, expected = get_state(again), get_state(optimizer)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert ("0.exp_avg.codes" in found) == (kind != "adamw") and "1.exp_avg" in found


@pytest.mark.parametrize("what", ["unknown", "shape", "missing", "empty"])
def test_the_state_of_another_optimizer_is_refused(tmp_path, what):
    parameters, optimizer = started("adamw")
    step(parameters, optimizer, 1)
    saved = get_state(optimizer)
    if what == "unknown":
        saved["x"] = torch.zeros(2)
    elif what == "shape":
        saved["0.exp_avg"] = torch.zeros(3)
    elif what == "missing":
        del saved["1.exp_avg_sq"]
    else:
        saved.clear()
    said = {"unknown": "'x'", "shape": "'0.exp_avg'", "missing": "lacks 1.exp_avg_sq", "empty": "is empty"}[what]
    with pytest.raises(IntegrityError, match=rf"step-1 holds the state of another optimizer.*{said}.*Delete it"):
        restore(started("adamw")[1], saved.items(), tmp_path / "step-1")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["train.optimizer=adamw_8bit"], marks=pytest.mark.slow),
        ["train.optimizer=adamw_8bit", "train.weights=bfloat16"],
    ],
)
def test_a_run_in_8_bits_resumes_with_the_same_weights(prefcache, config, tmp_path, settings):
    said = options("train.checkpoint_every=5", *settings)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, *said)
    run = tmp_path / "runs/tiny/trained"
    expected = (run / "model/model.safetensors").read_bytes()
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step 10" in prefcache("train", config, *said).stderr
    assert (run / "model/model.safetensors").read_bytes() == expected
    assert "torchao" in json.loads((run / "provenance.json").read_text())["versions"]


# -- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(
    ("warmup", "n_warmup"),
    [
        ({"warmup_ratio": 0.2}, 5),  # a fifth of 23, rounded up
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 40}, 40),  # the peak is never reached
    ],
)
def test_the_learning_rate_is_that_of_transformers_scheduler(ours, theirs, warmup, n_warmup):
    n_steps, train = 23, Train(scheduler=ours, learning_rate=3e-4, **warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(theirs, optimizer, n_warmup, n_steps)
    for at in range(1, n_steps + 1):
        assert learning_rate(at, n_steps, train) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        schedule.step()
