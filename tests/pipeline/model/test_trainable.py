"""An adapter trains as PEFT trains it, from a margin of 0, with less memory; recomputed layers give the same gradients."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import trainable
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.lm_head import set_head_dtype
from prefcache.pipeline.model.logprobs import plain_logps
from tests.helpers.models import ARCHITECTURES, UNSHARABLE, answers, build, save_mixture, start_forward
from tests.helpers.runs import away_from_nothing, sft

CPU = torch.device("cpu")
# Two prompts with two answers each.
PAIRS = [*answers(7, 5, 3), *answers(8, 5, 3)]


def loaded(folder: Path, adapter: Path | None = None, **train) -> trainable.Trainable:
    return trainable.load(Reference(folder, adapter), Train.model_validate(train), "sdpa", CPU)


def forward(model, layout: str = "shared") -> Forward:
    set_head_dtype(model, "float32")
    return start_forward(model, layout, PAIRS)


def loss(by: Forward) -> torch.Tensor:
    return torch.cat(by.logps([PAIRS[:2], PAIRS[2:]]).logps).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


# -- adapters --------------------------------------------------------------------------------------------------------

KINDS = {
    "lora": {"r": 4, "alpha": 8},
    "dora": {"r": 4, "dora": True},
    "rslora": {"r": 4, "rslora": True, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_packed_rows_are_those_of_plain_peft(model, kind):
    ours, said = loaded(model, lora=KINDS[kind]), KINDS[kind]
    away_from_nothing(ours.parameters().values())
    loss(forward(ours.model)).backward()

    config = peft.LoraConfig(
        r=said["r"],
        lora_alpha=said.get("alpha", 32),
        target_modules=said.get("target_modules", "all-linear"),
        use_dora="dora" in said,
        use_rslora="rslora" in said,
        task_type="CAUSAL_LM",
    )
    theirs = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)  # train.seed
    theirs = peft.get_peft_model(theirs, config).eval()
    trained = [each for each in theirs.parameters() if each.requires_grad]
    away_from_nothing(trained)
    logps = []
    for each in PAIRS:
        ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.completion_ids]).astype(np.int64))
        all_logps = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
        logps.append(all_logps[len(each.prompt_ids) - 1 :].sum())
    torch.stack(logps).sum().backward()

    found, expected = gradients(ours.model), gradients(theirs.get_base_model())
    n_layers = 2 * (2 if "target_modules" in said else 7)
    assert found.keys() == expected.keys() and len(found) == n_layers * (3 if kind == "dora" else 2)
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_bit_by_bit(model, kind):
    with torch.no_grad():
        plain, adapted = (loss(forward(loaded(model, **more).model)) for more in ({}, {"lora": KINDS[kind]}))
    assert torch.equal(plain, adapted)


def test_the_base_may_be_bfloat16_and_what_is_trained_is_float32(model):
    ours = loaded(model, lora={"base_dtype": "bfloat16"})
    trained = set(ours.parameters())
    assert {each.dtype for each in ours.parameters().values()} == {torch.float32}
    assert {p.dtype for n, p in ours.model.named_parameters() if n not in trained} == {torch.bfloat16}


def n_bytes(tensors) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def test_an_adapter_takes_less_memory_for_gradients_and_optimizer(model):
    found = []
    for more in ({}, {"lora": {"r": 2}}):
        ours = loaded(model, **more)
        parameters = list(ours.parameters().values())
        optimizer = torch.optim.AdamW(parameters)
        loss(forward(ours.model)).backward()
        optimizer.step()
        kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        grads = [each.grad for each in ours.model.parameters() if each.grad is not None]
        assert n_bytes(grads) == n_bytes(parameters) and n_bytes(kept) == 2 * n_bytes(parameters)
        found.append(n_bytes(grads) + n_bytes(kept))
    # Of a layer with I inputs and O outputs r (I + O) are trained. Each layer: four of attention (key and value of half
    # the width), three of the MLP; two layers; 12 bytes a parameter.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert found[1] == 12 * 2 * 2 * sum(i + o for i, o in shapes)
    assert found[0] > 5 * found[1]


def test_names_of_no_layer_and_of_the_head_are_refused(model):
    with pytest.raises(UsageError, match=r"no linear layer 'k_prj'. It has down_proj, .*q_proj, up_proj, v_proj"):
        loaded(model, lora={"target_modules": ["q_proj", "k_prj"]})
    with pytest.raises(UsageError, match=r"lm_head is the head, which .* takes no adapter"):
        loaded(model, lora={"target_modules": ["lm_head"]})


def test_an_adapter_on_quantized_weights_wants_a_gpu(model):
    with pytest.raises(UsageError, match=r"score.quantization=4bit: .* on a GPU only"):
        trainable.load(Reference(model, None, "4bit"), Train.model_validate({"lora": {}}), "sdpa", CPU)


def test_dropout_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="dropout is not supported: the policy would differ from its reference"):
        Train.model_validate({"lora": {"dropout": 0.05}})


# -- an adapter of fused experts -------------------------------------------------------------------------------------

EXPERTS = {"r": 3, "alpha": 6, "target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]}


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory) -> Path:
    return save_mixture(model, tmp_path_factory.mktemp("mixture") / "it")


def experts_by_hand(adapted, plain) -> dict[str, tuple[torch.Tensor, ...]]:
    """Each expert's A and B with what its weight becomes, W + 6/3 B A, which is put into the plain model as well."""
    by_name, found = dict(adapted.named_parameters()), {}
    for name, weight in plain.named_parameters():
        if ".experts." not in name:
            continue
        # The wrapper of the second parameter is inside of the first's.
        inside = ".base_layer" if name.endswith("gate_up_proj") else ""
        at = name.rpartition(".")[0] + inside
        a, b = (by_name[f"{at}.lora_{factor}.default.weight"].detach() for factor in "AB")
        for e in range(4):
            # A has each expert's rows in turn, B each rank's columns in turn.
            a_e, b_e = a[3 * e : 3 * e + 3], b[:, e::4]
            weight.data[e] += 6 / 3 * b_e @ a_e
            found[f"{at} {e}"] = a_e, b_e, weight, e
    return found


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_gradients_of_experts_factors_are_those_of_their_dense_product(mixture, layout):
    ours, plain = loaded(mixture, lora=EXPERTS), AutoModelForCausalLM.from_pretrained(mixture).eval()
    away_from_nothing(ours.parameters().values())
    by_hand = experts_by_hand(ours.model, plain)
    set_head_dtype(ours.model, "float32")
    groups = [PAIRS[:2], PAIRS[2:]] if layout == "shared" else [[each] for each in PAIRS]
    torch.cat(start_forward(ours.model, layout, PAIRS).logps(groups).logps).sum().backward()
    torch.cat([plain_logps(plain, each) for each in PAIRS]).sum().backward()

    found = gradients(ours.model)
    assert len(found) == 2 * 2 * 2 and len(by_hand) == 2 * 2 * 4
    for name, (a_e, b_e, weight, e) in by_hand.items():
        at, gradient = name.split()[0], 6 / 3 * weight.grad[e]
        expected = {"A": b_e.T @ gradient, "B": gradient @ a_e.T}
        actual = {
            "A": found[f"{at}.lora_A.default.weight"][3 * e : 3 * e + 3],
            "B": found[f"{at}.lora_B.default.weight"][:, e::4],
        }
        for factor, value in expected.items():
            torch.testing.assert_close(actual[factor], value, rtol=1e-3, atol=1e-5 * float(weight.grad.abs().max()))


def test_recomputed_layers_give_experts_the_same_gradients(mixture):
    policies = [loaded(mixture, lora=EXPERTS, gradient_checkpointing=each) for each in (False, True)]
    for each in policies:
        away_from_nothing(each.parameters().values())
    assert_same_gradients_in_less_memory(*(each.model for each in policies), "shared")


def test_an_adapter_of_experts_starts_from_nothing_and_is_float32(mixture):
    with torch.no_grad():
        plain, adapted = (loss(forward(loaded(mixture, **more).model)) for more in ({}, {"lora": EXPERTS}))
    assert torch.equal(plain, adapted)
    half = loaded(mixture, lora=EXPERTS | {"base_dtype": "bfloat16"})
    assert {each.dtype for each in half.parameters().values()} == {torch.float32}


def test_stacked_factors_are_named_with_the_number_of_experts(mixture):
    ours = loaded(mixture, lora=EXPERTS)
    assert trainable.count_stacked(ours.model) == dict.fromkeys(ours.parameters(), 4)
    assert trainable.count_stacked(loaded(mixture, lora={"target_modules": ["q_proj"]}).model) == {}


def test_experts_that_take_no_adapter_are_named(mixture):
    (_, note) = loaded(mixture, lora={"target_modules": ["q_proj"]}).notes
    assert note == (
        "the experts' down_proj, gate_up_proj take no adapter; train.lora.target_parameters=[down_proj, gate_up_proj] "
        "adapts them"
    )
    notes = loaded(mixture, lora=EXPERTS).notes
    assert len(notes) == 2 and "with train.gradient_checkpointing=true it is that of one layer" in notes[1]
    assert len(loaded(mixture, lora=EXPERTS, gradient_checkpointing=True).notes) == 1


@pytest.mark.filterwarnings("error")
def test_all_linear_takes_what_peft_makes_of_a_mixture_without_false_warnings(mixture, tmp_path):
    ours = loaded(mixture, lora={"r": 2})
    names = {name.partition(".mlp.")[2] for name in ours.parameters() if ".mlp." in name and "lora_A" in name}
    assert names == {f"{at}.lora_A.default.weight" for at in ("gate", "experts", "experts.base_layer")}
    ours.save(tmp_path / "it")
    assert loaded(mixture, tmp_path / "it", lora={}).parameters().keys() == ours.parameters().keys()


def test_names_of_no_experts_are_refused(mixture, model):
    with pytest.raises(UsageError, match=r"no fused experts 'up_proj'. It has down_proj, gate_up_proj\."):
        loaded(mixture, lora={"target_parameters": ["up_proj"]})
    with pytest.raises(
        UsageError, match=r"no fused experts 'gate_up_proj'. It has none; name its layers in train.lora"
    ):
        loaded(model, lora={"target_parameters": ["gate_up_proj"]})


def test_experts_take_no_dora(mixture):
    with pytest.raises(ValueError, match="dora does not work with target_parameters"):
        Train.model_validate({"lora": EXPERTS | {"dora": True}})
    with pytest.raises(ValueError, match="both empty"):
        Train.model_validate({"lora": {"target_modules": []}})
    # PEFT takes all-linear of this model to include its experts, as they once were linear layers.
    with pytest.raises(UsageError, match=r"train.lora: PEFT does not make this adapter of .*use_dora=True"):
        loaded(mixture, lora={"dora": True})


# -- an adapter that exists ------------------------------------------------------------------------------------------


def test_an_adapter_that_exists_is_trained_further_as_it_is(model, tmp_path):
    ours = loaded(model, sft(model, tmp_path / "sft"), lora={})
    assert len(ours.parameters()) == 8 and all("lora_" in name for name in ours.parameters())
    plain = AutoModelForCausalLM.from_pretrained(model)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "sft").eval().get_base_model()
    with torch.no_grad():
        assert torch.equal(loss(forward(ours.model)), loss(forward(theirs)))
    before = (tmp_path / "sft/adapter_model.safetensors").read_bytes()
    away_from_nothing(ours.parameters().values())
    ours.save(tmp_path / "trained")
    assert (tmp_path / "sft/adapter_model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "trained/adapter_config.json").read_text())["r"] == 4


def test_another_shape_than_the_adapters_own_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match=r"train.lora.r=8: the policy starts from .*, which has 4, and trains that"):
        loaded(model, sft(model, tmp_path / "sft"), lora={"r": 8})
    loaded(model, tmp_path / "sft", lora={"r": 4, "target_modules": ["up_proj", "q_proj"]})


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied embeddings
def test_an_adapter_of_the_head_is_refused(model, tmp_path, settings):
    with pytest.raises(UsageError, match=r"adapts the head, .* Merge it"):
        loaded(model, sft(model, tmp_path / "sft", **settings), lora={})


# -- recomputed layers -----------------------------------------------------------------------------------------------


def one_backward(model, layout: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and the bytes kept for the backward pass, each storage once."""
    by, kept = forward(model, layout), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(by)
    # What is there anyway is no cost.
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    n = sum(size for at, (_, size) in kept.items() if at not in weights)
    value.backward()
    return value.item(), gradients(model), n


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNSHARABLE])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(name):
    # Dropout in the config is where training mode, in which Transformers recomputes, would show.
    dropout = {"attention_dropout": 0.3} | ({"resid_pdrop": 0.3} if name == "gpt2" else {})
    dropout |= {"dropout": 0.3} if name == "opt" else {}
    layout = "padded" if name in UNSHARABLE else "shared"
    plain, recomputed = (build(name, **dropout) for _ in range(2))
    assert trainable.recompute_layers(recomputed) is None
    assert_same_gradients_in_less_memory(plain, recomputed, layout)


def assert_same_gradients_in_less_memory(plain, recomputed, layout: str) -> None:
    (value, grads, kept), (value2, grads2, kept2) = (one_backward(each, layout) for each in (plain, recomputed))
    assert value == value2 and kept2 < kept
    assert grads.keys() == grads2.keys() and all(torch.equal(grads[key], grads2[key]) for key in grads)


def test_recomputed_layers_train_an_adapter_too(model):
    policies = [loaded(model, lora={"r": 4}, gradient_checkpointing=each) for each in (False, True)]
    for each in policies:
        away_from_nothing(each.parameters().values())
    assert_same_gradients_in_less_memory(*(each.model for each in policies), "shared")


def test_a_model_without_such_layers_says_so():
    assert trainable.recompute_layers(torch.nn.Linear(2, 2)) == "Transformers recomputes no layer of Linear"


# -- what adapter_config.json says -----------------------------------------------------------------------------------


def test_the_adapter_finds_its_base_from_anywhere(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    loaded(Path("base"), lora={}).save(tmp_path / "made")
    monkeypatch.chdir("/")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "made")
    assert found.get_base_model().name_or_path == str(tmp_path / "base")
    snapshot = shutil.copytree(model, tmp_path / "hub/models--org--tiny/snapshots" / ("0" * 40))
    loaded(snapshot, lora={}).save(tmp_path / "of_hub")
    settings = json.loads((tmp_path / "of_hub/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", "0" * 40)


def test_tensors_are_read_one_after_another_and_never_the_whole_file_is_in_memory(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({f"{i:02}": torch.full((512, 1024), float(i)) for i in range(32)}, file)  # 2 MiB each

    before, most = resident("RssFile"), 0
    for i, (name, value) in enumerate(trainable.read_tensors(file)):
        assert (name, value.unique().tolist()) == (f"{i:02}", [float(i)])
        most = max(most, resident("RssFile") - before)
    assert i == 31 and most < 16 << 20


def resident(kind: str) -> int:
    """Bytes of this process's memory; RssFile: of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
