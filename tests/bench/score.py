"""How fast a reference is scored: beside TRL, length-sorted padded batches and vLLM, on the same pairs.

    make bench-score            TRL is in the test environment; vLLM is measured if it is there (make vllm)
    python -m tests.bench.score --pairs 64 --rounds 5 --only ours trl-8
    python -m tests.bench.score --second-run

A Llama of 35 million random weights scores pairs of random ids, in float32. Every contender has a process of its own
with the same threads and settings, loads once, and then takes its turn in every round; in another order each time. What
it computes is counted in a pass before, which is its warm-up: FLOPs by torch's counter, with a formula for the CPU's
attention that torch lacks, the whole square of queries and keys for everyone; token positions that enter the model;
positions that its head sees. Those counts depend on no machine. All log-probs of a sample are compared with the plain
one-by-one forward. Memory is the peak of resident memory in the rounds, of the process and all that it started, beside
what it had after loading and a first pair.

    ours          engine `transformers`, as `score` calls it
    trl-N         DPOTrainer's collator, loader order and compute_ref_log_probs, as precompute_ref_log_probs has them, N
                  pairs a batch. Its head sees the answers' positions only, which TRL does on a GPU, and computes log-probs
                  only, which it does for a reference that is given
    trl-N-cpu     the same as TRL has it on a CPU, with the policy as the reference: its head sees all positions, and
                  computes metrics as well
    sorted-N      Transformers, the longest first, N padded tokens a batch, the head on answers only, no mask
    vllm          engine `vllm`
    vllm-prefix   the same with its prefix cache

Only the first, trl-1, 8 and 32, sorted-1024, sorted-4096 and vllm are measured unless --only says otherwise.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import contest, corpus
from tests.bench.contest import LLAMA, ROOT, SMALL, Process
from tests.bench.corpus import TokenPair

DEFAULT = ("ours", "trl-1", "trl-8", "trl-32", "sorted-1024", "sorted-4096", "vllm")
SAMPLE = 16  # pairs that are compared with the plain forward
TOLERANCE = 1e-3  # nats a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--second-run", action="store_true", help="only: time `prefcache score` with nothing to score")
    parser.add_argument(
        "--small",
        action="store_true",
        help="a model of a few thousand weights and 60 pairs of the demo, to try the benchmark",
    )
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.pairs)
        return
    os.environ.update(contest.same_for_all(options.threads))
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {}
        if not options.second_run:
            found = compare(Path(name), options)
        if options.second_run or not options.only:
            found["second_run"] = second_run(Path(name), options.rounds, 60 if options.small else None)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# -- the comparison --------------------------------------------------------------------------------------------------


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    shape = SMALL if options.small else LLAMA
    contest.write_llama(folder / "model", shape)
    pairs = corpus.token_pairs(options.pairs, shape["vocab_size"])
    facts = _say_what(pairs, shape, options)
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(Process("tests.bench.score", name, folder, "--pairs", options.pairs))
            for name in _to_measure(options.only)
        }
        found = {name: process.ask("load") for name, process in running.items()}
        for name, process in running.items():
            began = time.perf_counter()
            found[name] |= process.ask("count")
            print(f"  {name} counted in {time.perf_counter() - began:.1f} s", flush=True)
        plain = _plain(folder / "model", _sample(pairs))
        for name in running:
            found[name]["deviation"] = _deviation(found[name].pop("logps"), plain, _sample(pairs))
        for seconds in contest.rounds({name: each.round for name, each in running.items()}, options.rounds):
            for name in running:
                found[name].setdefault("seconds", []).append(seconds[name])
        for name, process in running.items():
            found[name] |= process.ask("memory")
    for each in found.values():
        each["pairs_per_second"] = len(pairs) / statistics.median(each["seconds"])
        each["tokens_per_second"] = each["pairs_per_second"] * facts["tokens_per_pair"]
    _say_table(found, facts)
    return {**facts, "contenders": found, "targets": _say_targets(found)}


def _to_measure(only: list[str] | None) -> list[str]:
    names, there = [], {"trl": contest.has_trl(), "vllm": _has_vllm()}
    for name in only or DEFAULT:
        kind = name.partition("-")[0]
        if kind not in KINDS or not re.fullmatch(KINDS[kind][0], name):
            raise SystemExit(
                f"No contender {name}; there are {', '.join(DEFAULT)}, other numbers, trl-8-cpu and vllm-prefix."
            )
        if there.get(kind, True):
            names.append(name)
    if not there["trl"]:
        print("TRL is not installed here (pip install trl==1.16.0)")
    if not there["vllm"]:
        print("vLLM is not installed here (make vllm)")
    return names


def _has_vllm() -> bool:
    from prefcache.pipeline.config import Score

    return (
        importlib.util.find_spec("prefcache.pipeline.scoring.engines.vllm") is not None
        and (ROOT / Score().vllm.python).exists()
    )


def _sample(pairs: list[TokenPair]) -> list[TokenPair]:
    """Some of them, the longest too."""
    longest = max(pairs, key=_longer)
    return [longest, *pairs[:: max(1, len(pairs) // (SAMPLE - 1))][: SAMPLE - 1]]


def _longer(pair: TokenPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _plain(model: Path, pairs: list[TokenPair]) -> list[np.ndarray]:
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.scoring.baseline import score_plainly

    return score_plainly(Reference(model), _sequences(pairs))


def _deviation(found: list[list[float]], plain: list[np.ndarray], pairs: list[TokenPair]) -> float:
    """The largest, of a token where the contender gives each, else of an answer's mean."""
    assert len(found) == len(plain) == 2 * len(pairs)
    largest = 0.0
    for mine, theirs in zip(found, plain, strict=True):
        if len(mine) == len(theirs):
            apart = np.abs(np.array(mine) - theirs).max()
        else:
            assert len(mine) == 1
            apart = abs(mine[0] - theirs.sum(dtype=np.float64)) / len(theirs)
        largest = max(largest, float(apart)) if math.isfinite(apart) else math.inf
    return largest


# -- what is said ----------------------------------------------------------------------------------------------------


def _say_what(pairs: list[TokenPair], shape: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    means = {name: statistics.mean(len(getattr(pair, name)) for pair in pairs) for name in TokenPair._fields}
    facts = {
        "model": shape,
        "pairs": len(pairs),
        "threads": options.threads,
        "mean_tokens": means,
        "tokens_per_pair": sum(means.values()),
        "head_positions_per_pair": means["chosen"] + means["rejected"],
    }
    lengths = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    print(f"{len(pairs):,} pairs, mean tokens: {lengths}; the longest {max(map(_longer, pairs)):,}")
    print(
        f"Llama, vocabulary {shape['vocab_size']:,}, hidden {shape['hidden_size']}, layers {shape['num_hidden_layers']}, "
        f"float32, {options.threads} threads, median of {options.rounds} rounds",
        flush=True,
    )
    return facts


def _say_table(found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    print(
        "              pairs/s  tokens/s  GFLOPs/pair   positions/pair  of head   MiB: loaded  peak  more   deviation"
    )
    for name, each in found.items():
        flops = "not seen" if each["flops_per_pair"] is None else f"{each['flops_per_pair'] / 1e9:.4f}"
        print(
            f"  {name:11} {each['pairs_per_second']:8.2f} {each['tokens_per_second']:9,.0f} {flops:>12} "
            f"{each['positions_per_pair']:9.1f} ({each['positions_per_pair'] / facts['tokens_per_pair']:.2f}) "
            f"{each['head_positions_per_pair']:8.1f} {each['loaded_mib']:13,.0f} {each['peak_mib']:5,.0f} "
            f"{each['peak_mib'] - each['loaded_mib']:5,.0f}   {each['deviation']:.1e}"
        )
    print(
        f"  Tokens per second: of the {facts['tokens_per_pair']:.1f} of a pair, its prompt once. In brackets: positions "
        "computed for each of these."
    )
    if any(each["flops_per_pair"] is None for each in found.values()):
        print("  vLLM computes out of torch's sight: its positions follow from what is asked of it.")
    wrong = [name for name, each in found.items() if not each["deviation"] <= TOLERANCE]
    print(
        f"  Log-probs of {SAMPLE} pairs are within {TOLERANCE} nats a token of the plain forward"
        + (f", BUT NOT those of {', '.join(wrong)}" if wrong else "")
    )


def _say_targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How often faster, as the median of the rounds' ratios; what was wanted; and what of it is arithmetic."""
    best_trl, best = (
        max(
            (name for name in found if name.startswith(kinds)),
            key=lambda name: found[name]["pairs_per_second"],
            default="",
        )
        for kinds in (("trl",), ("trl", "sorted"))
    )
    wanted_of = [
        ("trl-8", "trl-8", 4.5),
        (best_trl, f"TRL's best, {best_trl}", 1.8),
        (best, f"the best peer, {best}", 1.8),
        ("vllm", "vllm", 1.4),
    ]
    targets = []
    for other, called, wanted in wanted_of:
        if other not in found or "ours" not in found:
            continue
        ours, theirs = found["ours"], found[other]
        ratio = statistics.median(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))
        flops = theirs["flops_per_pair"] and theirs["flops_per_pair"] / ours["flops_per_pair"]
        print(
            f"  times {called:28} {ratio:6.2f}   wanted {wanted}, {'reached' if ratio >= wanted else 'NOT reached'}"
            + (f"   (of its FLOPs: 1/{flops:.2f})" if flops else "")
        )
        targets.append(
            {"other": other, "ratio": ratio, "wanted": wanted, "reached": ratio >= wanted, "flops_ratio": flops}
        )
    return targets


# -- a contender's process -------------------------------------------------------------------------------------------


def serve(name: str, folder: Path, n_pairs: int) -> None:
    shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    pairs = corpus.token_pairs(n_pairs, shape["vocab_size"])
    running: list[Contender] = []

    def load() -> dict[str, Any]:
        running.append(KINDS[name.partition("-")[0]][1](name, folder / "model"))
        running[0].score([max(pairs, key=_longer)])
        return {"loaded_mib": contest.resident("VmRSS")}

    def count() -> dict[str, Any]:
        found = _count(running[0], pairs, shape)
        # From now on: what loading and counting took does not count.
        contest.forget_peaks()
        return found

    def in_turn() -> dict[str, Any]:
        began = time.perf_counter()
        running[0].score(pairs)
        return {"seconds": time.perf_counter() - began}

    contest.serve(
        {"load": load, "count": count, "round": in_turn, "memory": lambda: {"peak_mib": contest.resident("VmHWM")}}
    )
    running[0].close()


def _count(contender: "Contender", pairs: list[TokenPair], shape: dict[str, Any]) -> dict[str, Any]:
    work = contest.Work(shape["hidden_size"], shape["vocab_size"])
    with work.counter:
        scored = contender.score(pairs)
    flops: int | None = work.counter.get_total_flops()
    positions, head_positions = work.positions, work.head_positions
    if contender.positions:
        flops, (positions, head_positions) = None, contender.positions(pairs)
    assert positions and head_positions
    of = {id(pair): i for i, pair in enumerate(pairs)}
    sample = [scored[2 * of[id(pair)] + answer] for pair in _sample(pairs) for answer in range(2)]
    return {
        "flops_per_pair": flops and flops / len(pairs),
        "positions_per_pair": positions / len(pairs),
        "head_positions_per_pair": head_positions / len(pairs),
        "logps": [np.atleast_1d(each).astype(float).tolist() for each in sample],
    }


# -- the contenders --------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    score: Callable[[list[TokenPair]], list[Any]]
    """Of each pair's chosen and then rejected answer: every token's log-prob, or their sum."""
    close: Callable[[], None] = lambda: None
    positions: Callable[[list[TokenPair]], tuple[int, int]] | None = None
    """Those of the model and those of its head, where torch does not see them."""


def _sequences(pairs: list[TokenPair]) -> list[Any]:
    from prefcache.pipeline.schema import TokenSequence

    return [TokenSequence(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def ours(name: str, model: Path) -> Contender:
    from prefcache.pipeline.config import Score
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.scoring.engines import find_engine

    engine = find_engine("transformers").load(Reference(model), Score())
    return Contender(lambda pairs: engine.score(_sequences(pairs)), engine.close)


def vllm(name: str, model: Path) -> Contender:
    from prefcache.pipeline.config import Score
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.scoring.engines import find_engine

    score = Score.model_validate(
        {"engine": "vllm", "dtype": "float32", "vllm": {"prefix_caching": name == "vllm-prefix"}}
    )
    engine = find_engine("vllm").load(Reference(model), score)

    def positions(pairs: list[TokenPair]) -> tuple[int, int]:
        # Nothing is padded, prompts are computed for each answer, and the head sees every position of a request.
        n = sum(sequence.n_tokens for sequence in _sequences(pairs))
        return n, n

    return Contender(lambda pairs: engine.score(_sequences(pairs)), engine.close, positions)


def sorted_batches(name: str, model: Path) -> Contender:
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return sorted_by_length(llama, int(name.removeprefix("sorted-")))


def sorted_by_length(model: Any, budget: int) -> Contender:
    """What one writes with Transformers alone, taking some care."""
    import torch
    import torch.nn.functional as F

    @torch.inference_mode()
    def score(pairs: list[TokenPair]) -> list[np.ndarray]:
        asked = _sequences(pairs)
        logps: dict[int, np.ndarray] = {}
        for batch in _sorted_by_length([sequence.n_tokens for sequence in asked], budget):
            ids = [torch.from_numpy(asked[i].ids.astype(np.int64)) for i in batch]
            # On the right, where a causal model never looks: no mask.
            input_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            hidden_BTD = model.model(input_ids=input_BT.to(model.device), use_cache=False).last_hidden_state
            counts = [len(asked[i].completion_ids) for i in batch]
            predicts_BT = torch.zeros_like(input_BT, dtype=torch.bool)
            for row, (i, count) in enumerate(zip(batch, counts, strict=True)):
                predicts_BT[row, asked[i].n_tokens - 1 - count : asked[i].n_tokens - 1] = True
            target_N = torch.cat([of[-count:] for of, count in zip(ids, counts, strict=True)]).to(model.device)
            logits_NV = model.lm_head(hidden_BTD[predicts_BT.to(model.device)]).float()
            logps_N = -F.cross_entropy(logits_NV, target_N, reduction="none").cpu()
            logps.update(zip(batch, (of.numpy() for of in logps_N.split(counts)), strict=True))
        return [logps[i] for i in range(len(asked))]

    return Contender(score)


def _sorted_by_length(lengths: list[int], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def trl(name: str, model: Path) -> Contender:
    import torch
    from transformers import AutoModelForCausalLM

    on_cpu = name.endswith("-cpu")
    reference = None if on_cpu else AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"use_cpu": True, "bf16": False, "output_dir": str(model.parent / f"{name}-out")}
    return trl_precompute(str(model), reference, int(name.split("-")[1]), settings)


def trl_precompute(model: Any, reference: Any, n_batch: int, settings: dict[str, Any]) -> Contender:
    """TRL's precomputing of reference log-probs, but for its tokenizing and its writing of the result to a file."""
    import datasets
    import torch
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    class OfIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    if reference is not None:
        # What it asks before it leaves the other positions out. Its kernels ask for themselves, and stay as they are.
        utils._use_triton = lambda device: True
    trainer = OfIds(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            precompute_ref_log_probs=True,
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            **settings,
        ),
        # Computes a first pair here and now, as it does with any data.
        train_dataset=_dataset(datasets, corpus.token_pairs(1, 8)),
        processing_class=corpus.padding_tokenizer(),
    )
    assert trainer.ref_model is reference
    made: dict[int, Any] = {}

    def score(pairs: list[TokenPair]) -> list[float]:
        # Made in the pass that counts, so that no round pays for it.
        dataset = made.get(id(pairs)) or made.setdefault(id(pairs), _dataset(datasets, pairs))
        # As in DPOTrainer._precompute_ref_logps.
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=n_batch, collate_fn=trainer.data_collator, shuffle=False
        )
        of_model = trainer.ref_model or trainer.model
        sums = [trainer.compute_ref_log_probs(of_model, batch) for batch in trainer.accelerator.prepare(loader)]
        chosen, rejected = (torch.cat(each) for each in zip(*sums, strict=True))
        return torch.stack([chosen, rejected], 1).flatten().tolist()

    return Contender(score)


def _dataset(datasets: Any, pairs: list[TokenPair]) -> Any:
    return datasets.Dataset.from_dict(
        {f"{name}_ids": [getattr(pair, name).tolist() for pair in pairs] for name in TokenPair._fields}
    )


KINDS: dict[str, tuple[str, Callable[[str, Path], Contender]]] = {
    "ours": (r"ours", ours),
    "trl": (r"trl-\d+(-cpu)?", trl),
    "sorted": (r"sorted-\d+", sorted_batches),
    "vllm": (r"vllm(-prefix)?", vllm),
}


# -- the second run --------------------------------------------------------------------------------------------------


def second_run(folder: Path, n_rounds: int, n_pairs: int | None) -> dict[str, Any]:
    """`prefcache score` on the demo's pairs, all of them scored before: whole processes, as a shell starts them."""
    corpus.write_tokenizer(folder / "tiny", 1000)
    with open(ROOT / "data/demo/pairs.jsonl", encoding="utf-8") as demo:
        (folder / "pairs.jsonl").write_text("".join(itertools.islice(demo, n_pairs)), encoding="utf-8")
    made = {"model": "tiny", "prepare.data": "pairs.jsonl", "out": "out", "cache": "cache"}
    settings = [f"{key}={folder / name}" for key, name in made.items()]
    arguments = [word for setting in settings for word in ("--set", setting)]
    for stage in ("prepare", "score"):
        _prefcache(folder, stage, *arguments)
    seconds, scored = [], {}
    for _ in range(n_rounds):
        began = time.perf_counter()
        scored = json.loads(_prefcache(folder, "score", "--json", *arguments).stdout)
        seconds.append(time.perf_counter() - began)
    imported = _imports(_prefcache(folder, "score", *arguments, python=["-X", "importtime"]).stderr)
    loaded = sorted({"torch", "transformers"} & imported.keys())
    median = statistics.median(seconds)
    assert scored["tokens"] == 0, "something was scored again"
    print(
        f"Second run of `prefcache score`, {scored['sequences']:,} sequences: {scored['tokens']} tokens scored, {median:.2f} s "
        f"({', '.join(f'{each:.2f}' for each in seconds)}); wanted 2 s, {'reached' if median < 2 else 'NOT reached'}"
    )
    slowest = sorted(imported.items(), key=lambda each: -each[1])[:6]
    print(f"  Imported: {' and '.join(loaded) or 'neither torch nor transformers'}. The slowest, in seconds: ", end="")
    print(", ".join(f"{name} {took:.2f}" for name, took in slowest), flush=True)
    return {"seconds": seconds, "tokens": scored["tokens"], "imported": imported, "reached": median < 2}


def _prefcache(folder: Path, *arguments: str, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "prefcache")
    command = [sys.executable, *python, program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"prefcache {arguments[0]} failed:\n{done.stderr[-3000:]}")
    return done


def _imports(said: str) -> dict[str, float]:
    """Seconds in each package's own modules, by what `python -X importtime` says."""
    found: dict[str, float] = {}
    for micros, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", said, re.M):
        package = name.partition(".")[0]
        found[package] = found.get(package, 0.0) + int(micros) / 1e6
    return found


if __name__ == "__main__":
    main()
