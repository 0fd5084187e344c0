"""How fast a policy is trained on pairs with images: beside TRL's DPOTrainer, at 256, 576 and 1,500 image tokens a prompt.

    make bench-images
    python -m tests.bench.images --tokens 576 --pairs 4 --rounds 3

A Qwen2.5-VL of random weights takes steps of 2 pairs of a picture, a question and two short answers, in float32: forward,
backward, clipping and AdamW. Its tower has the share of the arithmetic that the 7B model's has. Every contender has a process of
its own with the same threads, loads once, and then takes its turn in every round, in another order each time. FLOPs are
counted by torch's counter in a pass before, which is the warm-up; that pass's losses are compared with one another. Memory is the
peak of resident memory in the rounds, PyTorch included; `held` is what weights, gradients and the optimizer's state take of it.

    ours           train.vision: frozen. The tower's features were computed once, and it is not in memory
    ours-trained   train.vision: trained
    trl-frozen     DPOTrainer with a live reference, and the tower frozen: the same losses as ours
    trl            DPOTrainer as it comes, with a live reference: the same losses as ours-trained
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import contest
from tests.bench.contest import Process

STEP, RATE = 2, 1e-5
SIDES = {256: (448, 448), 576: (672, 672), 1500: (1400, 840)}  # pixels; 28 by 28 make an image token
CONTENDERS = ("ours", "ours-trained", "trl-frozen", "trl")
TEXT = {
    "vocab_size": 8_000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
}
TOWER = {
    "depth": 4,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 384,
    "window_size": 112,
    "fullatt_block_indexes": [3],
    "initializer_range": 0.05,
}
TOLERANCE = 1e-3  # of a step's loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--pairs", type=int, default=4, help="a multiple of 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.pairs)
        return
    os.environ.update(contest.same_for_all(options.threads))
    for n_tokens in options.tokens:
        with tempfile.TemporaryDirectory() as name:
            compare(Path(name), n_tokens, options)


def compare(folder: Path, n_tokens: int, options: argparse.Namespace) -> None:
    write_experiment(folder, n_tokens, options.pairs)
    print(f"{n_tokens:,} image tokens a prompt, {options.pairs} pairs, {options.threads} threads", flush=True)
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(Process("tests.bench.images", name, folder, "--pairs", options.pairs))
            for name in options.only
        }
        found = {name: process.ask("load") for name, process in running.items()}
        for name, process in running.items():
            found[name] |= process.ask("count")
        for seconds in contest.rounds({name: each.round for name, each in running.items()}, options.rounds):
            for name in running:
                found[name].setdefault("seconds", []).append(seconds[name])
        for name, process in running.items():
            found[name] |= process.ask("memory")
    _print_table(found, options.pairs)


def _print_table(found: dict[str, dict[str, Any]], n_pairs: int) -> None:
    print("                 pairs/s   ours is times  GFLOP/pair (times)   peak MiB (times)   losses")
    base = next(iter(found.values()))
    for name, each in found.items():
        ratios = [theirs / mine for mine, theirs in zip(base["seconds"], each["seconds"], strict=True)]
        print(
            f"  {name:14} {n_pairs / statistics.median(each['seconds']):7.3f} {statistics.median(ratios):13.2f} "
            f"{each['flops_per_pair'] / 1e9:12.1f} {each['flops_per_pair'] / base['flops_per_pair']:6.2f} "
            f"{each['peak_mib']:11,.0f} {each['peak_mib'] / base['peak_mib']:6.2f}   "
            + " ".join(f"{loss:.6f}" for loss in each["losses"]),
            flush=True,
        )
    for mine, theirs in (("ours", "trl-frozen"), ("ours-trained", "trl")):
        if {mine, theirs} <= found.keys():
            losses = zip(found[mine]["losses"], found[theirs]["losses"], strict=True)
            worst = max(abs(a - b) for a, b in losses)
            says = "" if worst <= TOLERANCE else f", BUT NOT within {TOLERANCE}"
            print(f"  losses of {mine} and {theirs} differ by at most {worst:.1e}{says}")


# -- the experiment --------------------------------------------------------------------------------------------------


def write_experiment(folder: Path, n_tokens: int, n_pairs: int) -> None:
    """Write a model and pairs with pictures, and prepare and score them in a process of their own."""
    import subprocess
    import sys

    from tests.helpers import vision_models

    size = {"shortest_edge": 28 * 28, "longest_edge": 1400 * 840}
    vision_models.write(folder / "model", vision_models.resize("qwen2.5-vl", TEXT, TOWER, size=size, patch_size=14))
    lines = []
    for i in range(n_pairs):
        vision_models.picture(*SIDES[n_tokens], seed=i).save(folder / f"{i}.png")
        lines.append(json.dumps({"images": [f"{i}.png"], **row(i)}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    for stage in ("prepare", "score"):
        command = [sys.executable, "-m", "prefcache", stage, *settings(folder)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)


def row(i: int) -> dict[str, Any]:
    """A question about a picture, and two answers of some fifty tokens."""
    question = [{"type": "image"}, {"type": "text", "text": f"why the cat {i}?"}]
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": "the answer is 42, and the dog runs. " * 3}],
        "rejected": [{"role": "assistant", "content": f"red fish; don't! the cat sings {i} " * 3}],
    }


def settings(folder: Path) -> list[str]:
    pairs = {
        "model": folder / "model",
        "out": folder / "runs",
        "cache": folder / "cache",
        "prepare.data": folder / "pairs.jsonl",
        "prepare.held_out": 0,
        "prepare.max_length": 4096,
        "score.parity_sample": 0,
    }
    return [part for name, value in pairs.items() for part in ("--set", f"{name}={value}")]


# -- the contenders --------------------------------------------------------------------------------------------------

Steps = Callable[[], list[float]]
"""Takes all steps, once, and returns their losses."""


def serve(name: str, folder: Path, n_pairs: int) -> None:
    running: list[Steps] = []

    def load() -> dict[str, Any]:
        running.append((ours if name.startswith("ours") else trl)(name, folder, n_pairs))
        return {"loaded_mib": contest.resident("VmRSS")}

    def count() -> dict[str, Any]:
        work = contest.Work(TEXT["hidden_size"], TEXT["vocab_size"])
        with work.counter:
            losses = running[0]()
        contest.forget_peaks()
        return {"flops_per_pair": work.counter.get_total_flops() / n_pairs, "losses": losses}

    def take_round() -> dict[str, Any]:
        began = time.perf_counter()
        running[0]()
        return {"seconds": time.perf_counter() - began}

    memory = {"memory": lambda: {"peak_mib": contest.resident("VmHWM")}}
    contest.serve({"load": load, "count": count, "round": take_round, **memory})


def ours(name: str, folder: Path, n_pairs: int) -> Steps:
    """As stages/commands/train.py does it, from prepared data and the cache."""
    from prefcache.pipeline import config_file
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.schema import TRAIN
    from prefcache.pipeline.training import cache_join, run_images, run_inputs
    from prefcache.pipeline.training.distributed import make_accelerator
    from prefcache.pipeline.training.policy import Policy

    vision = "trained" if name == "ours-trained" else "frozen"
    given = [*settings(folder)[1::2], f"train.batch_size={STEP}", f"train.vision={vision}"]
    config = config_file.load(None, given)
    with Progress(silent=True) as progress:
        setup, accelerator = run_inputs.collect(config), make_accelerator(config.train)
        examples = cache_join.load_examples(setup, progress)
        images = run_images.find(
            setup.start, config.train, setup.prepared, examples, accelerator, Path(config.cache), progress
        )
        like = examples[TRAIN].longest(2)
        policy = Policy(setup.start, None, config.train, accelerator, like, print, images)
    assert policy.forward.layout == "shared", policy.forward.layout_reason
    by_line = np.argsort(setup.prepared.table(TRAIN)["line"].to_numpy())

    def steps() -> list[float]:
        losses = []
        for indices in np.split(by_line, n_pairs // STEP):
            visit, *_ = policy.update(examples[TRAIN], indices, setup.objective, {}, RATE)
            losses.append(float(visit["loss"].mean()))
        return losses

    return steps


def trl(name: str, folder: Path, n_pairs: int) -> Steps:
    from PIL import Image

    from tests.helpers.trl_vision import make_trainer

    rows = [{"images": [Image.open(folder / f"{i}.png")], **row(i)} for i in range(n_pairs)]
    trainer = make_trainer(
        folder / "model",
        rows,
        folder / f"{name}-out",
        batch=STEP,
        trains_tower=name == "trl",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )

    def steps() -> list[float]:
        trainer.seen.clear()
        trainer.train()
        return list(trainer.seen)

    return steps


if __name__ == "__main__":
    main()
