"""Moments that wait on the host give the steps of those that stay on the device, bit by bit, and come before they are needed."""

import shutil
from typing import Any

import pytest
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.model.offload import Shuttle
from prefcache.pipeline.training import offloaded_state, optimizers
from prefcache.pipeline.training.offloaded_state import OffloadedState
from tests.helpers.project import options
from tests.helpers.runs import weights

CPU = torch.device("cpu")
KINDS = [("adamw", "float32"), ("adamw", "bfloat16"), ("adamw_8bit", "bfloat16"), ("adamw_4bit", "float32")]
SHAPES = [(128, 64), (64, 128), (64,), (96, 64)]  # a vector is too small to be copied


@pytest.fixture(autouse=True)
def _torchao(torchao, monkeypatch):
    monkeypatch.syspath_prepend(torchao)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> list[str]:
    """Copy what a GPU would; return the copies in their order."""
    monkeypatch.setattr(offloaded_state, "kind_of", lambda device: "cuda")
    copies: list[str] = []
    for name in ("send", "fetch", "receive"):
        original = getattr(Shuttle, name)

        def copied(self: Shuttle, *given: Any, name: str = name, original: Any = original) -> torch.Tensor:
            copies.append(name)
            return original(self, *given)

        monkeypatch.setattr(Shuttle, name, copied)
    return copies


def started(kind: str, dtype: str, offload: tuple[str, ...]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=getattr(torch, dtype))) for shape in SHAPES]
    optimizer = optimizers.make_optimizer(parameters, Train(optimizer=kind, weights=dtype, offload=offload), CPU)
    if offload:
        OffloadedState(optimizer, CPU)
    return parameters, optimizer


def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int, learn: range) -> None:
    dice = torch.Generator().manual_seed(number)
    for i in learn:
        parameters[i].grad = torch.randn(SHAPES[i], generator=dice).to(parameters[i].dtype)
    optimizers.take_step(optimizer, 1e-2 / number, seed=number)
    optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_steps_are_the_same_bit_by_bit_and_a_resumed_state_too(kind, dtype, as_on_a_gpu, tmp_path):
    parameters, optimizer = started(kind, dtype, ())
    offloaded, host = started(kind, dtype, ("optimizer",))
    # Some parameters have no gradient in some steps.
    for number, learn in enumerate((range(3), range(4), range(1, 4), range(4)), 1):
        step(parameters, optimizer, number, learn)
        step(offloaded, host, number, learn)
        assert all(torch.equal(one, other) for one, other in zip(parameters, offloaded, strict=True))
    expected, found = optimizers.get_state(optimizer), optimizers.get_state(host)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)

    resumed, again = started(kind, dtype, ("optimizer",))
    optimizers.restore(again, found.items(), tmp_path)
    for old, new in zip(parameters, resumed, strict=True):
        new.data.copy_(old)
    for number in (5, 6):
        step(parameters, optimizer, number, range(4))
        step(resumed, again, number, range(4))
    assert all(torch.equal(one, other) for one, other in zip(parameters, resumed, strict=True))


def test_moments_come_before_they_are_needed_and_go_at_once(as_on_a_gpu):
    parameters, optimizer = started("adamw", "float32", ("optimizer",))
    # The three matrices' two moments each; there is nothing to fetch yet.
    step(parameters, optimizer, 1, range(4))
    assert as_on_a_gpu == ["send"] * 6
    as_on_a_gpu.clear()
    step(parameters, optimizer, 2, range(4))
    # Of the second step on, those of the next matrix are fetched after this one's came and before they go. The vector, which is last,
    # has none, and nothing of the next step is fetched.
    first = ["fetch"] * 2 + ["receive"] * 2
    assert as_on_a_gpu == [*first, *["fetch"] * 2, *["send"] * 2] + (["receive"] * 2 + ["fetch"] * 2 + ["send"] * 2) + (
        ["receive"] * 2 + ["send"] * 2
    )


def test_on_a_cpu_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(Shuttle, "send", lambda *_: pytest.fail("a copy on a CPU"))
    parameters, optimizer = started("adamw", "float32", ("optimizer",))
    for number in (1, 2):
        step(parameters, optimizer, number, range(4))


@pytest.mark.parametrize(
    "released", [pytest.param(False, id="ordinary", marks=pytest.mark.slow), pytest.param(True, id="released")]
)
def test_a_run_with_both_offloaded_gives_the_same_weights_and_resumes(
    prefcache, scored, tmp_path, monkeypatch, as_on_a_gpu, released
):
    monkeypatch.setattr(offloaded_state, "_LEAST_VALUES", 0)
    common = ["train.gradient_checkpointing=true", "train.samples=0", "train.checkpoint_every=5"]
    common += ["train.max_grad_norm=null", "train.release_gradients=true"] if released else []
    prefcache("train", scored, *options(*common, "train.run=plain"))
    assert as_on_a_gpu == []
    settings = options(*common, "train.offload=[activations, optimizer]")
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    assert as_on_a_gpu.count("send") > 100 and weights(run) == weights(run.with_name("plain"))
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step" in prefcache("train", scored, *settings).stderr
    assert weights(run) == weights(run.with_name("plain"))


def test_activations_wait_only_where_layers_are_recomputed():
    with pytest.raises(ValueError, match=r"layers are not recomputed\. Set gradient_checkpointing: true"):
        Train(offload=("activations",))
    assert Train.model_validate({"offload": "optimizer"}).offload == ("optimizer",)
