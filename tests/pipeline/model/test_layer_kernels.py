"""Fewer kernels within layers compute the same. On a CPU PyTorch writes the fused norm out, by the same formula."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from prefcache.pipeline.model import attention, layer_kernels
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.layer_kernels import compile_layers, fuse_kernels
from prefcache.pipeline.model.trainable import recompute_layers
from tests.helpers.models import PAIRS, build, compute, dpo_loss, gradient, relative_error, start_forward

torch.set_num_threads(1)


def differentiate(forward: Forward, pairs=PAIRS) -> torch.Tensor:
    forward.model.zero_grad()
    dpo_loss(compute(forward, pairs)[0]).backward()
    return gradient(forward.model)


# -- norms and rotations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norms", "rotations"),
    [
        # Two layers of two norms, and the last; Qwen 3 has two more in each layer.
        *[("llama", 5, 2), ("qwen2", 5, 2), ("qwen3", 9, 2), ("mixtral", 5, 2)],
        # Gemma adds 1 to a norm's weight. Olmo 2 rounds norms and rotations elsewhere. GPT-2 has neither.
        *[("gemma3", 0, 2), ("olmo2", 0, 0), ("gpt2", 0, 0)],
    ],
)
def test_fused_kernels_give_the_same_gradient_where_the_models_code_is_llamas(name, norms, rotations):
    model = build(name)
    forward = start_forward(model, "shared", PAIRS)
    expected = differentiate(forward)
    undo = fuse_kernels(model)
    changed = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert (sum("Norm" in each for each in changed), sum("Attention" in each for each in changed)) == (norms, rotations)
    assert relative_error(differentiate(forward), expected) < 1e-5
    undo()
    assert torch.equal(differentiate(forward), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_rotation_is_llamas_whatever_the_angles(dtype):
    """Of the two halves' angles too, which rotary embeddings make the same."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 9, 8, dtype=dtype, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 9, 8).to(dtype)
    results = []
    for rotate in (modeling_llama.apply_rotary_pos_emb, layer_kernels._rotate):
        outputs = rotate(q, k, cos, sin)
        weighed = sum((out * torch.arange(8.0).to(dtype)).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(weighed, (q, k))])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        # Rounded once less than Llama's.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.1)
        assert (found - expected).norm() < 5e-3 * expected.norm()


def test_under_autocast_rotated_queries_are_float32_as_llamas_are():
    # Autocast's products are bf16, and cosines float32.
    q, k = torch.randn(1, 4, 9, 8).bfloat16().requires_grad_(), torch.randn(1, 2, 9, 8).bfloat16()
    cos, sin = torch.randn(2, 1, 9, 8)
    expected, found = (
        rotate(q, k, cos, sin) for rotate in (modeling_llama.apply_rotary_pos_emb, layer_kernels._rotate)
    )
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(outputs[0].sum(), q)[0] for outputs in (expected, found)]
    assert gradients[1].dtype == torch.bfloat16
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_fused_norm_in_bf16_is_rounded_no_more_than_llamas(weights):
    torch.manual_seed(0)
    norm = modeling_llama.LlamaRMSNorm(256).to(weights)
    norm.weight.data.uniform_(0.5, 2)
    hidden = torch.randn(64, 256).bfloat16()
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    before = norm(hidden)
    fuse_kernels(norm)
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
    attend = attention.attend
    undo = compile_layers(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    with forward.native_attention():  # as generation does
        pass
    for part, whole in zip(parts, expected, strict=True):
        assert relative_error(differentiate(forward, part), whole) < 1e-6
    # Before attention and after it, for all layers and lengths.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    undo()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(differentiate(forward), expected[0])
    assert not torch._dynamo.utils.counters["stats"]
    assert attention.AttentionInterface()[attention.NAME] is attention.attend is attend


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
    assert forward.adopt(lambda: fuse_kernels(model), PAIRS) is None
