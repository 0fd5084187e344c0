"""Other kernels within layers compute the same. On a CPU PyTorch writes the fused norm out, by the same formula."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefcache.pipeline.model import attention
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.layer_kernels import compile_layers, fuse_norms
from prefcache.pipeline.model.trainable import recompute_layers
from tests.helpers.models import PAIRS, build, compute, dpo_loss, gradient, relative_error, start_forward

torch.set_num_threads(1)


def differentiate(forward: Forward, pairs=PAIRS) -> torch.Tensor:
    forward.model.zero_grad()
    dpo_loss(compute(forward, pairs)[0]).backward()
    return gradient(forward.model)


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n"),
    # Two layers of two norms, and the last; Qwen 3 has two more in each layer. Gemma adds 1 to the weight, Olmo 2 rounds later.
    [("llama", 5), ("qwen2", 5), ("qwen3", 9), ("mixtral", 5), ("gemma3", 0), ("olmo2", 0), ("gpt2", 0)],
)
def test_fused_norms_give_the_same_gradient_where_they_are_llamas(name, n):
    model = build(name)
    forward = start_forward(model, "shared", PAIRS)
    expected = differentiate(forward)
    undo = fuse_norms(model)
    assert sum("forward" in vars(module) for module in model.modules() if "RMSNorm" in type(module).__name__) == n
    assert relative_error(differentiate(forward), expected) < 1e-5
    undo()
    assert torch.equal(differentiate(forward), expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_fused_norm_in_bf16_is_rounded_no_more_than_llamas(weights):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(256).to(weights)
    norm.weight.data.uniform_(0.5, 2)
    hidden = torch.randn(64, 256).bfloat16()
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    before = norm(hidden)
    fuse_norms(norm)
    assert norm(hidden).dtype == before.dtype == weights
    assert (norm(hidden) - exact).norm() < (before - exact).norm() < 4e-3 * exact.norm()


# -- compiled layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_give_the_same_gradient_for_rows_of_any_length(recomputed):
    # By the tracer without a compiler, which would take a minute here.
    model = build("llama")
    if recomputed:
        recompute_layers(model)
    forward = start_forward(model, "shared", PAIRS)
    parts = [PAIRS, PAIRS[:2], PAIRS[2:]]
    expected = [differentiate(forward, part) for part in parts]
    undo = compile_layers(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    for part, whole in zip(parts, expected, strict=True):
        assert relative_error(differentiate(forward, part), whole) < 1e-6
    # Before attention and after it, for all layers and lengths.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    undo()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(differentiate(forward), expected[0])
    assert not torch._dynamo.utils.counters["stats"]
    assert attention.AttentionInterface()[attention.NAME] is attention.attend


@pytest.mark.slow
def test_layers_compiled_forward_and_backward_give_the_same_gradient():
    model = build("qwen3")
    forward = start_forward(model, "shared", PAIRS)
    expected = differentiate(forward)
    undo = compile_layers(model, backend="aot_eager")
    assert relative_error(differentiate(forward), expected) < 1e-6
    undo()


# -- the trial -------------------------------------------------------------------------------------------------------


def test_a_change_that_computes_something_else_is_undone():
    model = build("llama")
    forward = start_forward(model, "shared", PAIRS)
    expected = differentiate(forward)

    def double_the_last_norm():
        norm = model.model.norm
        norm.forward = lambda hidden: 2 * type(norm).forward(norm, hidden)
        return lambda: delattr(norm, "forward")

    assert forward.adopt(double_the_last_norm, PAIRS).startswith("off by up to")
    assert torch.equal(differentiate(forward), expected)


def test_a_change_that_fails_is_undone():
    model = build("llama")
    forward = start_forward(model, "shared", PAIRS)

    def break_a_layer():
        layer = model.model.layers[0]
        layer.forward = lambda *_, **__: {}["no kernel for this device"]
        return lambda: delattr(layer, "forward")

    assert forward.adopt(break_a_layer, PAIRS) == "it fails (KeyError)"
    assert forward.adopt(lambda: fuse_norms(model), PAIRS) is None
