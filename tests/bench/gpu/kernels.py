"""Whether the device computes what it should, and with which kernels.

`check` compares log-probs and gradients, on pairs drawn afresh, with the plain float32 forward on the CPU, one sequence at a
time. It raises `Wrong`, and nothing is timed after that. `run` names the attention that was used, from the profiler, and refuses
a GPU's bf16 row that did not reach the variable-length kernel; none of our ways uses FlexAttention. It counts the times that
the host waits between micro-batches, and says how fast the head's product is in each precision.
"""

import copy
import os
import re
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model.forward import ROUNDING, Forward
from prefcache.pipeline.model.lm_head import choose_head_dtype, set_head_dtype
from prefcache.pipeline.model.logprobs import plain_logps, sum_logps
from tests.bench import corpus
from tests.bench.corpus import TokenPair
from tests.bench.gpu import ours, work
from tests.bench.gpu.machine import DEVICE, ON_GPU, Budget, matrix_rates

VOCABULARY = 1000
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    # Wide enough that a token's log-prob depends visibly on all tokens before it.
    "initializer_range": 0.08,
}
# What differs for an attention kernel: grouped heads, a window that most sequences exceed, capped scores.
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": SMALL | {"model_type": "llama"},
    "sliding window": SMALL | {"model_type": "mistral", "sliding_window": 24},
    "capped scores": SMALL | {"model_type": "gemma2", "sliding_window": 24, "query_pre_attn_scalar": 64},
}
# Relative error of the whole gradient.
GRADIENT = {"float32": 1e-3, "autocast": 0.1}
WAITS = re.compile(r"cuda(Stream|Event)Synchronize|aten::_local_scalar_dense|aten::nonzero")
ATTENTION = re.compile(r"_varlen_attn|_flash_attention|_scaled_dot_product|_efficient_attention|_cudnn_attention|flex_attention|flash_fwd|flash_bwd|fmha")  # fmt: skip


class Wrong(Exception):
    """The device does not compute what it should."""


class Computed(NamedTuple):
    logps: np.ndarray  # of every answer token, one after another
    gradient: torch.Tensor | None


def check(tiny: bool) -> dict[str, Any]:
    seed = int.from_bytes(os.urandom(4), "little")
    pairs = _pairs(tiny, seed)
    found: dict[str, Any] = {"seed": seed, "cases": []}
    for name, shape in MODELS.items():
        model = _build(shape, seed)
        plain = _plainly(model, pairs)
        _refuse_blind(model, pairs, plain, name)
        for precision in ("float32", "autocast", "bfloat16"):
            for way in ("shared", "packed", "padded"):
                case = _compared(copy.deepcopy(model), pairs, plain, precision, way)
                found["cases"].append({"model": name, "precision": precision, "rows": way, **case})
    _say_check(found)
    if wrong := [case for case in found["cases"] if not case["right"]]:
        raise Wrong("; ".join(f"{case['model']}, {case['precision']}, {case['rows']}: {case['why']}" for case in wrong))
    return found


def _pairs(tiny: bool, seed: int) -> list[TokenPair]:
    if tiny:
        return [TokenPair(*(ids[:30] for ids in pair)) for pair in corpus.token_pairs(2, VOCABULARY, seed=seed)]
    return corpus.token_pairs(6, VOCABULARY, seed=seed)


def _build(shape: dict[str, Any], seed: int) -> Any:
    model = work.build(shape, torch.float32, seed)
    if "capped" in _kind(model):
        model.set_attn_implementation("eager")
    return model


def _kind(model: Any) -> str:
    return "capped" if getattr(model.config, "attn_logit_softcapping", None) else "plain"


def _plainly(model: Any, pairs: list[TokenPair]) -> Computed:
    """By the model's own forward, in float32 on the CPU."""
    on_cpu = copy.deepcopy(model).cpu()
    logps = [plain_logps(on_cpu, each) for each in work.sequences(pairs)]
    _loss(logps).backward()
    return Computed(torch.cat(logps).detach().numpy(), _gradient(on_cpu))


def _refuse_blind(model: Any, pairs: list[TokenPair], plain: Computed, name: str) -> None:
    """A check that another prompt would pass as well is none."""
    others = [TokenPair(other.prompt, *pair[1:]) for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)]
    with torch.no_grad():
        of_others = torch.cat([plain_logps(model, each) for each in work.sequences(others)]).cpu().numpy()
    apart = float(np.abs(of_others - plain.logps).mean())
    assert apart > 2 * ROUNDING["bfloat16"][1], f"{name}: another prompt changes log-probs by {apart:.2g} only"
    assert plain.gradient is not None and plain.gradient.norm() > 0


def _compared(model: Any, pairs: list[TokenPair], plain: Computed, precision: str, way: str) -> dict[str, Any]:
    dtype = "float32" if precision == "float32" else "bfloat16"
    try:
        found = _by_forward(model, pairs, precision, way)
    except UsageError as error:  # of Forward.choose_layout: the layout was tried and is wrong
        return {"right": False, "why": str(error)}
    apart = np.abs(found.logps - plain.logps)
    case: dict[str, Any] = {"largest": float(apart.max()), "mean": float(apart.mean())}
    why = [] if apart.max() <= ROUNDING[dtype][0] and apart.mean() <= ROUNDING[dtype][1] else ["log-probs"]
    if found.gradient is not None:
        assert plain.gradient is not None
        case["gradient"] = float((found.gradient - plain.gradient).norm() / plain.gradient.norm())
        why += [] if case["gradient"] <= GRADIENT[precision] else ["gradient"]
    return {**case, "right": not why, "why": f"{' and '.join(why)} off: {case}" if why else ""}


def _by_forward(model: Any, pairs: list[TokenPair], precision: str, way: str) -> Computed:
    return _computed(_forward(model, pairs, precision, way), pairs, precision)


def _forward(model: Any, pairs: list[TokenPair], precision: str, way: str) -> Forward:
    trained = precision != "bfloat16"
    if not trained:
        model = model.to(torch.bfloat16)
    set_head_dtype(
        model, choose_head_dtype(None, "float32" if precision == "float32" else "bfloat16", DEVICE), frozen=not trained
    )
    kernel = "eager" if _kind(model) == "capped" else "sdpa"
    forward = Forward(model, kernel, way, "float32" if precision == "float32" else "bfloat16", "rows")
    with _precision(precision):
        forward.choose_layout(work.sequences(pairs))
    return forward


def _computed(forward: Forward, pairs: list[TokenPair], precision: str) -> Computed:
    """Gradients where weights are float32, which is how they are trained."""
    asked, trained = work.sequences(pairs), precision != "bfloat16"
    groups = forward.group(asked)
    with _precision(precision), nullcontext() if trained else torch.no_grad():
        found = forward.logps([[asked[i] for i in group] for group in groups]).logps
    back = np.argsort([i for group in groups for i in group])
    logps = [found[i] for i in back]
    if trained:
        _loss(logps).backward()
    return Computed(torch.cat(logps).detach().float().cpu().numpy(), _gradient(forward.model) if trained else None)


def _precision(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16) if precision == "autocast" else nullcontext()


def _loss(logps: list[torch.Tensor]) -> torch.Tensor:
    sums_B2 = sum_logps(logps).reshape(-1, 2)
    return -F.logsigmoid(0.1 * (sums_B2[:, 0] - sums_B2[:, 1])).mean()


def _gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float().cpu()


# -- which kernels, and what the host waits for ----------------------------------------------------------------------


def run(tiny: bool, budget: Budget) -> dict[str, Any]:
    pairs = _pairs(tiny, 1)
    used = {}
    for name, shape in MODELS.items():
        for precision in ("autocast",) if tiny else ("float32", "autocast", "bfloat16"):
            used[f"{name}, {precision}"] = counts = _used(_build(shape, 1), pairs, precision)
            if ON_GPU and precision != "float32" and "capped" not in name and not _in_one_call(counts):
                raise Wrong(
                    f"{name}, {precision}: the row did not reach varlen_attn but {', '.join(counts) or 'nothing known'}"
                )
    print("Attention by shared rows, forward and backward (operations, and how often):")
    for name, counts in used.items():
        print(f"  {name:28} " + (", ".join(f"{each} {n}" for each, n in counts.items()) or "spelt out"))
    waits = _waits(work.SHAPES["tiny" if tiny else "0.5B"], tiny)
    shape = work.SHAPES["tiny" if tiny else "0.5B"]
    rates = {} if budget.over() else matrix_rates(1024, shape["hidden_size"], shape["vocab_size"], 10)
    print(
        f"The head's product in TFLOP/s: {', '.join(f'{name} {rate:.3g}' for name, rate in rates.items())}", flush=True
    )
    return {"attention": used, "waits": waits, "head_tflops": rates}


def _in_one_call(counts: dict[str, int]) -> bool:
    """varlen_attn is FlashAttention without scaled_dot_product_attention around it."""
    names = ",".join(counts)
    return "_varlen_attn" in names or ("_flash_attention_forward" in names and "_scaled_dot_product" not in names)


def _used(model: Any, pairs: list[TokenPair], precision: str) -> dict[str, int]:
    forward = _forward(model, pairs, precision, "shared")
    with _profiled() as found:
        _computed(forward, pairs, precision)
    return _counts(found, ATTENTION)


def _waits(shape: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Of the gradient of one step in several micro-batches, which a GPU could compute without the host ever waiting."""
    pairs = corpus.token_pairs(8 if tiny else 64, shape["vocab_size"], seed=2)
    trainer = ours.Trainer("ours", shape, pairs)
    tokens = sum(len(each) for pair in pairs for each in pair)
    zeros = np.zeros((len(pairs), 2))
    trainer.gradient(pairs, zeros, tokens // 4)
    with _profiled() as found:
        trainer.gradient(pairs, zeros, tokens // 4)
    counts, n = _counts(found, WAITS), len(trainer.micro_batches(pairs, tokens // 4))
    said = ", ".join(f"{name} {count}" for name, count in counts.items()) or "never"
    print(f"The host waits in {n} micro-batches: {said}{'' if not counts else '; short of never'}", flush=True)
    return {"micro_batches": n, **counts}


def _profiled() -> Any:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])])


def _counts(found: Any, pattern: re.Pattern[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for event in found.key_averages():
        if pattern.search(event.key):
            # A kernel's name goes on with its template's arguments.
            counts[event.key.partition("<")[0]] += event.count
    return dict(sorted(counts.items()))


def _say_check(found: dict[str, Any]) -> None:
    print("Against the plain float32 forward on the CPU   largest     mean, nats a token   gradient's relative error")
    for case in found["cases"]:
        name = f"{case['model']}, {case['precision']}, {case['rows']}"
        figures = "".join(f"{case[key]:12.1e}" if key in case else " " * 12 for key in ("largest", "mean", "gradient"))
        print(f"  {name:40}{figures}   {'' if case['right'] else 'WRONG: ' + case['why']}")
    print(flush=True)
