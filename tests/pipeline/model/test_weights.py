"""A loaded reference computes what its own library computes: PEFT its adapters, bitsandbytes its quantized weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import weights
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import load_frozen, score_plainly

IDS = torch.arange(5, 45).unsqueeze(0)
LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": peft.LoraConfig(r=4, target_modules=LAYERS),
    "dora": peft.LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "lora of the head": peft.LoraConfig(r=4, target_modules=[*LAYERS, "lm_head"]),
    "whole embeddings": peft.LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["lm_head", "embed_tokens"]),
    "single tokens": peft.LoraConfig(r=4, target_modules=LAYERS, trainable_token_indices=[6, 7, 9]),
    "loha": peft.LoHaConfig(r=4, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(r=4, target_modules=LAYERS),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def tied(model, tmp_path_factory) -> Path:
    """The same model, with its output embeddings tied to the input's."""
    folder = tmp_path_factory.mktemp("tied")
    AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def adapted(base: Path, config: peft.PeftConfig):
    """The model in PEFT's own hands, its adapter far from doing nothing."""
    torch.manual_seed(0)
    found = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def frozen(base: Path, adapter: Path | None = None, quantization: str | None = None, dtype: str = "float32"):
    return load_frozen(Reference(base, adapter, quantization), dtype, "sdpa", "cpu")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied embeddings
@pytest.mark.parametrize("ties", ["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_peft_computes(request, model, tmp_path, name, ties):
    base = request.getfixturevalue("tied") if ties == "tied" else model
    theirs = adapted(base, ADAPTERS[name])
    theirs.save_pretrained(tmp_path / "adapter")
    expected, plain = logits(theirs), logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - plain).abs().max() > 0.1  # it does something
    ours = frozen(base, tmp_path / "adapter")
    assert (logits(ours) - expected).abs().max() < 1e-5
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training
    # A head of its own, which the engine computes in float32 from its weight.
    assert type(ours.get_output_embeddings()) is torch.nn.Linear
    in_bfloat16 = frozen(base, tmp_path / "adapter", dtype="bfloat16")
    assert (logits(in_bfloat16) - expected).abs().mean() < 0.1


def test_a_small_adapter_is_not_lost_in_bfloat16(model, tmp_path):
    """Merged, most of it would be: a bfloat16 weight has 8 bits."""
    torch.manual_seed(0)
    small = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), ADAPTERS["lora"]).eval()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                parameter.add_(1e-4 * torch.randn_like(parameter))
    small.save_pretrained(tmp_path / "adapter")
    exact, without = logits(small), logits(AutoModelForCausalLM.from_pretrained(model))
    ours = frozen(model, tmp_path / "adapter", dtype="bfloat16")
    delta = weight_deltas(ours)
    theirs = weight_deltas(small.get_base_model())
    assert delta.keys() == theirs.keys() and len(delta) == 8
    assert all(torch.equal(delta[name], theirs[name]) for name in delta)
    weight = ours.model.layers[0].mlp.up_proj.get_base_layer().weight
    merged = weight + delta["model.layers.0.mlp.up_proj"].bfloat16()
    assert (merged == weight).float().mean() > 0.9  # nine elements in ten would have stayed as they were
    assert not torch.equal(exact, without)


def test_an_adapted_head_is_merged_in_float32(model, tmp_path):
    """Where its model is bfloat16, too: the sum of both is not rounded to 8 bits."""
    adapted(model, ADAPTERS["lora of the head"]).save_pretrained(tmp_path / "adapter")
    ours = frozen(model, tmp_path / "adapter", dtype="bfloat16").get_output_embeddings()
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (next(each for name, each in kept.items() if f"lm_head.lora_{letter}" in name) for letter in "AB")
    base = load_file(model / "model.safetensors")["lm_head.weight"].bfloat16()
    # alpha 8 over rank 4.
    expected = base.double() + 2 * b.double() @ a.double()
    assert ours.weight.dtype == torch.float32
    assert (ours.weight - expected).abs().max() < 1e-6
    assert (expected.bfloat16() - expected).abs().max() > 1e-4  # what bfloat16 would lose


def weight_deltas(model) -> dict[str, torch.Tensor]:
    return {
        name: module.lora_B["default"].weight @ module.lora_A["default"].weight
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_an_adapter_of_another_model_is_refused(model, tmp_path):
    adapted(model, ADAPTERS["lora"]).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for target_modules, said in ((["no_such_layer"], "Target modules"), ([*LAYERS, "o_proj"], "missing adapter keys")):
        changed = json.dumps(settings | {"target_modules": target_modules})
        (tmp_path / "adapter/adapter_config.json").write_text(changed)
        with pytest.raises(UsageError, match=f"does not load as an adapter of .*{said}.*it was trained on"):
            frozen(model, tmp_path / "adapter")


def test_a_folder_that_does_not_load_is_refused_in_words(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="does not load as a causal language model"):
        frozen(broken)


def test_quantization_without_bitsandbytes_is_refused_in_words(model, monkeypatch):
    def absent(name):
        raise weights.PackageNotFoundError(name)

    monkeypatch.setattr(weights, "version", absent)
    with pytest.raises(UsageError, match=r"needs bitsandbytes. Install it \(pip install 'prefcache\[quantized\]'\)"):
        frozen(model, quantization="4bit")


quantized = pytest.mark.parametrize("quantization", ["4bit", "8bit"])


# -- quantized, where bitsandbytes is installed ----------------------------------------------------------------------


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def dequantized(bnb, model, quantization: str):
    """The plain model in float32 with each layer's weight quantized and taken back by bitsandbytes' own functions."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    for name, module in plain.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        if quantization == "4bit":
            packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            module.weight.data = bnb.functional.dequantize_4bit(packed, state)
        else:
            codes, row_max, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            module.weight.data = bnb.functional.int8_vectorwise_dequant(codes, row_max)
    return plain.eval()


@quantized
def test_a_quantized_reference_computes_with_quantized_weights(bitsandbytes, model, quantization):
    ours = frozen(model, quantization=quantization)
    expected = logits(dequantized(bitsandbytes, model, quantization))
    plain = logits(AutoModelForCausalLM.from_pretrained(model))
    assert (logits(ours) - expected).abs().max() < 1e-3 < 0.05 < (expected - plain).abs().max()


@quantized
def test_every_dtype_computes_with_the_same_quantized_weights(bitsandbytes, model, quantization):
    found = [frozen(model, quantization=quantization, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    for name, parameter in found[0].named_parameters():
        others = [dict(each.named_parameters())[name] for each in found[1:]]
        if not parameter.is_floating_point():
            assert all(torch.equal(parameter, other) for other in others)
        else:
            assert [parameter.dtype, *(p.dtype for p in others)] == [torch.float32, torch.bfloat16, torch.float16]


@quantized
def test_a_quantized_tokens_value_depends_on_nothing_that_follows_it(bitsandbytes, model, quantization):
    """bitsandbytes' own 8-bit forward fails this: a large activation anywhere changes how all are computed."""
    ours = frozen(model, quantization=quantization)
    with torch.no_grad():
        whole = ours(IDS).logits[0]
        alone = torch.stack([ours(IDS[:, :n]).logits[0, -1] for n in range(2, 40, 5)])
    assert (alone - whole[1:39:5]).abs().max() < 1e-4


@quantized
def test_the_plain_values_of_a_quantized_reference_are_of_its_quantized_weights(
    bitsandbytes, model, quantization, tmp_path
):
    sequence = TokenSequence(np.arange(5, 20), np.arange(20, 45))
    (found,) = score_plainly(Reference(model, None, quantization), [sequence])
    row = logits(dequantized(bitsandbytes, model, quantization))[0].double().log_softmax(-1)
    expected = [row[at - 1, IDS[0, at]].item() for at in range(15, 40)]
    assert found == pytest.approx(expected, abs=1e-3)
    # An adapter on quantized weights stays beside them, as a trainer has it.
    adapted(model, ADAPTERS["lora"]).save_pretrained(tmp_path / "adapter")
    (tuned,) = score_plainly(Reference(model, tmp_path / "adapter", quantization), [sequence])
    theirs = dequantized(bitsandbytes, model, quantization)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        row = F.log_softmax(theirs(IDS).logits[0].double(), -1)
    assert tuned == pytest.approx([row[at - 1, IDS[0, at]].item() for at in range(15, 40)], abs=1e-3)
