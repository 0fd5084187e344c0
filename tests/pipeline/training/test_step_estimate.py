"""What is said of a deep model's step, from traces of three and four layers, is what a trace of all layers shows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.training import optimizers
from prefcache.pipeline.training.gpus import Gpu
from prefcache.pipeline.training.step_estimate import LEFT_FREE, StepEstimator, cut_pairs, total
from prefcache.pipeline.training.step_trace import Lengths, trace_step

SIZES = {
    "vocab_size": 3000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MEAN = Lengths(1000, 2000, 1500)
SETTINGS = [
    {},
    {"gradient_checkpointing": True, "weights": "bfloat16"},
    {"lora": Lora(r=4, base_dtype="bfloat16"), "gradient_checkpointing": True},
]


def start(config) -> StepEstimator:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return StepEstimator(config, model, MEAN, longest=1000)


def direct(config, train: Train, tokens: int) -> int:
    whole = train.model_copy(update={"tokens_per_micro_batch": 1 << 40, "batch_size": 1 << 30})
    return trace_step(config, whole, cut_pairs(MEAN, tokens)).peak_bytes


@pytest.mark.parametrize(
    "settings", [SETTINGS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in SETTINGS[1:])]
)
def test_a_deep_model_takes_what_a_trace_of_all_its_layers_shows(settings):
    config, train = LlamaConfig(**SIZES), Train(**settings)
    steps = start(config)
    assert steps.estimate(train, 1, 1500).peak_bytes == pytest.approx(direct(config, train, 1500), rel=0.01)


def test_the_tokens_that_are_said_to_fit_do():
    config, train, card = LlamaConfig(**SIZES), Train(), 1e9
    steps = start(config)
    fitting = steps.tokens_that_fit(train, 1, card)
    assert 512 < fitting < 32_768
    assert 0.97 * (1 - LEFT_FREE) * card <= direct(config, train, fitting) <= 1.005 * (1 - LEFT_FREE) * card
    assert steps.tokens_that_fit(train, 1, 1e7) == 0
    assert steps.tokens_that_fit(train, 1, 1e12) == 32_768  # the most that are traced


def test_layers_of_several_shapes_are_all_traced():
    alike = Gemma3TextConfig(**SIZES, head_dim=64, sliding_window=64)
    assert start(alike)._depths == (3, 4)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 6})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.model.layers[1].mlp.down_proj = torch.nn.Linear(100, 256)
    assert StepEstimator(config, model, MEAN, 1000)._depths == (6,)


def test_smaller_moments_and_shards_by_hand():
    config = LlamaConfig(**SIZES)
    steps = start(config)
    n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).parameters())
    plain, small = (steps.estimate(Train(optimizer=name), 1, 700).peaks["update"] for name in ("adamw", "adamw_8bit"))
    assert plain.optimizer == pytest.approx(8 * n, rel=0.01)
    assert small.optimizer == pytest.approx(optimizers.state_bytes("adamw_8bit", torch.float32) * n, rel=0.01)
    # Without shards each process has everything, and a second copy of the gradients to exchange; with eight of them an eighth.
    several, eighth = (steps.estimate(Train(shard=shard), 8, 700).peaks["update"] for shard in ("none", "fsdp"))
    assert total(several) == total(plain) + plain.gradients
    assert total(eighth) == pytest.approx(16 * n / 8, rel=0.02)


def test_the_least_time_is_bounded_by_arithmetic_and_by_traffic():
    config, steps = LlamaConfig(**SIZES), start(LlamaConfig(**SIZES))
    cost = trace_step(config, Train(), cut_pairs(MEAN, 4096))
    slow_arithmetic, slow_memory = Gpu("a", 1e9, 1e9, 1e18, 1e9), Gpu("b", 1e18, 1e18, 1e9, 1e9)
    assert steps.seconds(Train(), 1, 4096, slow_arithmetic) == pytest.approx(sum(cost.flops.values()) / 1e9, rel=0.01)
    assert steps.seconds(Train(), 1, 4096, slow_memory) == pytest.approx(cost.bytes_moved / 1e9, rel=0.01)


@pytest.mark.parametrize("tokens", [2, 511, 900, 4096])
def test_pairs_take_as_many_tokens_as_are_asked_for(tokens):
    assert sum(p + c - 1 + r - 1 for p, c, r, _ in cut_pairs(MEAN, tokens)) == tokens
