"""How fast `prepare` is: beside the bare tokenizer on the same text and cores, and beside TRL's preparation.

    make bench-prepare                          needs nothing but the test environment, which has TRL
    python -m tests.bench.prepare --pairs 20000 --rounds 3
    python -m tests.bench.prepare --memory 2000000

Runs alternate, and a ratio is the median of the rounds' ratios. `bare` is one `encode_batch_fast` of the tokenizers
library after another over prompt, chosen and rejected texts, as the chat template writes them, with all cores; nothing
is read, rendered, checked, hashed or stored. `ours` is all of that, from the file to the manifest.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import corpus

BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true", help="even if it is installed")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the tokenizer that is trained for this")
    parser.add_argument(
        "--memory", type=int, metavar="PAIRS", help="only: peak memory of preparing this many short pairs"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus.write_tokenizer(folder / "model", options.vocabulary)
        if options.memory:
            corpus.write_short_pairs(folder / "pairs.jsonl", options.memory)
            found = _run("ours", folder)
            print(
                f"{options.memory:,} pairs: {found['parent_mib']:,.0f} MiB in the parent, {found['worker_mib']:,.0f} MiB in the "
                f"largest worker, {found['seconds']:.0f} s"
            )
            return
        corpus.write_pairs(folder / "pairs.jsonl", options.pairs)
        names = ["bare", "ours", "whole"] + ([] if options.without_trl or not _has_trl() else ["trl"])
        _compare(names, folder, options.pairs, options.rounds)


def _compare(names: list[str], folder: Path, n_pairs: int, n_rounds: int) -> None:
    rounds = [{name: _run(name, folder) for name in names} for _ in range(n_rounds)]
    n_tokens = rounds[0]["bare"]["tokens"]
    assert rounds[0]["ours"]["tokens"] == n_tokens, "not the same tokens"
    print(f"{n_pairs:,} pairs, {n_tokens:,} tokens, {os.cpu_count()} cores, medians of {n_rounds} rounds")
    for each in rounds:
        print("  round: " + ", ".join(f"{name} {each[name]['seconds']:.2f} s" for name in names))
    for name in names:
        seconds = statistics.median(each[name]["seconds"] for each in rounds)
        print(f"  {name:6} {seconds:8.2f} s  {n_pairs / seconds:9,.0f} pairs/s  {n_tokens / seconds:12,.0f} tokens/s")
    print(f"  tokens/s of the bare tokenizer that prepare reaches     {_ratio(rounds, 'bare', 'ours'):.2f}")
    print(f"  the same, prompts encoded with each answer (the whole)  {_ratio(rounds, 'whole', 'ours'):.2f}")
    if "trl" in names:
        print(f"  times the pairs/s of TRL's preparation                  {_ratio(rounds, 'trl', 'ours'):.2f}")
    elif not _has_trl():
        print("  TRL is not installed here (pip install trl==1.16.0)")


def _ratio(rounds: list[dict[str, Any]], other: str, ours: str) -> float:
    return statistics.median(each[other]["seconds"] / each[ours]["seconds"] for each in rounds)


def _has_trl() -> bool:
    import importlib.util

    return importlib.util.find_spec("trl") is not None


def _run(part: str, folder: Path) -> dict[str, Any]:
    """One part in a process of its own: what another left in memory or in caches does not count."""
    command = [sys.executable, "-m", "tests.bench.prepare", "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- the parts -------------------------------------------------------------------------------------------------------


def ours(folder: Path) -> dict[str, Any]:
    """From the file to the manifest. Importing and loading the tokenizer through Transformers is not counted, as nowhere."""
    import shutil

    from prefcache.commands import prepare
    from prefcache.pipeline import config_file
    from prefcache.pipeline.preparing import resolved_config
    from prefcache.pipeline.preparing.tokenizer_facts import load_facts
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.stored import prepared

    shutil.rmtree(folder / "out", ignore_errors=True)
    facts = load_facts(folder / "model")
    resolved_config.tokenizer_facts.load_facts = lambda _: facts  # type: ignore[attr-defined]
    settings = config_file.load(
        None,
        [
            f"model={folder / 'model'}",
            f"prepare.data={folder / 'pairs.jsonl'}",
            f"out={folder / 'out'}",
            "prepare.max_length=8192",
        ],
    )
    began = time.perf_counter()
    prepare.run(settings, Progress(quiet=True))
    seconds = time.perf_counter() - began
    parent, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    table = prepared.Prepared(settings.prepared).table()
    n_tokens = sum(int(table[f"n_{name}"].to_numpy().sum()) for name in ("prompt", "chosen", "rejected"))
    return {"seconds": seconds, "tokens": n_tokens, "parent_mib": parent, "worker_mib": children}


def bare(folder: Path) -> dict[str, Any]:
    return _bare(folder, lambda prompt, chosen, rejected: (prompt, chosen, rejected))


def whole(folder: Path) -> dict[str, Any]:
    return _bare(folder, lambda prompt, chosen, rejected: (prompt, prompt + chosen, prompt + rejected))


def _bare(folder: Path, texts: Callable[[str, str, str], tuple[str, ...]]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    batches: list[list[str]] = [[]]
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        record = {name: turns[0]["content"] for name, turns in json.loads(line).items()}
        prompt = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        batches[-1] += texts(prompt, *(f"{record[name]}<|im_end|>\n" for name in ("chosen", "rejected")))
        if len(batches[-1]) >= BATCH:
            batches.append([])
    tokenizer.encode_batch_fast(batches[0], add_special_tokens=False)  # its threads start with the first batch
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    seconds, n_tokens = 0.0, 0
    for batch in batches:
        began = time.perf_counter()
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        n_tokens += sum(map(len, encoded))
    return {"seconds": seconds, "tokens": n_tokens}


def trl(folder: Path) -> dict[str, Any]:
    """TRL's own preparation of the same file, with a process per core."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        dataset = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=cache)
        arguments = DPOConfig(
            output_dir=cache, dataset_num_proc=os.cpu_count(), max_length=8192, bf16=False, use_cpu=True
        )
        made = DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, arguments, "train"
        )
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": 0, "pairs": len(made)}


PARTS = {"ours": ours, "bare": bare, "whole": whole, "trl": trl}

if __name__ == "__main__":
    main()
