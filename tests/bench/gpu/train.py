"""Pairs trained a second: ours, ours with one technique taken away at a time, the program's own step, and TRL's DPOTrainer.

    ours[-WORD...]        steps built on pipeline/model; the words are those of ours.WORDS
    program[-recomputed]  Policy.update, as `train` calls it
    trl-BxA[-WORD...]     DPOTrainer.train() in batches of B pairs, A a step; words: precomputed, recomputed, lora

A contender is built anew for each of its turns and takes one step that does not count; others follow it in alternating rounds.
All start from the same weights with the same pairs in the same order, so their losses agree: that is checked. TRL 1.16 computes
its log-probs in chunks always, and has its padding_free switched off.
"""

import math
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench import contest, corpus
from tests.bench.corpus import TokenPair
from tests.bench.gpu import machine, ours, work
from tests.bench.gpu.machine import ON_GPU, Budget
from tests.bench.gpu.work import Needed

CONTENDERS = (
    "program",
    "ours",
    *("trl-8x8", "trl-16x4", "trl-8x8-precomputed", "trl-16x4-precomputed"),
    *("ours-packed", "ours-padded", "ours-whole", "ours-everywhere", "ours-live", "ours-tf32"),
    *("ours-recomputed", "trl-32x2-recomputed", "trl-32x2-recomputed-precomputed"),
    *("ours-lora", "ours-lora-recomputed", "trl-16x4-lora", "trl-16x4-lora-precomputed"),
)
OF_LARGER = (
    *("program", "ours", "ours-recomputed", "trl-4x16", "trl-8x8", "trl-4x16-precomputed", "trl-8x8-precomputed"),
    *("trl-16x4-recomputed", "trl-16x4-recomputed-precomputed"),
)
TINY = (
    *("program", "ours", "ours-packed", "ours-padded", "ours-whole", "ours-everywhere", "ours-live", "ours-tf32"),
    *("ours-lora-recomputed", "trl-2x4", "trl-4x2-precomputed"),
)
WANTED = {"live": 2.5, "precomputed": 1.8}
FIRST, FALL = 0.02, 0.2  # how far a first loss may be from ln 2, and the share by which its fall may differ


@dataclass
class Setting:
    """What all contenders of a comparison share."""

    shape: dict[str, Any]
    per_step: int
    steps: int  # that are timed
    folder: Path

    def __post_init__(self) -> None:
        self.pairs = corpus.token_pairs(self.per_step * (1 + self.steps), self.shape["vocab_size"])
        self.timed = Needed.of(self.pairs[self.per_step :])
        self.model = self.folder / "model"

    def of_step(self, i: int) -> list[TokenPair]:
        return self.pairs[i * self.per_step : (i + 1) * self.per_step]

    def on_disk(self) -> Path:
        if not self.model.exists():
            work.build(self.shape, torch.float32).save_pretrained(self.model)
            corpus.padding_tokenizer().save_pretrained(self.model)
        return self.model


@dataclass
class Turn:
    seconds: float
    peak: int
    losses: list[float]  # of the last step, after the same updates, and of the first


def run(tiny: bool, budget: Budget, tflops: dict[str, float]) -> dict[str, Any]:
    found = {}
    for name, names in {"tiny": TINY}.items() if tiny else {"0.5B": CONTENDERS, "1.5B": OF_LARGER}.items():
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(work.SHAPES[name], 8 if tiny else 64, 1 if tiny else 3, Path(folder))
            share = budget.share(0.7) if name == "0.5B" else budget
            found[name] = _compare(name, setting, names, 1 if tiny else 3, share, tflops)
    return found


def _compare(
    called: str, setting: Setting, names: tuple[str, ...], n_rounds: int, budget: Budget, tflops: dict[str, float]
) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        if why := _absent(name):
            found[name]["why"] = why
    print(
        f"{called}: steps of {setting.per_step} pairs; {sum(map(len, sum(setting.pairs, ()))):,} tokens in all",
        flush=True,
    )
    turns = {name: _turn(name, setting, found[name]) for name in names if "why" not in found[name]}
    for seconds in contest.rounds(turns, n_rounds, budget.over):
        for name, took in seconds.items():
            found[name].setdefault("seconds", []).append(took)
    with torch.device("meta"):
        flops = setting.timed.flops(work.model_of(setting.shape, torch.float32))
    for name, each in found.items():
        if "why" in each:
            each.pop("seconds", None)
        elif "seconds" in each:
            _add_rates(each, setting, flops * (2 if "lora" in name else 3), tflops)
        else:
            each["why"] = "no time was left"
    _say(found)
    return {"contenders": found, "targets": _say_targets(found)}


def _absent(name: str) -> str | None:
    if name.startswith("trl"):
        return machine.absent("trl", "datasets", *(["peft"] if "lora" in name else []))
    if name.startswith("program"):
        return machine.absent(*ours.PROGRAM_NEEDS)
    return machine.absent("peft") if "lora" in name else None


def _turn(name: str, setting: Setting, found: dict[str, Any]) -> Callable[[], float]:
    kind = {"trl": _trl, "program": _program, "ours": _ours}[name.partition("-")[0]]

    def turn() -> float:
        if "why" in found:
            return math.inf
        try:
            done = kind(name, setting)
            found["peak_bytes"], found["losses"], seconds = done.peak, done.losses, done.seconds
        except Exception as error:  # of one contender; the others go on
            found["why"], seconds = machine.why_failed(error), math.inf
        # Outside the handler, which would keep the failed step's tensors alive.
        machine.free()
        return seconds

    return turn


def _ours(name: str, setting: Setting) -> Turn:
    trainer = ours.Trainer(name, setting.shape, setting.pairs)
    reference = trainer.reference_of(setting.pairs)
    return _steps(lambda i: trainer.step(setting.of_step(i), _part(reference, setting, i)), setting)


def _program(name: str, setting: Setting) -> Turn:
    reference = ours.Trainer("ours", setting.shape, setting.pairs).reference_of(setting.pairs)
    step = ours.program(setting.on_disk(), setting.pairs, reference, setting.per_step, set(name.split("-")))
    return _steps(lambda i: step(range(i * setting.per_step, (i + 1) * setting.per_step)), setting)


def _part(of_pairs: np.ndarray, setting: Setting, i: int) -> np.ndarray:
    part: np.ndarray = of_pairs[i * setting.per_step : (i + 1) * setting.per_step]
    return part


def _steps(step: Callable[[int], float], setting: Setting) -> Turn:
    losses = [step(0)]
    machine.forget_peak()
    seconds = machine.timed(lambda: losses.extend(step(i) for i in range(1, 1 + setting.steps)))
    return Turn(seconds, machine.peak(), [losses[-1], losses[0]])


def _trl(name: str, setting: Setting) -> Turn:
    from transformers import TrainerCallback

    from tests.bench.train import trl_trainer

    per_batch, batches = map(int, re.findall(r"\d+", name))
    words = set(name.split("-"))
    lora = "lora" in words
    at: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 1:
                machine.forget_peak()
            if state.global_step in (1, 1 + setting.steps):
                machine.wait()
                at.append(machine.now())

    settings = {
        "output_dir": str(setting.folder / "trl"),
        "per_device_train_batch_size": per_batch,
        "gradient_accumulation_steps": batches,
        "precompute_ref_log_probs": "precomputed" in words,
        "precompute_ref_batch_size": 8,
        "gradient_checkpointing": "recomputed" in words,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "learning_rate": ours.RATE,
        "optim": "adamw_torch_fused" if ON_GPU else "adamw_torch",
    }
    model = work.build(setting.shape, torch.bfloat16 if lora and ON_GPU else torch.float32)
    given: dict[str, Any] = {"peft_config": ours.adapter()} if lora else {}
    if not lora and "precomputed" not in words:
        given["ref_model"] = work.build(setting.shape, torch.float32)
    trainer, losses = trl_trainer(model, setting.pairs, settings, Clock(), **given)
    trainer.train()
    of_steps = torch.stack(losses).reshape(-1, batches).sum(1).tolist()
    return Turn(at[1] - at[0], machine.peak(), [of_steps[-1], of_steps[0]])


# -- what is said ----------------------------------------------------------------------------------------------------


def _add_rates(each: dict[str, Any], setting: Setting, flops: int, tflops: dict[str, float]) -> None:
    seconds = statistics.median(each["seconds"])
    rate = flops / seconds / 1e12
    each |= {
        "pairs_per_second": setting.per_step * setting.steps / seconds,
        "tokens_per_second": setting.timed.positions / seconds,
        "tflops": rate,
        "mfu": rate / tflops["nominal"] if "nominal" in tflops else None,
        "of_measured_rate": rate / tflops["measured"],
    }


def _say(found: dict[str, dict[str, Any]]) -> None:
    print(
        "                                   pairs/s  tokens/s  TFLOP/s    MFU  of the measured rate  GiB at its peak     loss"
    )
    for name, each in found.items():
        if "why" in each:
            print(f"  {name:32} {each['why']}")
            continue
        mfu = f"{each['mfu']:7.1%}" if each["mfu"] is not None else "      -"
        print(
            f"  {name:32} {each['pairs_per_second']:7.1f} {each['tokens_per_second']:9,.0f} {each['tflops']:8.3g} {mfu} "
            f"{each['of_measured_rate']:21.1%} {each['peak_bytes'] / 2**30:16.2f} {each['losses'][0]:8.4f}"
            + ("" if _agrees(name, found) else "  NOT the others' loss")
        )
    print(flush=True)


def _agrees(name: str, found: dict[str, dict[str, Any]]) -> bool:
    """The first loss is ln 2, for policy and reference are the same; all weights fall alike. Adapters begin at random."""
    last, first = found[name]["losses"]
    falls = [each["losses"][1] - each["losses"][0] for other, each in found.items() if "why" not in each and "lora" not in other]  # fmt: skip
    if abs(first - math.log(2)) > FIRST:
        return False
    return "lora" in name or abs(first - last - statistics.median(falls)) < FALL * abs(statistics.median(falls))


def _say_targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each at its best batch, all weights trained."""
    rate = {name: each["pairs_per_second"] for name, each in found.items() if "why" not in each}
    mine = next((name for name in ("program", "ours", "ours-recomputed") if name in rate), None)
    targets = []
    for kind, wanted in WANTED.items():
        theirs = [name for name in rate if name.startswith("trl") and "lora" not in name and ("precomputed" in name) == (kind == "precomputed")]  # fmt: skip
        if mine is None or not theirs:
            print(f"  times TRL {kind}: not measured; wanted {wanted}")
            continue
        best = max(theirs, key=rate.__getitem__)
        targets.append(
            target(f"{mine} is times TRL {kind} at its best, {best}", rate[mine] / rate[best], at_least=wanted)
        )
    return targets


def target(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """Say a figure beside what was wanted of it."""
    wanted = at_least if at_least is not None else at_most
    assert wanted is not None
    reached = value >= wanted if at_least is not None else value <= wanted
    print(f"  {name}: {value:.2f}, {'' if reached else 'short of '}{'at least' if at_least is not None else 'at most'} {wanted}", flush=True)  # fmt: skip
    return {"name": name, "value": value, "wanted": wanted, "reached": reached}
