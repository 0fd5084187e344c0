"""The head in chunks has the values and gradients of the head at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from prefcache.pipeline.model import chunked_lm_head
from prefcache.pipeline.model.chunked_lm_head import score_hidden
from prefcache.pipeline.model.lm_head import set_head_dtype
from tests.helpers.models import PAIRS, SIZES, build, compute, dpo_loss, gradient, relative_error, start_forward

torch.set_num_threads(1)


# -- in chunks -------------------------------------------------------------------------------------------------------


class CountLogits(TorchDispatchMode):
    """How many rows over the vocabulary are computed at once, and how many are in memory."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.peak = vocabulary, set(), 0
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            # 32 rows are the head's weights, transposed.
            if each.ndim > 1 and each.shape[-1] == self.vocabulary and each.shape[-2] != 32:
                self.rows.add(each.numel() // self.vocabulary)
                self.storages[StorageWeakRef(each.untyped_storage())] = each.numel() // self.vocabulary
        self.peak = max(self.peak, self.waiting())
        return result

    def waiting(self) -> int:
        return sum(rows for storage, rows in self.storages.items() if not storage.expired())


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere"])
def test_the_logits_of_all_tokens_never_exist(name, layout, monkeypatch):
    forward = start_forward(build(name), layout, PAIRS)
    monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model: 5)
    n = sum(len(each.completion_ids) for each in PAIRS)
    assert n == 41  # so nine chunks, the last of four tokens
    with CountLogits(60) as seen:
        loss = dpo_loss(compute(forward, PAIRS)[0])
        assert seen.waiting() == 4
        loss.backward()
    assert max(seen.rows) == 5
    # One tensor of them where nothing comes after the head's product: logits, their softmax and the gradient in turn.
    assert seen.peak == 5 or name in ("gemma2", "cohere")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere", "gpt2", "minicpm3"])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_a_head_in_chunks_has_the_values_and_the_gradient_of_one_at_once(name, squares, trained, monkeypatch):
    results = []
    for n in (1000, 41, 7, 1):
        monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model, n=n: n)
        model = build(name)
        model.get_output_embeddings().requires_grad_(trained)
        logps, squares_N = compute(start_forward(model, "shared", PAIRS), PAIRS, squares=squares)
        dpo_loss(logps).backward()
        results.append((torch.cat([*logps, *squares_N]).detach(), gradient(model)))
        # The decoder is back in its place.
        with torch.no_grad():
            model.set_attn_implementation("eager")
            assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 60)
    for values, slopes in results[1:]:
        assert relative_error(values, results[0][0]) < 1e-6
        assert relative_error(slopes, results[0][1]) < 1e-6


def test_a_model_may_change_its_logits_in_place():
    class InPlace(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits /= 2
            return out

    slopes = []
    for layout in ("shared", "padded"):
        torch.manual_seed(0)
        model = InPlace(LlamaConfig(**SIZES)).eval()
        dpo_loss(compute(start_forward(model, layout, PAIRS), PAIRS)[0]).backward()
        slopes.append(gradient(model))
    assert relative_error(*slopes) < 1e-5


def test_a_heads_bias_has_the_gradient_of_all_its_chunks(monkeypatch):
    """Phi's head has one. Its slope at a logit is that of the summed log-probs: 1 for each target, less its probability."""
    monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model: 7)
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    forward = start_forward(model, "shared", PAIRS)
    torch.cat(compute(forward, PAIRS)[0]).sum().backward()
    expected = torch.zeros(60, dtype=torch.float64)
    for each in PAIRS:
        with torch.no_grad(), forward.native_attention():
            ids = torch.from_numpy(each.ids.astype(np.int64))
            logits_NV = model(input_ids=ids[None]).logits[0, len(each.prompt_ids) - 1 : -1].double()
        expected += F.one_hot(ids[len(each.prompt_ids) :], 60).sum(0) - logits_NV.softmax(-1).sum(0)
    assert relative_error(model.lm_head.bias.grad.double(), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "minicpm3"])
@pytest.mark.parametrize(
    ("dtype", "trained", "n_positions"),
    [
        # Logits and the gradient of hidden states: 41 positions each.
        ("float32", False, 41 + 41),
        ("bfloat16", False, 41 + 41),
        # Then the weight's gradient, and the logits again, but for the chunks that are kept: one of 4, or three in half precision.
        ("float32", True, 41 + 41 + 41 + 37),
        ("bfloat16", True, 41 + 41 + 41 + 29),
    ],
)
def test_only_a_trained_heads_logits_are_computed_twice(name, dtype, trained, n_positions, monkeypatch):
    monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model: 5)
    model = build(name)
    model.get_output_embeddings().requires_grad_(trained)
    set_head_dtype(model, dtype)
    forward = start_forward(model, "shared", PAIRS)
    with CountProducts(60) as counted:
        dpo_loss(compute(forward, PAIRS)[0]).backward()
    assert counted.multiplications == n_positions * 32 * 60


class CountProducts(TorchDispatchMode):
    """Multiplications of matrix products with the vocabulary as one of their dimensions."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.multiplications = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            a, b = args[-2:]
            if self.vocabulary in (*a.shape, *b.shape):
                self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


# -- in half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "minicpm3"])
def test_a_bfloat16_head_has_the_gradient_of_a_float32_head(name, weights, monkeypatch):
    """Up to the rounding of its operands, 2^-9 each, and of the sums of chunks where the weights are bfloat16."""
    slopes = []
    for dtype, n in (("float32", 1000), ("bfloat16", 1000), ("bfloat16", 7)):
        monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model, n=n: n)
        model = build(name).to(weights)
        set_head_dtype(model, dtype)
        head = model.get_output_embeddings()
        torch.manual_seed(1)
        hidden_ND = torch.randn(41, 32).to(weights).requires_grad_()
        target_N, slope_N = torch.arange(41), torch.randn(41)
        (logps_N,) = score_hidden(model, hidden_ND, target_N, False)
        logps_N.backward(slope_N)
        assert logps_N.dtype == torch.float32
        assert (hidden_ND.grad.dtype, head.weight.grad.dtype) == (weights, weights)
        slopes.append([logps_N.detach(), hidden_ND.grad.float(), head.weight.grad.float()])
    for half in slopes[1:]:
        errors = [relative_error(*each) for each in zip(half, slopes[0], strict=True)]
        assert max(errors) < 1e-2
        assert min(errors) > 1e-5 or weights == torch.bfloat16
