"""Sequences scored a second, and how far each way's log-probs are from the plain float32 forward's.

    ours        as the engine `transformers` computes: packed, a prompt once, the head on answers only
    packed      the same with a prompt for each of its answers
    sorted-N    Transformers, the longest first, N padded tokens a batch, the head on answers only
    trl-N       DPOTrainer's precompute_ref_log_probs, N pairs a batch
    vllm        engine `vllm`, where .venv-vllm or score.vllm.python has it
    bare        the model on rows without padding that have as many tokens as are needed, and its head on as many positions:
                ids are on the device already, and nothing is brought back. It is a floor, and no way to score

Weights are bf16 on a GPU, float32 on a CPU.
"""

import contextlib
import copy
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prefcache.pipeline.model.lm_head import set_head_dtype
from prefcache.pipeline.model.logprobs import plain_logps
from tests.bench import contest, corpus
from tests.bench import score as of_cpu
from tests.bench.corpus import TokenPair
from tests.bench.gpu import machine, ours, work
from tests.bench.gpu.machine import DEVICE, ON_GPU, Budget
from tests.bench.gpu.train import target
from tests.bench.gpu.work import Needed

Score = Callable[[list[TokenPair]], list[Any]]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CONTENDERS = ("ours", "packed", "sorted-16384", "sorted-65536", "trl-8", "trl-32", "vllm", "bare")
TINY = tuple(name for name in CONTENDERS if name != "vllm")  # which takes a minute to start
SAMPLE = 8  # pairs whose log-probs are compared
ROW = 2048  # tokens of a row of the bare forward


def run(tiny: bool, budget: Budget) -> dict[str, Any]:
    shape = work.SHAPES["tiny" if tiny else "0.5B"]
    pairs = corpus.token_pairs(16 if tiny else 512, shape["vocab_size"], seed=3)
    model = work.build(shape, DTYPE)
    found: dict[str, dict[str, Any]] = {name: {} for name in (TINY if tiny else CONTENDERS)}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scorers = _scorers(shape, model, pairs, Path(name), found, budget, stack)
        parity = _parity(shape, scorers, pairs[:SAMPLE])
        turns = {name: _turn(score, pairs, found[name]) for name, score in scorers.items()}
        for seconds in contest.rounds(turns, 1 if tiny else 5, budget.over):
            for name, took in seconds.items():
                found[name].setdefault("seconds", []).append(took)
    for each in found.values():
        if "seconds" in each:
            each["sequences_per_second"] = 2 * len(pairs) / statistics.median(each["seconds"])
    _say(found, Needed.of(pairs))
    return {"contenders": found, "parity": parity, "targets": _say_targets(found)}


def _scorers(
    shape: dict[str, Any],
    model: Any,
    pairs: list[TokenPair],
    folder: Path,
    found: dict[str, Any],
    budget: Budget,
    stack: contextlib.ExitStack,
) -> dict[str, Score]:
    """Those that can be had, each having scored once; of the others `found` says why not."""
    scorers: dict[str, Score] = {}
    for name in found:
        if why := ("no time was left" if budget.over() else _absent(name)):
            found[name]["why"] = why
            continue
        try:
            scorers[name] = _make(name, shape, model, pairs, folder, stack)
            scorers[name](pairs)
        except Exception as error:  # of one contender; the others go on
            scorers.pop(name, None)
            found[name]["why"] = machine.why_failed(error)
    return scorers


def _absent(name: str) -> str | None:
    if name.startswith("trl"):
        return machine.absent("trl", "datasets")
    if name == "vllm":
        return machine.absent("pydantic", "xxhash") or (None if of_cpu._has_vllm() else "absent: make vllm builds it")
    return None


def _make(
    name: str, shape: dict[str, Any], model: Any, pairs: list[TokenPair], folder: Path, stack: contextlib.ExitStack
) -> Score:
    kind, _, number = name.partition("-")
    if kind in ("ours", "packed"):
        way = "shared" if kind == "ours" else "packed"
        return ours.scorer(copy.deepcopy(model), way, str(DTYPE).removeprefix("torch."), pairs)
    if kind == "sorted":
        return of_cpu.sorted_by_length(model, int(number)).score
    if kind == "trl":
        settings = {"use_cpu": not ON_GPU, "bf16": ON_GPU, "output_dir": str(folder / name)}
        return of_cpu.trl_precompute(work.build(shape, DTYPE), work.build(shape, DTYPE), int(number), settings).score
    if kind == "vllm":
        return _vllm(model, folder / "model", stack)
    return _bare(model, pairs)


def _vllm(model: Any, folder: Path, stack: contextlib.ExitStack) -> Score:
    from prefcache.pipeline.config import Score as Settings
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.scoring.engines import find_engine

    model.save_pretrained(folder)
    corpus.padding_tokenizer().save_pretrained(folder)
    options = {"gpu_memory_utilization": 0.4} if ON_GPU else {}
    settings = {"engine": "vllm", "dtype": str(DTYPE).removeprefix("torch."), "vllm": {"options": options}}
    engine = find_engine("vllm").load(Reference(folder), Settings.model_validate(settings))
    stack.callback(engine.close)
    return lambda pairs: list(engine.score(work.sequences(pairs)))


def _bare(model: Any, pairs: list[TokenPair]) -> Score:
    needed, head = Needed.of(pairs), model.lm_head
    n_row = min(ROW, needed.positions)
    ids = torch.randint(model.config.vocab_size, (math.ceil(needed.positions / n_row), n_row), device=DEVICE)
    of_row = math.ceil(needed.head_positions / len(ids))

    @torch.inference_mode()
    def score(_: list[TokenPair]) -> list[Any]:
        for row in ids.split(max(1, ours.BUDGET // n_row)):
            hidden = model.model(input_ids=row, use_cache=False).last_hidden_state[:, :of_row]
            for some in hidden.flatten(0, 1).split(2048):
                F.cross_entropy(head(some), torch.zeros(len(some), dtype=torch.long, device=DEVICE), reduction="none")
        return []

    return score


def _turn(score: Score, pairs: list[TokenPair], found: dict[str, Any]) -> Callable[[], float]:
    def turn() -> float:
        machine.forget_peak()
        seconds = machine.timed(lambda: score(pairs))
        found["peak_bytes"] = machine.peak()
        return seconds

    return turn


# -- parity ----------------------------------------------------------------------------------------------------------


def _parity(shape: dict[str, Any], scorers: dict[str, Score], pairs: list[TokenPair]) -> list[dict[str, Any]]:
    """Of every contender and of our ways in float32 and bf16: deviations of a token, and of an answer's mean."""
    exact = work.build(shape, torch.float32)
    plain = _one_by_one(exact, pairs)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    found = [_deviation("plain", "bfloat16", _one_by_one(rounded, pairs), plain)]
    for dtype, model in (("float32", exact), ("bfloat16", rounded)):
        for way in ("shared", "packed", "padded"):
            scored = ours.scorer(copy.deepcopy(model), way, dtype, pairs)(pairs)
            found.append(_deviation(f"ours, {way}", dtype, scored, plain))
    dtype = str(DTYPE).removeprefix("torch.")
    for name in scorers.keys() - {"ours", "packed", "bare"}:
        found.append(_deviation(name, dtype, scorers[name](pairs), plain))
    print("Deviation from the plain float32 forward, nats      p50       p99       max   of an answer's mean at most")
    for each in found:
        tokens = "".join(f"{each[key]:10.1e}" if key in each else " " * 10 for key in ("p50", "p99", "max"))
        print(f"  {each['name']:24} {each['dtype']:10} {' ' * 9}{tokens} {each['answer']:10.1e}")
    print(flush=True)
    return found


def _one_by_one(model: Any, pairs: list[TokenPair]) -> list[np.ndarray]:
    set_head_dtype(model, "float32", frozen=True)
    with torch.inference_mode():
        return [plain_logps(model, each).cpu().numpy() for each in work.sequences(pairs)]


def _deviation(name: str, dtype: str, found: list[Any], plain: list[np.ndarray]) -> dict[str, Any]:
    """Some give an answer's sum only."""
    assert len(found) == len(plain)
    sums = [abs(float(np.sum(x, dtype=np.float64)) - y.sum(dtype=np.float64)) / len(y) for x, y in zip(found, plain, strict=True)]  # fmt: skip
    each: dict[str, Any] = {"name": name, "dtype": dtype, "answer": max(sums)}
    if all(np.shape(x) == y.shape for x, y in zip(found, plain, strict=True)):
        apart = np.abs(np.concatenate(found) - np.concatenate(plain))
        each |= {"p50": float(np.median(apart)), "p99": float(np.quantile(apart, 0.99)), "max": float(apart.max())}
    return each


# -- what is said ----------------------------------------------------------------------------------------------------


def _say(found: dict[str, dict[str, Any]], needed: Needed) -> None:
    print("                sequences/s   needed tokens/s   GiB at its peak")
    for name, each in found.items():
        if "seconds" not in each:
            print(f"  {name:14}{each.get('why', 'no time was left')}")
            continue
        tokens = needed.positions / statistics.median(each["seconds"])
        print(f"  {name:14}{each['sequences_per_second']:11,.1f} {tokens:17,.0f} {each['peak_bytes'] / 2**30:17.2f}")
    print(flush=True)


def _say_targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rate = {name: each["sequences_per_second"] for name, each in found.items() if "seconds" in each}
    targets = []
    best = max((name for name in rate if name.startswith("trl")), key=rate.__getitem__, default=None)
    if best and "ours" in rate:
        targets.append(
            target(f"ours is times TRL's precompute at its best, {best}", rate["ours"] / rate[best], at_least=4)
        )
    else:
        print("  times TRL's precompute: not measured; wanted 4")
    if {"ours", "bare"} <= rate.keys():
        targets.append(target("ours takes times the bare forward", rate["bare"] / rate["ours"], at_most=1.3))
    return targets
