"""The rows of the ledger: which step, and what it costs.

prefcache   the program's own update; `live`: with a frozen bf16 model in memory that runs in every step, which it cannot do
sft         the same update with the mean log-prob of both answers as its loss, and no reference
plain-sft   Transformers' forward on one row of as many tokens, its own loss over all of them, clipping, fused AdamW
trl         DPOTrainer; `default` batches of 8 pairs, or the `best` of batches of 1 to 16, sorted by length, without recomputed layers
scorer      the reference's log-probs of the same pairs
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.model import attention
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.lm_head import choose_head_dtype, set_head_dtype
from prefcache.pipeline.model.traced_gpu import GPU, Op, Trace, trace_gpu
from prefcache.pipeline.model.weights import make_language_model
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.gpus import Gpu, find_gpu
from prefcache.pipeline.training.losses import LOSSES
from prefcache.pipeline.training.losses.registry import loss
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.step_trace import (
    Lengths,
    StepCost,
    TracedPolicy,
    count_attended,
    make_examples,
    make_model,
    measure_cost,
    trace_step,
)
from tests.bench.gpu.ledger import trl_step
from tests.bench.gpu.ledger.models import IMAGE_TOKENS, MODELS, make_config, step_pairs
from tests.bench.gpu.ledger.trl_step import TrlSettings, trace_trl

LAUNCH_SECONDS = 4e-6
GPUS = ("A100", "H100", "H200", "B200")
# Layers of the two traces from which the operations of a deep TRL step are extrapolated; each further layer adds the same.
_SHALLOW = (1, 2)


@dataclass(frozen=True)
class Row:
    model: str
    trainer: str
    reference: str = "none"  # cached, live, precomputed
    weights: str = "bfloat16"
    optimizer: str = "adamw"
    lora: int | None = None
    release_gradients: bool = False
    checkpointing: bool = True
    processes: int = 1
    batch: str = ""  # of TRL: pairs x micro-batches

    @property
    def name(self) -> str:
        words = [self.trainer, self.reference, self.weights, self.optimizer]
        words += [f"lora r={self.lora}"] if self.lora else []
        words += ["released"] if self.release_gradients else []
        words += [] if self.checkpointing else ["kept"]
        words += [f"/{self.processes}"] if self.processes > 1 else []
        return " ".join([*words, self.batch]).strip()


def rows() -> Iterator[Row]:
    yield from _shallow_rows("0.5B-4-layers")
    for model in [name for name in list(MODELS)[1:] if name not in IMAGE_TOKENS]:
        yield from _shard_rows(model) if model == "70B" else _full_rows(model)
        yield from _lora_rows(model)
        yield Row(model, "scorer", optimizer="none", checkpointing=False)
    for model in IMAGE_TOKENS:
        yield from _image_rows(model)


def _image_rows(model: str) -> Iterator[Row]:
    ours = functools.partial(Row, model, "prefcache", "cached")
    yield from (ours(), ours(checkpointing=False), ours(optimizer="adamw_8bit", release_gradients=True), ours(lora=16))
    yield ours(processes=8)


def _shallow_rows(model: str) -> Iterator[Row]:
    ours = functools.partial(Row, model, "prefcache", "cached")
    yield from (ours(weights="float32"), ours(), ours(checkpointing=False), ours(release_gradients=True), ours(lora=16))
    yield ours(processes=8)
    yield from (Row(model, "sft"), Row(model, "scorer", optimizer="none", checkpointing=False))


def _full_rows(model: str) -> Iterator[Row]:
    ours = functools.partial(Row, model, "prefcache", "cached")
    # Float32 weights of the mixture take half a terabyte, and its experts would compute outside of the tensor cores.
    for weights in ("float32", "bfloat16") if model in ("0.5B", "8B") else ("bfloat16",):
        yield ours(weights=weights)
        yield ours(weights=weights, checkpointing=False)
        yield Row(model, "prefcache", "live", weights=weights)
        yield Row(model, "sft", weights=weights)
        yield Row(model, "plain-sft", weights=weights)
        for reference in ("live", "precomputed"):
            for batch in ("default", "best"):
                yield Row(model, "trl", reference, weights=weights, batch=batch)
    yield ours(optimizer="adamw_8bit")
    yield ours(optimizer="adamw_8bit", release_gradients=True)
    yield Row(model, "sft", optimizer="adamw_8bit", release_gradients=True)


def _shard_rows(model: str) -> Iterator[Row]:
    for processes in (8, 64):
        yield Row(model, "prefcache", "cached", processes=processes)
        yield Row(model, "prefcache", "cached", release_gradients=True, processes=processes)
        yield Row(model, "sft", processes=processes)


def _lora_rows(model: str) -> Iterator[Row]:
    yield Row(model, "prefcache", "cached", lora=16)
    yield Row(model, "sft", lora=16)
    for reference in ("live", "precomputed") if model != "70B" else ():
        yield Row(model, "trl", reference, lora=16, batch="best")


def train_settings(row: Row) -> Train:
    settings: dict[str, Any] = {"gradient_checkpointing": row.checkpointing, "optimizer": row.optimizer}
    if row.lora:
        settings["lora"] = Lora(r=row.lora, base_dtype=row.weights)
    else:
        settings["weights"] = row.weights
    if row.release_gradients:
        settings |= {"release_gradients": True, "max_grad_norm": None, "batch_size": 16}
    if row.processes > 1:
        settings["shard"] = "fsdp"
    return Train(**settings)


def trace_row(row: Row, layers: int | None = None) -> tuple[Row, StepCost]:
    """Trace a row; return it with the batches that were chosen."""
    config, pairs = make_config(row.model, layers), step_pairs(model=row.model)
    if row.trainer == "trl":
        return _trace_trl_row(row, pairs, layers)
    traced: dict[str, Callable[[], StepCost]] = {
        "prefcache": lambda: (
            _trace_live(config, row, pairs)
            if row.reference == "live"
            else trace_step(config, train_settings(row), pairs, processes=row.processes)
        ),
        "sft": lambda: _trace_sft(config, row, pairs),
        "plain-sft": lambda: _trace_plain_sft(config, row, pairs),
        "scorer": lambda: _trace_scorer(config, row, pairs),
    }
    return row, traced[row.trainer]()


# -- ours ------------------------------------------------------------------------------------------------------------


def _trace_sft(config: Any, row: Row, pairs: Sequence[Lengths]) -> StepCost:
    """Both answers' log-probs are learned, so that the row is the same."""

    def ledger_sft(chosen_logp: torch.Tensor, rejected_logp: torch.Tensor) -> torch.Tensor:
        """Negative log-prob of both answers."""
        return -(chosen_logp + rejected_logp)

    loss("-(chosen + rejected)", when="here")(ledger_sft)
    try:
        train = train_settings(row).model_copy(update={"loss": "ledger_sft"})
        return trace_step(config, train, pairs, processes=row.processes)
    finally:
        del LOSSES["ledger_sft"]


def _trace_live(config: Any, row: Row, pairs: Sequence[Lengths]) -> StepCost:
    train = train_settings(row)
    with trace_gpu() as trace:
        policy = TracedPolicy(make_model(config, train, trace), train, trace)
        frozen = _make_frozen(config, trace)
        policy.make_optimizer_state()
        trace.restart()
        _score(frozen, trace, pairs)
        policy.update(make_examples(pairs), np.arange(len(pairs)), Objective(train), {}, train.learning_rate)
        return measure_cost(trace)


def _trace_scorer(config: Any, row: Row, pairs: Sequence[Lengths]) -> StepCost:
    with trace_gpu() as trace:
        frozen = _make_frozen(config, trace)
        trace.restart()
        _score(frozen, trace, pairs)
        return measure_cost(trace)


def _make_frozen(config: Any, trace: Trace) -> Forward:
    """The scorer's model, as the engine `transformers` has it."""
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    set_head_dtype(model, choose_head_dtype(None, "bfloat16", "cuda"), frozen=True)
    trace.head_shape = tuple(model.get_output_embeddings().weight.shape)
    trace.assign("weights", [*model.parameters(), *model.buffers()])
    forward = Forward(model, "sdpa", "shared", "bfloat16", "score.rows")
    forward.layout = "shared"
    attention.use_segments(model)
    return forward


def _score(forward: Forward, trace: Trace, pairs: Sequence[Lengths]) -> None:
    prompts = [np.full(pair.prompt, i, np.int32) for i, pair in enumerate(pairs)]
    groups = [
        [TokenSequence(prompt, np.full(n, token, np.int32)) for token, n in ((1, pair.chosen), (0, pair.rejected))]
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    trace.attended = count_attended(groups)
    with torch.no_grad():
        torch.cat(forward.logps(groups).logps).cpu().numpy()


# -- others ----------------------------------------------------------------------------------------------------------


def _trace_plain_sft(config: Any, row: Row, pairs: Sequence[Lengths]) -> StepCost:
    """One row, its tokens not kept apart; the loss is Transformers'."""
    n_tokens = sum(pair.prompt + pair.chosen + pair.rejected - 2 for pair in pairs)
    with trace_gpu() as trace:
        with GPU:
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, row.weights), attn_implementation="sdpa"
            )
        model.train()
        if row.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trace.assign("weights", [*model.parameters(), *model.buffers()])
        trace.head_shape = tuple(model.get_output_embeddings().weight.shape)
        optimizer = trl_step.make_optimizer(model, trace)
        ids = torch.ones(1, n_tokens, dtype=torch.long).to(GPU, non_blocking=True)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return measure_cost(trace)


def _trace_trl_row(row: Row, pairs: Sequence[Lengths], layers: int | None) -> tuple[Row, StepCost]:
    if row.batch == "default":
        chosen = TrlSettings(row.reference, row.weights, 8, True, row.lora)
    else:
        candidates = trl_step.ways(row.reference, row.weights, row.lora)
        chosen = min(candidates, key=lambda each: step_seconds(_trl_operations(row.model, each, layers), "H100"))
    batches = trl_step.batches(pairs, chosen)
    # The step's peak is that of its largest micro-batch, with the gradients of others there.
    largest = max(batches, key=lambda batch: len(batch) * max(p.prompt + max(p.chosen, p.rejected) for p in batch))
    config = make_config(row.model, layers)
    peak = trace_trl(config, chosen, [largest], accumulated=len(batches) > 1)
    cost = replace(
        _trl_operations(row.model, chosen, layers),
        peak_bytes=peak.peak_bytes,
        parts=peak.parts,
        held_bytes=peak.held_bytes,
    )
    shape = f"{row.batch} {chosen.per_batch}x{len(batches)}"
    return replace(row, batch=shape, checkpointing=chosen.checkpointing), cost


@functools.cache
def _trl_operations(model: str, settings: TrlSettings, layers: int | None) -> StepCost:
    """The operations of all micro-batches, extrapolated from two shallow traces."""
    pairs = step_pairs()
    costs = [trace_trl(make_config(model, n), settings, trl_step.batches(pairs, settings)) for n in _SHALLOW]
    depth = layers or MODELS[model]["num_hidden_layers"]
    return extrapolate(*costs, times=depth - _SHALLOW[0])


def extrapolate(shallow: StepCost, deeper: StepCost, times: int) -> StepCost:
    """Add the difference of one layer `times` to a step. Memory is that of the shallow one."""

    def add(name: str) -> int:
        return int(getattr(shallow, name) + times * (getattr(deeper, name) - getattr(shallow, name)))

    ops: Counter[Op] = Counter(shallow.ops)
    for op in deeper.ops.keys() | shallow.ops.keys():
        ops[op] += times * (deeper.ops.get(op, 0) - shallow.ops.get(op, 0))
    flops = {name: n + times * (deeper.flops[name] - n) for name, n in shallow.flops.items()}
    sums = {name: add(name) for name in ("kernels", "syncs", "copies", "bytes_moved")}
    return replace(shallow, flops=flops, ops=dict(ops), **sums)


# -- bounds ----------------------------------------------------------------------------------------------------------


def gpu(name: str) -> Gpu:
    known = find_gpu(name)
    assert known is not None
    return known


def roofline_seconds(cost: StepCost, name: str) -> float:
    known = gpu(name)
    return cost.seconds({"bfloat16": known.bf16_flops, "float32": known.float32_flops}, known.bytes_per_second)


def step_seconds(cost: StepCost, name: str) -> float:
    """The larger of the two bounds: arithmetic and traffic, and the launches."""
    return max(roofline_seconds(cost, name), cost.kernels * LAUNCH_SECONDS)


def count_needed_flops(model: str, lora: int | None) -> float:
    """Arithmetic that no technique leaves out, forward and backward: a prompt once, no padding, causal attention."""
    whole, pairs = make_config(model), step_pairs(model=model)
    with torch.device("meta"):
        made = make_language_model(whole)
    config = whole.get_text_config()
    layers = 0.0
    for name, p in made.named_parameters():
        if ".layers." in name and p.ndim == 2:
            layers += p.numel()
        if ".layers." in name and p.ndim == 3:
            layers += p.numel() * config.num_experts_per_tok / len(p)
    n_tokens = sum(pair.prompt + pair.chosen + pair.rejected - 2 for pair in pairs)
    n_head = sum(pair.chosen + pair.rejected for pair in pairs)
    groups = [[TokenSequence(np.zeros(p), np.full(n, token)) for token, n in ((1, c), (0, r))] for p, c, r, _ in pairs]
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)  # fmt: skip
    linear = 2 * (n_tokens * layers + n_head * config.hidden_size * config.vocab_size)
    passes = 2 if lora else 3
    return passes * linear + 3 * 4 * config.num_hidden_layers * width * count_attended(groups)
