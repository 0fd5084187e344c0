"""Weights in bf16 move as far as float32 ones would, on average, at rates at which rounding to the nearest loses the step."""

import shutil

import pytest
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.training import bf16_adamw, optimizers
from prefcache.pipeline.training.optimizers import make_optimizer, take_step

CPU = torch.device("cpu")
KINDS = ["adamw", "adamw_8bit", "adamw_4bit"]


@pytest.fixture(autouse=True)
def _torchao(torchao, monkeypatch):
    monkeypatch.syspath_prepend(torchao)


def bf16(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.bfloat16())


def optimizer_of(parameters: list[torch.nn.Parameter], kind: str = "adamw", **settings) -> torch.optim.Optimizer:
    return make_optimizer(parameters, Train(weights="bfloat16", optimizer=kind, **settings), CPU)


def mean_move(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, rate: float, steps: int) -> float:
    """How far the weights move on average, under a gradient of 1."""
    before = weight.detach().double()
    weight.grad = torch.ones_like(weight)
    for seed in range(steps):
        take_step(optimizer, rate, seed)
    return float((before - weight.detach().double()).mean())


def weights_of_a_layer() -> torch.nn.Parameter:
    torch.manual_seed(0)
    return bf16(0.02 * torch.randn(128, 1024))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_dpo_move_weights_as_far_as_they_should(kind):
    # 20 steps of 5e-7 under a constant gradient are 1.0e-5.
    weight = weights_of_a_layer()
    assert mean_move(optimizer_of([weight], kind), weight, 5e-7, 20) == pytest.approx(1e-5, rel=0.05)


def test_rounded_to_the_nearest_they_hardly_move():
    weight = weights_of_a_layer()
    assert mean_move(torch.optim.AdamW([weight], weight_decay=0), weight, 5e-7, 20) < 2e-7


def test_steps_are_adamws_but_for_rounding():
    """Against AdamW on float32 weights: each weight within the roundings of its steps, their mean much nearer."""
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torch.manual_seed(0)
    weight = bf16(1 + torch.rand(300, 300) / 2)
    plain = torch.nn.Parameter(weight.detach().float())
    ours, theirs = optimizer_of([weight], **settings), torch.optim.AdamW([plain], **settings)
    for step in range(1, 6):
        weight.grad = torch.randn(weight.shape).bfloat16()
        plain.grad = weight.grad.float()
        take_step(ours, 1e-2 / step, step)
        take_step(theirs, 1e-2 / step, step)
    gap = weight.detach().double() - plain.detach().double()
    # Between 1 and 2 a rounding is off by less than 2^-7; the mean of 90,000 deviates by a thousandth of that.
    assert gap.abs().max() < 5 * 2**-7 and abs(gap.mean()) < 1e-4
    moved = float((plain.detach() - 1.25).double().mean())
    assert abs(moved) > 20 * abs(gap.mean())


def test_the_second_moment_shrinks_when_gradients_do():
    weight = bf16(torch.ones(16, 1024))
    optimizer = optimizer_of([weight])
    state = optimizer.state[weight]
    for step in range(700):
        weight.grad = torch.full_like(weight, 1.0 if step < 200 else 0.0)
        take_step(optimizer, 1e-6, step)
    # 1 - 0.999^200, and then 500 times 0.999 of it; to the nearest, every product with 0.999 is the number itself.
    expected = (1 - 0.999**200) * 0.999**500
    assert float(state["exp_avg_sq"].double().mean()) == pytest.approx(expected, rel=0.01)
    assert state["exp_avg_sq"].dtype == torch.bfloat16
    stuck = torch.tensor(1 - 0.999**200).bfloat16()
    assert stuck * 0.999 == stuck


def test_the_steps_follow_from_the_seed_and_not_from_the_size_of_chunks_or_the_generator(monkeypatch):
    found = []
    for chunk, drawn in ((1 << 16, 0), (1000, 5)):
        monkeypatch.setattr(bf16_adamw, "_CPU_CHUNK", chunk)
        weight = weights_of_a_layer()
        torch.manual_seed(drawn)
        mean_move(optimizer_of([weight]), weight, 1e-4, 3)
        found.append(weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_rounds_otherwise_and_the_global_generator_is_left_alone(kind):
    found, torch_state = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        weight = bf16(torch.ones(128, 64))
        weight.grad = torch.ones_like(weight)
        take_step(optimizer_of([weight], kind), 1e-3, seed)
        found.append(weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_parameter_kept_in_float32_is_not_rounded():
    router, plain = torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(8, 8))
    ours, theirs = optimizer_of([router]), torch.optim.AdamW([plain], weight_decay=0)
    for step in range(3):
        router.grad = torch.full_like(router, 2.0 + step)
        plain.grad = router.grad.clone()
        take_step(ours, 1e-5, step)
        take_step(theirs, 1e-5, step)
    torch.testing.assert_close(router, plain, rtol=1e-7, atol=0)
    assert {value.dtype for value in ours.state[router].values()} == {torch.float32}


def test_a_weight_that_is_not_contiguous_is_updated_in_place():
    base = torch.ones(6, 4).bfloat16()
    weight, other = torch.nn.Parameter(base.t()), bf16(torch.ones(4, 6))
    for each in (weight, other):
        each.grad = torch.arange(24.0).view(4, 6).bfloat16()
        take_step(optimizer_of([each]), 0.1, 1)
    assert torch.equal(weight, other) and weight.data_ptr() == base.data_ptr() and not weight.is_contiguous()


@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw_4bit"])
def test_moments_that_are_too_small_to_be_quantized_are_float32(kind):
    norm, layer = bf16(torch.ones(64)), bf16(torch.ones(64, 128))
    optimizer = optimizer_of([norm, layer], kind)
    for each in (norm, layer):
        each.grad = torch.ones_like(each)
    take_step(optimizer, 1e-3, 1)
    state = optimizers.get_state(optimizer)
    plain, quantized = ({n: v.dtype for n, v in state.items() if n.startswith(i)} for i in ("1.", "0."))
    assert plain == dict.fromkeys(("1.step", "1.exp_avg", "1.exp_avg_sq"), torch.float32)
    assert quantized["0.exp_avg_sq.codes"] == torch.uint8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes g++")
def test_as_a_gpu_runs_it_it_is_one_compiled_kernel_with_the_same_results(monkeypatch):
    from torch._inductor import metrics

    shapes = [(100, 70), (33,), (1000, 300)]
    found = []
    for kind in ("cpu", "cuda"):  # compiled for the CPU that is here
        monkeypatch.setattr(bf16_adamw, "kind_of", lambda device, kind=kind: kind)
        metrics.reset()
        torch.manual_seed(0)
        weights = [bf16(torch.randn(shape)) for shape in shapes]
        optimizer = optimizer_of(weights, weight_decay=0.1)
        for step in range(1, 5):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.param_groups[0]["seed"] = step
            optimizer.param_groups[0]["lr"] = 1e-3 / step
            optimizer.step()
        found.append([*weights, *optimizers.get_state(optimizer).values()])
    # One for all matrices and one for all vectors, at every rate; the products of a fused kernel are rounded once less.
    assert metrics.generated_kernel_count == 2
    for one, other in zip(*found, strict=True):
        differs = one.detach().double() != other.detach().double()
        assert float(differs.double().mean()) < 1e-3
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


# -- the norm --------------------------------------------------------------------------------------------------------


def test_the_norm_is_taken_in_float32():
    """Rounded to bf16 on the way it would be off by up to a half of a percent."""
    torch.manual_seed(0)
    parameters = [bf16(torch.zeros(n, 64)) for n in (3, 70, 200)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters.append(bf16(torch.zeros(4)))  # without a gradient
    exact = float(torch.cat([p.grad.flatten().double() for p in parameters[:3]]).norm())
    assert float(optimizers.clip_gradients(parameters, 1e9)) == pytest.approx(exact, rel=1e-5)
    optimizers.clip_gradients(parameters, 2.0)
    clipped = float(torch.cat([p.grad.flatten().double() for p in parameters[:3]]).norm())
    assert clipped == pytest.approx(2.0, rel=2e-3)
