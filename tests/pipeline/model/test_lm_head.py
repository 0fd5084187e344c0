"""The head multiplies operands of the dtype that was chosen, and its logits are float32."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhiConfig, PhiForCausalLM

from prefcache.pipeline.model.chunked_lm_head import score_hidden
from prefcache.pipeline.model.device import traced_as
from prefcache.pipeline.model.lm_head import choose_head_dtype, set_head_dtype
from prefcache.pipeline.model.logprobs import padded_logps, sum_logps
from tests.helpers.models import PAIRS, SIZES, build, relative_error

torch.set_num_threads(1)

IDS = torch.arange(3, 16)[None]


def test_the_default_is_half_precision_on_a_gpu_only():
    assert choose_head_dtype(None, "bfloat16", "cuda") == "bfloat16"
    assert choose_head_dtype(None, "float32", "cuda") == "float32"
    assert choose_head_dtype(None, "bfloat16", "cpu") == "float32"
    assert choose_head_dtype("float32", "bfloat16", "cuda") == "float32"
    assert choose_head_dtype("bfloat16", "float32", "cpu") == "bfloat16"


# -- in float32 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_the_float32_head_changes_nothing_in_a_float32_model(name):
    model = build(name)
    with torch.no_grad():
        before = padded_logps(model, PAIRS).logps
        set_head_dtype(model, "float32")
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
        set_head_dtype(model, "float32")
        logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.float32
    assert (logits[0] - expected[0]).abs().max() < 1e-4
    assert name == "llama" or logits.abs().max() <= 2  # the cap


def test_the_float32_head_stays_float32_under_autocast_and_has_a_gradient():
    model = build("llama")
    set_head_dtype(model, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=IDS).logits.dtype == torch.float32
    sum_logps(padded_logps(model, PAIRS).logps).sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_the_float32_head_keeps_its_bias():
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    head, hidden = model.get_output_embeddings(), torch.randn(2, 32)
    torch.nn.init.normal_(head.bias)
    expected = hidden @ head.weight.T + head.bias
    set_head_dtype(model, "float32")
    torch.testing.assert_close(head(hidden), expected)


# -- in half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_head_rounds_operands_and_nothing_else(dtype):
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    head, hidden = model.get_output_embeddings(), torch.randn(2, 5, 32)
    torch.nn.init.normal_(head.bias)
    rounded, weight = (x.detach().to(getattr(torch, dtype)).double() for x in (hidden, head.weight))
    set_head_dtype(model, dtype)
    with torch.no_grad():
        logits = head(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), rounded @ weight.T + head.bias.double(), rtol=0, atol=1e-5)
    assert (logits - (hidden @ head.weight.T + head.bias)).abs().max() > 1e-4


@pytest.mark.parametrize("trained", [True, False])
def test_a_half_precision_head_has_a_gradient_at_once_too(trained):
    """As padded rows compute it."""
    slopes = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
        head = model.get_output_embeddings().requires_grad_(trained)
        set_head_dtype(model, dtype, frozen=not trained)
        sum_logps(padded_logps(model, PAIRS).logps).sum().backward()
        slopes.append([p.grad for p in model.parameters() if p.grad is not None])
        assert (head.weight.grad is not None) == (head.bias.grad is not None) == trained
    assert all(relative_error(half, single) < 2e-2 for single, half in zip(*slopes, strict=True))


class RecordProducts(TorchDispatchMode):
    """Dtypes of the operands and of the result of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            operands = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.dtypes.add((operands[0].dtype, result.dtype))
        return result


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_on_a_gpu_no_product_of_a_half_precision_head_is_in_float32(weights, frozen):
    """Its operands are bfloat16, its results float32; the gradient of bfloat16 weights is summed in bfloat16."""
    with FakeTensorMode(), traced_as("cuda", lambda tensor: tensor):
        model = build("llama", dtype=weights)
        model.get_output_embeddings().requires_grad_(not frozen)
        set_head_dtype(model, "bfloat16", frozen=frozen)
        hidden_ND = torch.empty(3 * (1 << 20), 32, dtype=weights, requires_grad=True)
        target_N = torch.zeros(len(hidden_ND), dtype=torch.int64)
        with RecordProducts() as recorded:
            (logps_N,) = score_hidden(model, hidden_ND, target_N, False)
            logps_N.sum().backward()
    sums = {(torch.bfloat16, torch.bfloat16)} if weights == torch.bfloat16 and not frozen else set()
    assert recorded.dtypes == {(torch.bfloat16, torch.float32)} | sums
