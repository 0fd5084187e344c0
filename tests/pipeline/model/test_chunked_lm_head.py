"""The head in chunks has the values and gradients of the head at once, and multiplies in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from prefcache.pipeline.model import chunked_lm_head
from prefcache.pipeline.model.chunked_lm_head import use_float32_head
from prefcache.pipeline.model.logprobs import padded_logps, sum_logps
from tests.helpers.models import PAIRS, SIZES, build, compute, dpo_loss, gradient, relative_error, start_forward

torch.set_num_threads(1)

IDS = torch.arange(3, 16)[None]


# -- in chunks -------------------------------------------------------------------------------------------------------


class CountLogits(TorchDispatchMode):
    """How many rows of logits exist at once: the first dimensions of all that is computed over the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == self.vocabulary:
                self.rows.add(each.numel() // self.vocabulary)
        return result


def saved_logits(compute_loss) -> tuple[torch.Tensor, int]:
    """A loss, and how many rows over the vocabulary wait for its backward pass."""
    rows = {}

    def keep(each: torch.Tensor) -> torch.Tensor:
        # 32 rows are the head's weights, transposed.
        if each.ndim > 1 and each.shape[-1] == 60 and each.shape[-2] != 32:
            rows[each.data_ptr()] = each.numel() // 60
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        loss = compute_loss()
    return loss, sum(rows.values())


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere"])
def test_the_logits_of_all_tokens_never_exist(name, layout, monkeypatch):
    forward = start_forward(build(name), layout, PAIRS)
    monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model: 5)
    n = sum(len(each.completion_ids) for each in PAIRS)
    assert n == 41  # so nine chunks, the last of four tokens
    with CountLogits(60) as seen:
        loss, waiting = saved_logits(lambda: dpo_loss(compute(forward, PAIRS)[0]))
        loss.backward()
    # Gemma's caps keep theirs as well.
    assert waiting <= (8 if name == "gemma2" else 4)
    assert max(seen.rows - {32}) == 5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere", "gpt2", "minicpm3"])
@pytest.mark.parametrize("squares", [False, True])
def test_a_head_in_chunks_has_the_values_and_the_gradient_of_one_at_once(name, squares, monkeypatch):
    results = []
    for n in (1000, 41, 7, 1):
        monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model, n=n: n)
        model = build(name)
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
            ids = torch.from_numpy(np.concatenate(each).astype(np.int64))
            logits_NV = model(input_ids=ids[None]).logits[0, len(each.prompt_ids) - 1 : -1].double()
        expected += F.one_hot(ids[len(each.prompt_ids) :], 60).sum(0) - logits_NV.softmax(-1).sum(0)
    assert relative_error(model.lm_head.bias.grad.double(), expected) < 1e-5


# -- in float32 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_the_float32_head_changes_nothing_in_a_float32_model(name):
    model = build(name)
    with torch.no_grad():
        before = padded_logps(model, PAIRS).logps
        use_float32_head(model)
        after = padded_logps(model, PAIRS).logps
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_float32_head_multiplies_a_bfloat16_model_in_float32(name):
    model = build(name).bfloat16()
    with torch.no_grad():
        hidden = model.model(input_ids=IDS).last_hidden_state
        assert hidden.dtype == torch.bfloat16
        expected = hidden.double() @ model.get_output_embeddings().weight.double().T
        if cap := getattr(model.config, "final_logit_softcapping", None):
            expected = cap * torch.tanh(expected / cap)
        use_float32_head(model)
        logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.float32
    assert (logits[0] - expected[0]).abs().max() < 1e-4
    assert name == "llama" or logits.abs().max() <= 2  # the cap


def test_the_float32_head_stays_float32_under_autocast_and_has_a_gradient():
    model = build("llama")
    use_float32_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=IDS).logits.dtype == torch.float32
    sum_logps(padded_logps(model, PAIRS).logps).sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_the_float32_head_keeps_its_bias():
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    head, hidden = model.get_output_embeddings(), torch.randn(2, 32)
    torch.nn.init.normal_(head.bias)
    expected = hidden @ head.weight.T + head.bias
    use_float32_head(model)
    torch.testing.assert_close(head(hidden), expected)
