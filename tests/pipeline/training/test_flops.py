"""The arithmetic that is said of a step is what PyTorch's own counter sees."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefcache.pipeline import image_processor
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import weights
from prefcache.pipeline.model.vision import encode_image, freeze_unused
from prefcache.pipeline.training.flops import Work, count_work, model_cost, peak_flops
from tests.helpers import vision_models
from tests.helpers.models import build, sequence, start_forward

PROMPTS = [sequence(n, 2).prompt_ids for n in (9, 4)]
# Two prompts with two answers each, and one with a single one.
GROUPS = [
    [sequence(9, n)._replace(prompt_ids=PROMPTS[0]) for n in (6, 3)],
    [sequence(4, n)._replace(prompt_ids=PROMPTS[1]) for n in (8, 1)],
    [sequence(5, 4)],
]
MODELS = ["llama", "llama-tied", "qwen3", "gpt2", "mistral", "neox"]
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]


def counted(model, layout: str, groups) -> int:
    """By PyTorch, forward and backward. Attention and experts are spelt out, in multiplications that it knows."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    forward = start_forward(model, layout, [each for group in groups for each in group])
    with FlopCounterMode(display=False) as counter:
        torch.cat(forward.logps(groups).logps).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("name", MODELS + MIXTURES)
def test_it_is_what_pytorch_counts(name, layout):
    model = build(name)
    groups = GROUPS if layout == "shared" else [[each] for group in GROUPS for each in group]
    found = model_cost(model).flops(count_work(groups, layout))
    assert found == counted(model, layout, groups)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_head_counts_at_counted_tokens_only(layout):
    model = build("llama")
    counted_tokens = [[np.array([1, 4]), np.array([], np.int64)], [None, np.array([0])], [np.array([3])]]
    groups = [
        [each._replace(counted=positions) for each, positions in zip(*pair, strict=True)]
        for pair in zip(GROUPS, counted_tokens, strict=True)
    ]
    groups = groups if layout == "shared" else [[each] for group in groups for each in group]
    work = count_work(groups, layout)
    assert layout == "padded" or work.head_positions == 2 + 0 + 8 + 1 + 1
    assert model_cost(model).flops(work) == counted(model, layout, groups)


def test_experts_count_as_far_as_a_token_takes_them():
    dense, mixture = build("llama"), build("mixtral")
    # Two of four experts instead of one MLP of the same size, and a router of 32 x 4, in 2 layers; all trained.
    more = 3 * 2 * (3 * 32 * 48 + 32 * 4)
    assert model_cost(mixture).position - model_cost(dense).position == more


def test_of_an_adapter_only_its_own_weights_have_gradients():
    from peft import LoraConfig, get_peft_model

    whole = model_cost(build("llama"))
    adapted = build("llama")
    get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj"]))
    # Two passes of three through what stays as it is, and three through 2 x (32 + 32) in 2 layers.
    assert model_cost(adapted).position == whole.position * 2 / 3 + 2 * 3 * 2 * (32 + 32)
    assert model_cost(adapted).head_position == whole.head_position * 2 / 3


@pytest.mark.parametrize("modules", [[], "all-linear"], ids=["experts", "and-router-and-attention"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.filterwarnings("ignore")  # PEFT's, of ranks that it has set itself
def test_of_adapted_experts_the_products_are_counted_once_a_forward(name, modules):
    from peft import LoraConfig, get_peft_model

    model = build(name)
    parameters = ["gate_up_proj", "down_proj"]
    get_peft_model(model, LoraConfig(r=3, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM"))
    # Otherwise the first layer's attention, before which nothing is trained, would have no backward pass.
    model.get_input_embeddings().weight.requires_grad_()
    cost = model_cost(model)
    # Forward and twice backward. PyTorch computes an experts' product once more to see its shape, which is not counted.
    router = 3 * 2 * 3 * 32 * 4 if name == "qwen3-moe" and modules else 0
    again = 2 * (cost.each_forward - router) / 3
    assert cost.flops(count_work(GROUPS, "shared")) + again == counted(model, "shared", GROUPS)
    if name == "gpt-oss":  # I x O x r, of four experts in two layers
        assert cost.each_forward == 3 * 3 * 4 * 2 * (32 * 96 + 48 * 32)


def test_a_row_by_hand():
    # A prompt of 9, answers of 6 and 3 whose last tokens are no inputs; each is predicted, and sees the prompt and itself.
    assert count_work(GROUPS[:1], "shared") == Work(9 + 5 + 2, 6 + 3, 14**2 + 2 * 11)
    one, other = GROUPS[0]
    assert count_work([[one], [other]], "packed") == Work(14 + 11, 6 + 3, 14**2 + 11**2)
    assert count_work([[one], [other]], "padded") == Work(2 * 14, 2 * 6, 2 * 14**2)


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_a_runs_steps_say_their_arithmetic_and_no_share_of_a_peak_on_a_cpu(prefcache, config):
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, "--set", "train.samples=0")
    query = "select flops, mfu from throughput order by step"
    rows = json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)
    assert all(row["mfu"] is None and row["flops"] > 0 for row in rows)
    # However its micro-batches are cut; but for a few pairs with the same prompt, which would share it in one row.
    prefcache(
        "train", config, "--set", "train.samples=0", "--set", "train.run=cut", "--set", "train.micro_batch_size=2"
    )
    cut = json.loads(prefcache("sql", query + ", run", "runs/tiny", "--json").stdout)
    totals = np.array([row["flops"] for row in cut]).reshape(-1, 2).sum(0)
    assert totals[0] == pytest.approx(totals[1], rel=0.02)


@pytest.mark.parametrize(
    ("name", "size"), [("qwen2.5-vl", (32, 48)), ("smolvlm", (32, 32)), ("internvl", (32, 32)), ("mistral3", (32, 48))]
)
def test_a_tower_costs_its_matrix_products_for_each_token_of_an_image(name, size):
    """Counted while it runs, without its attention; forward only, since the patches' own gradient is not needed."""
    folder = vision_models.save(name)
    model = vision_models.load(folder)
    inputs = image_processor.load(folder).process(np.asarray(vision_models.picture(*size))).inputs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = encode_image(model, inputs)
    freeze_unused(model, [inputs])
    products = ("mm", "addmm", "convolution", "bmm")
    ran = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).rpartition(".")[2] in products)
    counted = model_cost(model, backward=False).flops(Work(0, 0, 0, image_tokens=len(features.embeds_ND)))
    assert counted == pytest.approx(ran, rel=0.02)
    text = weights.load_base(Reference(folder), "float32", "sdpa", "cpu", "language")
    assert model_cost(text).position == model_cost(model).position and model_cost(text).image_token == 0
