"""How fast a policy is trained: beside TRL's DPOTrainer, and beside ourselves with one technique taken away at a time.

    make bench-train
    python -m tests.bench.train --pairs 32 --rounds 5 --regime chat --only ours trl-8x1 trl-8x1-precomputed
    python -m tests.bench.train --loader

A Llama of 35 million random weights takes steps of 8 pairs of random ids, in float32: forward, backward, clipping and
AdamW, from the same weights over the same pairs in the same order. Every contender has a process of its own with the same
threads and settings, loads once, and then takes its turn in every round; in another order each time. What it computes is
counted in a pass before, which is its warm-up: FLOPs by torch's counter, backward passes and what is computed again
included; they depend on no machine. That pass's losses are compared with those of the same steps by the plain forward, one
sequence at a time. Memory is the peak of resident memory in the rounds, weights, optimizer and PyTorch itself included.

    ours                  as `train` takes its steps, with all that is said in the cache
    ours-1                the same in micro-batches of one pair
    ours-packed           rows: packed: every prompt once for each answer
    ours-padded           rows: padded
    ours-live             a frozen reference in memory, which runs in every step by the same forward
    trl-BxA               DPOTrainer.train(), from its first step on, with a live reference: B pairs a batch, A batches a step
    trl-BxA-precomputed   the same with precompute_ref_log_probs, done before
    *-grouped             the same with batches of pairs of like length: all of them sorted, which is the best that
                          grouping by length could do

TRL's head sees the answers' positions only, as on a GPU, and it does not checkpoint activations, which it would unless
told otherwise: a third more to compute, for less memory.
"""

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import contest, corpus
from tests.bench.contest import LLAMA, SMALL, Process
from tests.bench.corpus import TokenPair

STEP = 8  # pairs
RATE = 1e-5
TOLERANCE = 1e-3  # of a step's loss
OURS = ("ours", "ours-1", "ours-packed", "ours-padded", "ours-live")
TRL = tuple(
    f"trl-{shape}{reference}{order}"
    for reference in ("", "-precomputed")
    for shape, order in (("8x1", ""), ("8x1", "-grouped"), ("2x4", ""), ("2x4", "-grouped"), ("1x8", ""))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--regime", nargs="+", choices=corpus.REGIMES, default=list(corpus.REGIMES), metavar="NAME")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--loader", action="store_true", help="only: how fast examples are read")
    parser.add_argument("--small", action="store_true", help="a model of a few thousand weights, to try the benchmark")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.pairs, options.regime[0])
        return
    if options.pairs % STEP:
        parser.error(f"--pairs {options.pairs} is no multiple of {STEP}")
    os.environ.update(contest.same_for_all(options.threads))
    found: dict[str, Any] = {}
    if not options.loader:
        for regime in options.regime:
            with tempfile.TemporaryDirectory() as name:
                found[regime] = compare(Path(name), regime, options)
    if options.loader or not options.only:
        with tempfile.TemporaryDirectory() as name:
            found["loader"] = loader(Path(name), 2_000 if options.small else 20_000)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# -- the comparison --------------------------------------------------------------------------------------------------


def compare(folder: Path, regime: str, options: argparse.Namespace) -> dict[str, Any]:
    shape = SMALL if options.small else LLAMA
    names = _to_measure(options.only)
    _write_model(folder / "model", shape)
    pairs = corpus.token_pairs(options.pairs, shape["vocab_size"], regime=regime)
    facts = _say_what(regime, pairs, shape, options)
    _in_process("_write_losses", folder, options.pairs, regime)
    plain = json.loads((folder / "plain.json").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        arguments = ("--pairs", options.pairs, "--regime", regime)
        running = {name: stack.enter_context(Process("tests.bench.train", name, folder, *arguments)) for name in names}
        found = {name: process.ask("load") for name, process in running.items()}
        for name, process in running.items():
            found[name] |= process.ask("count")
            order = "grouped" if name.endswith("-grouped") else "given"
            losses = zip(found[name]["losses"], plain[order], strict=True)
            found[name]["deviation"] = max(abs(mine - theirs) for mine, theirs in losses)
        for seconds in contest.rounds({name: each.round for name, each in running.items()}, options.rounds):
            for name in names:
                found[name].setdefault("seconds", []).append(seconds[name])
        for name, process in running.items():
            found[name] |= process.ask("memory")
    for each in found.values():
        each["pairs_per_second"] = len(pairs) / statistics.median(each["seconds"])
    _say_table(found)
    return {**facts, "contenders": found, "targets": _say_targets(found)}


def _to_measure(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in OURS and not re.fullmatch(r"trl-[1-9]\d*x[1-9]\d*(-precomputed)?(-grouped)?", name):
            raise SystemExit(f"No contender {name}; there are {', '.join((*OURS, *TRL))}, and trl with other numbers.")
        if name.startswith("trl") and math.prod(map(int, re.findall(r"\d+", name))) != STEP:
            raise SystemExit(f"{name} does not take steps of {STEP} pairs.")
    names = list(only or (*OURS, *TRL))
    if contest.has_trl():
        return names
    print("TRL is not installed here (pip install trl==1.16.0)")
    return [name for name in names if not name.startswith("trl")]


def _in_process(what: str, *arguments: Any) -> None:
    """One of these functions in a process of its own: what it takes of memory is gone afterwards."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=globals()[what], args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{what} failed")


def _write_model(folder: Path, shape: dict[str, Any]) -> None:
    contest.write_llama(folder, shape)
    corpus.padding_tokenizer().save_pretrained(folder)


def _grouped(pairs: list[TokenPair]) -> list[TokenPair]:
    return sorted(pairs, key=lambda pair: -len(pair.prompt) - max(len(pair.chosen), len(pair.rejected)))


def _sequences(pairs: list[TokenPair]) -> list[Any]:
    """All chosen, then all rejected."""
    from prefcache.pipeline.schema import TokenSequence

    return [TokenSequence(pair.prompt, getattr(pair, answer)) for answer in ("chosen", "rejected") for pair in pairs]


def _write_losses(folder: Path, n_pairs: int, regime: str) -> None:
    """The losses of all steps as the paper has them, by the plain forward and PyTorch's AdamW."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    from prefcache.pipeline.model.logprobs import plain_logps, sum_logps

    logging.disable_progress_bar()
    shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    pairs = corpus.token_pairs(n_pairs, shape["vocab_size"], regime=regime)
    found = {}
    for order, ordered in (("given", pairs), ("grouped", _grouped(pairs))):
        policy, frozen = (LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
        found[order] = []
        for i in range(0, n_pairs, STEP):
            loss = 0.0
            for pair in ordered[i : i + STEP]:
                with torch.no_grad():
                    reference = sum_logps([plain_logps(frozen, each) for each in _sequences([pair])])
                ratios = sum_logps([plain_logps(policy, each) for each in _sequences([pair])]) - reference
                of_pair = -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])) / STEP
                of_pair.backward()
                loss += of_pair.item()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found[order].append(loss)
    (folder / "plain.json").write_text(json.dumps(found), encoding="utf-8")


# -- what is said ----------------------------------------------------------------------------------------------------


def _say_what(
    regime: str, pairs: list[TokenPair], shape: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    means = {name: statistics.mean(len(getattr(pair, name)) for pair in pairs) for name in TokenPair._fields}
    lengths = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    print(f"{regime}: {len(pairs):,} pairs, mean tokens: {lengths}; the longest {longest:,}")
    print(
        f"Llama, vocabulary {shape['vocab_size']:,}, hidden {shape['hidden_size']}, layers {shape['num_hidden_layers']}, "
        f"float32, steps of {STEP} pairs, {options.threads} threads, median of {options.rounds} rounds",
        flush=True,
    )
    return {"model": shape, "pairs": len(pairs), "threads": options.threads, "mean_tokens": means}


def _times(found: dict[str, dict[str, Any]], name: str, other: str) -> float:
    """How often faster, as the median of the rounds' ratios."""
    return statistics.median(
        theirs / mine for mine, theirs in zip(found[name]["seconds"], found[other]["seconds"], strict=True)
    )


def _say_table(found: dict[str, dict[str, Any]]) -> None:
    base = next(iter(found))
    print(
        f"                            pairs/s   {base} is times  GFLOPs/pair (times)   MiB: loaded  peak  (times)  deviation"
    )
    for name, each in found.items():
        print(
            f"  {name:26} {each['pairs_per_second']:6.2f} {_times(found, base, name):14.2f} "
            f"{each['flops_per_pair'] / 1e9:12.4f} {each['flops_per_pair'] / found[base]['flops_per_pair']:6.2f} "
            f"{each['loaded_mib']:13,.0f} {each['peak_mib']:7,.0f} {each['peak_mib'] / found[base]['peak_mib']:6.2f} "
            f"   {each['deviation']:.1e}"
        )
    wrong = [name for name, each in found.items() if not each["deviation"] <= TOLERANCE]
    print(
        f"  Every step's loss is within {TOLERANCE} of the plain forward's"
        + (f", BUT NOT those of {', '.join(wrong)}" if wrong else "")
    )


def _say_targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    def best(precomputed: bool) -> str:
        names = [name for name in found if name.startswith("trl") and ("precomputed" in name) == precomputed]
        return max(names, key=lambda name: found[name]["pairs_per_second"], default="")

    live, ready = best(False), best(True)
    faster = [
        ("ours", "trl-8x1", "trl-8x1", 5.0),
        ("ours", "trl-8x1-precomputed", "trl-8x1-precomputed", 4.0),
        ("ours", ready, f"TRL's best precomputed, {ready}", 1.5),
        ("ours", live, f"TRL's best live, {live}", 2.2),
        ("ours-1", "trl-1x8-precomputed", "trl-1x8-precomputed", 1.0),
    ]
    smaller = [("ours", "trl-8x1", 0.35), ("ours-1", "trl-1x8-precomputed", 1.0)]
    targets = []
    for name, other, called, wanted in faster:
        if {name, other} <= found.keys():
            ratio, flops = _times(found, name, other), found[other]["flops_per_pair"] / found[name]["flops_per_pair"]
            reached = ratio >= wanted
            print(
                f"  {name} is times {called}: {ratio:.2f}, wanted {wanted}, {_reached(reached)} (of its FLOPs: 1/{flops:.2f})"
            )
            targets.append({"name": name, "other": other, "ratio": ratio, "wanted": wanted, "reached": reached})
    for name, other, most in smaller:
        if {name, other} <= found.keys():
            share = found[name]["peak_mib"] / found[other]["peak_mib"]
            print(f"  {name} takes of the memory of {other}: {share:.2f}, wanted {most}, {_reached(share <= most)}")
            targets.append({"name": name, "other": other, "memory": share, "wanted": most, "reached": share <= most})
    return targets


def _reached(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


# -- the contenders --------------------------------------------------------------------------------------------------


Steps = Callable[[], tuple[list[float], float]]
"""Takes all steps, once: their losses, and the seconds they took."""


def serve(name: str, folder: Path, n_pairs: int, regime: str) -> None:
    shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    pairs = corpus.token_pairs(n_pairs, shape["vocab_size"], regime=regime)
    running: list[Steps] = []

    def load() -> dict[str, Any]:
        running.append((ours if name in OURS else trl)(name, folder, _grouped(pairs) if "grouped" in name else pairs))
        return {"loaded_mib": contest.resident("VmRSS")}

    def count() -> dict[str, Any]:
        work = contest.Work(shape["hidden_size"], shape["vocab_size"])
        with work.counter:
            losses, _ = running[0]()
        contest.forget_peaks()
        return {"flops_per_pair": work.counter.get_total_flops() / n_pairs, "losses": losses}

    answers = {"load": load, "count": count}
    answers["round"] = lambda: {"seconds": running[0]()[1]}
    answers["memory"] = lambda: {"peak_mib": contest.resident("VmHWM")}
    contest.serve(answers)


def ours(name: str, folder: Path, pairs: list[TokenPair]) -> Steps:
    """As stages/commands/train.py does it, from a prepared table and the columns that the cache gives."""
    import torch
    from transformers import LlamaForCausalLM

    from prefcache.pipeline.config import Train
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.model.forward import Forward, flatten
    from prefcache.pipeline.model.lm_head import set_head_dtype
    from prefcache.pipeline.model.logprobs import sum_logps
    from prefcache.pipeline.training.distributed import make_accelerator
    from prefcache.pipeline.training.objective import Objective
    from prefcache.pipeline.training.policy import Policy

    rows = {"ours-packed": "packed", "ours-padded": "padded"}.get(name, "auto")
    train = Train(batch_size=STEP, learning_rate=RATE, rows=rows, micro_batch_size=1 if name == "ours-1" else None)
    sequences = _sequences(pairs)
    tried = sequences[: 2 * STEP]

    def frozen() -> Forward:
        model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().requires_grad_(False)
        set_head_dtype(model, "float32", frozen=True)
        forward = Forward(model, "sdpa", "auto", "float32", "train.rows")
        forward.choose_layout(tried)
        return forward

    def scored(forward: Forward, some: list[Any]) -> np.ndarray:
        found = np.empty(len(some))
        with torch.inference_mode():
            for part in forward.plan_batches(some, 2_048):
                found[flatten(part)] = sum_logps(
                    forward.logps([[some[i] for i in group] for group in part]).logps
                ).numpy()
        return found

    reference = frozen()
    of_answers = np.split(scored(reference, sequences), 2)
    if name != "ours-live":
        del reference
    examples = examples_of(pairs, *of_answers)
    policy = Policy(Reference(folder / "model"), None, train, make_accelerator(train), examples.longest(12), print)
    assert policy.forward.layout == ("shared" if rows == "auto" else rows), policy.forward.layout_reason
    objective = Objective(train)

    def steps() -> tuple[list[float], float]:
        losses, began = [], time.perf_counter()
        for indices in np.split(np.arange(len(pairs)), len(pairs) // STEP):
            if name == "ours-live":
                scored(reference, [sequences[i] for i in (*indices, *(len(pairs) + indices))])
            visit, _, _ = policy.update(examples, indices, objective, {}, RATE)
            losses.append(float(visit["loss"].mean()))
        return losses, time.perf_counter() - began

    return steps


def examples_of(pairs: list[TokenPair], chosen_logp: np.ndarray, rejected_logp: np.ndarray) -> Any:
    """As `train` has them, with what the cache gives."""
    from prefcache.pipeline.training.dataset import Examples, SplitData

    table, answers = _table(pairs), ("chosen", "rejected")
    columns = {f"n_{answer}_counted": table[f"n_{answer}_counted"].to_numpy().astype(np.float64) for answer in answers}
    return Examples(
        SplitData(table, columns | {"ref_chosen_logp": chosen_logp, "ref_rejected_logp": rejected_logp}, answers)
    )


def _table(pairs: list[TokenPair]) -> Any:
    from prefcache.pipeline.schema import PAIRS

    rows = []
    for i, pair in enumerate(pairs):
        n_common = sum(
            1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(pair.chosen, pair.rejected, strict=False))
        )
        row: dict[str, Any] = {"example_id": f"e{i}", "prompt": f"{i}?", "n_common": n_common}
        for part in TokenPair._fields:
            ids = getattr(pair, part)
            row |= {
                f"{part}_ids": ids,
                f"n_{part}": len(ids),
                f"n_{part}_counted": len(ids),
                f"{part}_spans": [0, len(ids)],
            }
        rows.append({name: value for name, value in row.items() if name in PAIRS.names})
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=PAIRS)


def trl(name: str, folder: Path, pairs: list[TokenPair]) -> Steps:
    import torch
    from transformers import TrainerCallback

    began: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.perf_counter())  # its preparations, which a long run pays for once, do not count

    per_batch, batches = map(int, re.findall(r"\d+", name))
    settings = {
        "output_dir": str(folder / f"{name}-out"),
        "per_device_train_batch_size": per_batch,
        "gradient_accumulation_steps": batches,
        "precompute_ref_log_probs": "precomputed" in name,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": RATE,
        "optim": "adamw_torch",
    }
    trainer, losses = trl_trainer(str(folder / "model"), pairs, settings, Clock())

    def steps() -> tuple[list[float], float]:
        losses.clear()
        trainer.train()
        of_steps = torch.stack(losses).reshape(-1, batches).sum(1).tolist()
        return of_steps, time.perf_counter() - began[-1]

    return steps


def trl_trainer(
    model: Any, pairs: list[TokenPair], settings: dict[str, Any], clock: Any, **given: Any
) -> tuple[Any, list[Any]]:
    """DPOTrainer, and the losses of its batches, divided by their number in a step."""
    import datasets
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    # What it asks before it leaves the other positions out. Its kernels ask for themselves, and stay as they are.
    utils._use_triton = lambda device: True
    losses: list[Any] = []

    class OfIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    trainer = OfIds(
        model=model,
        args=DPOConfig(
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {f"{part}_ids": [getattr(pair, part).tolist() for pair in pairs] for part in TokenPair._fields}
        ),
        processing_class=corpus.padding_tokenizer(),
        callbacks=[clock],
        **given,
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.ref_model is None or not settings["precompute_ref_log_probs"]
    return trainer, losses


# -- the loader ------------------------------------------------------------------------------------------------------


def loader(folder: Path, n: int) -> dict[str, float]:
    """Examples as a step reads them, from a memory map and in a random order, beside what `datasets` reads from the same
    file: token ids as arrays against lists of numbers."""
    import datasets

    from prefcache.pipeline.stored import artifact
    from prefcache.pipeline.training.dataset import Examples, SplitData

    table = _table(corpus.token_pairs(n, 32_000))
    (folder / "pairs.arrow").write_bytes(artifact.arrow_stream(table))
    table = artifact.open_arrow_stream(folder / "pairs.arrow")
    columns = {f"ref_{answer}_logp": np.zeros(n) for answer in ("chosen", "rejected")}
    examples = Examples(SplitData(table, columns, ("chosen", "rejected")))
    names = [f"{part}_ids" for part in TokenPair._fields]
    dataset = datasets.Dataset.from_file(str(folder / "pairs.arrow")).select_columns(names)
    steps = np.split(np.random.default_rng(0).permutation(n)[: n // STEP * STEP], n // STEP)
    ways: dict[str, Callable[[np.ndarray], Any]] = {
        "Examples.batch": lambda step: examples.batch(step, ("chosen", "rejected")),
        "datasets[i]": lambda step: [dataset[int(i)] for i in step],
        "datasets[list]": lambda step: dataset[step.tolist()],
    }
    found = {}
    for way, read in ways.items():
        some = steps if way == "Examples.batch" else steps[: max(1, len(steps) // 10)]
        began = time.perf_counter()
        for step in some:
            read(step)
        found[way] = len(some) * STEP / (time.perf_counter() - began)
    print("Rows a second, 8 at a time: " + ", ".join(f"{way} {rate:,.0f}" for way, rate in found.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
