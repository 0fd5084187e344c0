"""A traced step: its memory against a real one's, its arithmetic by hand, and what settings change."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import chunked_lm_head
from prefcache.pipeline.training import optimizers
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.step_trace import Lengths, make_examples, trace_step
from tests.bench.corpus import padding_tokenizer
from tests.helpers.project import ROOT

PAIRS = [Lengths(90, 40, 25), Lengths(30, 60, 50), Lengths(120, 9, 31), Lengths(15, 22, 18)]
SIZES: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(**SIZES)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"tokens_per_micro_batch": 300}, marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_within_three_percent_of_what_a_real_step_allocates(tmp_path: Path, settings: dict[str, Any]):
    """By PyTorch's profiler, on the CPU, so by the CPU's kernels and sizes."""
    train = Train(**{"tokens_per_micro_batch": 4000, **settings}, precision="float32", device="cpu", batch_size=4)
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    padding_tokenizer().save_pretrained(tmp_path)
    examples, objective, everything = make_examples(PAIRS), Objective(train), np.arange(len(PAIRS))
    policy = Policy(Reference(tmp_path), None, train, make_accelerator(train), examples.longest(2), print)
    assert policy.forward.layout == "shared"
    policy.update(examples, everything, objective, {}, 1e-6)
    held = sum(
        tensor.nbytes for tensor in [*policy.parameters.values(), *optimizers.get_state(policy._optimizer).values()]
    )
    gc.collect()  # garbage that is freed meanwhile would lower the sum
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        policy.update(examples, everything, objective, {}, 1e-6)
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    real = held + int(np.cumsum(changes).max())

    cost = trace_step(LLAMA, train, PAIRS, kind="cpu")
    assert cost.peak_bytes == pytest.approx(real, rel=0.03)
    assert cost.held_bytes == pytest.approx(held, rel=0.003)
    assert sum(vars(cost.parts).values()) == cost.peak_bytes


def test_released_gradients_never_exist_together():
    deep = LlamaConfig(**SIZES | {"vocab_size": 300, "num_hidden_layers": 12})
    unclipped: dict[str, Any] = {"max_grad_norm": None, "gradient_checkpointing": True}
    ordinary, released = (
        trace_step(deep, Train(release_gradients=is_released, **unclipped), PAIRS) for is_released in (False, True)
    )
    sizes = sorted(parameter.nbytes for parameter in LlamaForCausalLM(deep).parameters())
    # At its peak, in the first layer, an ordinary step has nearly all gradients.
    assert ordinary.parts.gradients > 0.9 * sum(sizes)
    # A released one has at most two at a time, and its peak where the backward pass begins and all layers' inputs are alive.
    assert released.parts.gradients <= sum(sizes[-2:])
    assert released.peak_bytes < ordinary.peak_bytes - sum(sizes) / 4


def test_arithmetic_by_hand():
    cost = trace_step(LLAMA, Train(), PAIRS)
    hidden, intermediate, layers, vocabulary, width = 128, 256, 3, 3000, 64  # of keys and values
    n = sum(p + c - 1 + r - 1 for p, c, r, _ in PAIRS)
    linear = layers * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * intermediate)
    # Causal: a query sees the keys up to its own; the rejected answer the prompt and itself. Backward computes scores again.
    attended = sum((p + c - 1) * (p + c) // 2 + (r - 1) * p + (r - 1) * r // 2 for p, c, r, _ in PAIRS)
    n_head = sum(pair.chosen + pair.rejected for pair in PAIRS)
    head = 3 * 2 * n_head * hidden * vocabulary
    expected = 3 * 2 * n * linear + layers * (4 + 10) * hidden * attended
    rope = 3 * n * 32  # the product of positions and frequencies, which is in float32
    assert cost.flops["bfloat16"] + cost.flops["float32"] == pytest.approx(expected + head + rope, rel=1e-3)
    assert cost.attention == ("_varlen_attn",)
    assert len(cost.head) > 0


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_next_to_nothing_of_a_bf16_step_is_multiplied_in_float32(weights, monkeypatch):
    """Not the head either, which has several chunks here: all that is left is the rotation's product."""
    monkeypatch.setattr(chunked_lm_head, "_chunk_positions", lambda model: 64)
    cost = trace_step(LLAMA, Train(weights=weights), PAIRS)
    assert cost.flops["float32"] < 1e-3 * cost.flops["bfloat16"]
    assert cost.head == ("mm, bfloat16 to float32",)
    in_float32 = trace_step(LLAMA, Train(weights=weights, head_dtype="float32"), PAIRS)
    assert in_float32.flops["float32"] > 0.1 * in_float32.flops["bfloat16"]


def test_what_is_held_follows_from_the_settings():
    n = sum(p.numel() for p in LlamaForCausalLM(LLAMA).parameters())
    by_setting = {
        "float32": trace_step(LLAMA, Train(gradient_checkpointing=True), PAIRS),
        "bfloat16": trace_step(LLAMA, Train(gradient_checkpointing=True, weights="bfloat16"), PAIRS),
        "lora": trace_step(LLAMA, Train(gradient_checkpointing=True, lora=Lora(r=4, base_dtype="bfloat16")), PAIRS),
    }
    held = {name: cost.held_bytes / n for name, cost in by_setting.items()}
    # Weights and two moments; under an adapter little more than the weights.
    assert held["float32"] == pytest.approx(12, rel=0.01)
    assert held["bfloat16"] == pytest.approx(6, rel=0.01)
    assert 2 < held["lora"] < held["bfloat16"]
    again = trace_step(LLAMA, Train(gradient_checkpointing=True, weights="bfloat16"), PAIRS)
    assert again == by_setting["bfloat16"]  # no chance in it


def test_each_phase_has_a_peak_that_grows_by_the_same_with_every_layer():
    depths = [trace_step(LlamaConfig(**SIZES | {"num_hidden_layers": n}), Train(), PAIRS) for n in (3, 4, 7)]
    assert list(depths[0].peaks) == ["forward", "head", "layers", "update"]
    for phase in depths[0].peaks:
        three, four, seven = (sum(vars(cost.peaks[phase]).values()) for cost in depths)
        assert seven == pytest.approx(three + 4 * (four - three), rel=1e-3)
    # While parameters are updated, weights, gradients and moments are held, and no activations.
    n = sum(p.numel() for p in LlamaForCausalLM(LLAMA).parameters())
    update = depths[0].peaks["update"]
    assert update.weights + update.gradients + update.optimizer == pytest.approx(16 * n, rel=0.003)
    assert depths[0].peak_bytes == max(sum(vars(parts).values()) for parts in depths[0].peaks.values())


def test_recomputed_layers_take_arithmetic_and_save_memory():
    plain, recomputed = (trace_step(LLAMA, Train(gradient_checkpointing=each), PAIRS) for each in (False, True))
    assert recomputed.flops["bfloat16"] > 1.15 * plain.flops["bfloat16"]
    assert recomputed.peak_bytes < plain.peak_bytes
    rates = {"bfloat16": 1e12, "float32": 1e11}
    assert recomputed.seconds(rates, 1e12) > plain.seconds(rates, 1e12) > plain.bytes_moved / 1e12


def test_a_mixture_of_experts_computes_the_chosen_ones():
    sizes = SIZES | {"num_hidden_layers": 1, "moe_intermediate_size": 64, "num_experts": 8, "head_dim": 32}
    two, four = (
        trace_step(Qwen3MoeConfig(**sizes, num_experts_per_tok=n), Train(weights="bfloat16"), PAIRS) for n in (2, 4)
    )
    n = sum(p + c - 1 + r - 1 for p, c, r, _ in PAIRS)
    assert sum(four.flops.values()) - sum(two.flops.values()) == 3 * 2 * n * 2 * 3 * 128 * 64


def test_eight_bit_moments(torchao: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(torchao))
    n = sum(p.numel() for p in LlamaForCausalLM(LLAMA).parameters())
    cost = trace_step(LLAMA, Train(weights="bfloat16", optimizer="adamw_8bit"), PAIRS)
    assert cost.held_bytes / n == pytest.approx(2 + 2 * (1 + 4 / 256), rel=0.03)


def test_processes_share_what_is_held():
    train = Train(weights="bfloat16", gradient_checkpointing=True, shard="fsdp")
    one, eight = (trace_step(LLAMA, train, PAIRS, processes=n) for n in (1, 8))
    assert eight.held_bytes == pytest.approx(one.held_bytes / 8, rel=0.04)  # blocks of 512 bytes
    assert eight.flops == one.flops
    # A layer is gathered while it is computed, and what lies outside of layers during the whole step.
    root = 2 * SIZES["vocab_size"] * SIZES["hidden_size"] * 2
    assert eight.peak_bytes > eight.held_bytes + root


@pytest.mark.slow  # the test above, of one model twice as deep
def test_released_gradients_are_never_there_together():
    settings = {"weights": "bfloat16", "gradient_checkpointing": True, "max_grad_norm": None, "batch_size": 4}
    deep = LlamaConfig(**SIZES | {"num_hidden_layers": 24, "vocab_size": 300})
    kept, released = (trace_step(deep, Train(**settings, release_gradients=each), PAIRS) for each in (False, True))
    n_layers = sum(p.numel() for name, p in LlamaForCausalLM(deep).named_parameters() if ".layers." in name)
    # A layer's gradients are there only while it is computed, next to the inputs of the layers below.
    assert kept.peak_bytes - released.peak_bytes > 0.5 * 2 * n_layers


def test_a_folder_without_weights_is_enough(tmp_path: Path):
    LLAMA.save_pretrained(tmp_path)
    assert trace_step(tmp_path, Train(), PAIRS) == trace_step(LLAMA, Train(), PAIRS)
    assert torch.device("cpu") == torch.empty(1).device


@pytest.mark.slow
def test_a_traced_step_leaves_nothing_for_duckdb_to_report_at_the_end():
    trace = "trace_step(LLAMA, Train(batch_size=4), PAIRS)"
    program = f"import duckdb\nfrom tests.pipeline.training.test_step_trace import *\n{trace}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr
