"""A sweep of eight DPO runs of a real model: in TRL alone, in TRL with the cache, and in prefcache.

    make bench-trl
    python -m tests.bench.trl_sweep --data pairs.json --steps 8

SmolLM2-135M-Instruct (see real.py) trains one epoch on the same pairs with each of two learning rates, two betas and two losses. The
contenders take turns, setting by setting, each run in a process of its own:

- trl: the live reference, TRL's default.
- trl-precompute: TRL's precompute_ref_log_probs.
- cached: TRL with prefcache.trl.CachedReference and an empty cache at the start of the sweep.
- prefcache: prepare, score and train, with an empty cache at the start.

Seconds and CPU are whole processes, from the start of Python; `steps` are the seconds of the optimizer's steps alone, those of a live
reference included. `reference` counts sequences that went through a model without gradients,
those of scoring included. `MiB` is the peak of the last run.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prefcache.pipeline import gguf_files
from tests.bench import contest, real
from tests.helpers.project import PREFCACHE, ROOT

SETTINGS = [
    {"learning_rate": rate, "beta": beta, "loss": loss}
    for rate, beta, loss in itertools.product((5e-6, 1e-5), (0.1, 0.3), ("sigmoid", "ipo"))
]
CONTENDERS = ("trl", "trl-precompute", "cached", "prefcache")
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data/demo/pairs.jsonl", help="of prompt, chosen and rejected"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--runs", type=int, default=len(SETTINGS), help="the first of the settings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a folder, in place of the real model")
    parser.add_argument("--folder", type=Path, default=Path("runs/trl-sweep"))
    parser.add_argument("--child", nargs=2, metavar=("CONTENDER", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(
        contest.same_for_all(options.threads)
        | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(options.folder / "datasets")}
    )
    if options.child:
        name, settings = options.child[0], json.loads(options.child[1])
        facts = (
            _train_in_prefcache(settings, options) if name == "prefcache" else _train_in_trl(name, settings, options)
        )
        print(json.dumps(facts))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    options.model = options.model or _real_model(options.folder)
    _write_data(options)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for settings, name in itertools.product(SETTINGS[: options.runs], CONTENDERS):
        found[name].append(_run(name, settings, options))
        print(f"{name:15} {settings}: {found[name][-1]}", flush=True)
    _report(found, options)


def _report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    print(f"\n{options.runs} runs of {options.steps} steps of {options.batch} pairs")
    print(f"{'':15} {'seconds':>8} {'CPU s':>8} {'steps':>8} {'reference sequences':>20} {'MiB':>9}")
    for name, runs in found.items():
        total = {key: sum(run[key] for run in runs) for key in ("seconds", "cpu", "steps", "reference")}
        values = f"{total['seconds']:8.0f} {total['cpu']:8.0f} {total['steps']:8.0f} {total['reference']:20,.0f} {runs[-1]['peak_mib']:9,.0f}"
        print(f"{name:15} {values}")
    (options.folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")


def _real_model(folder: Path) -> Path:
    """The converted weights, as a folder that TRL loads as well."""
    file = real.fetch_model(folder)
    subprocess.run(
        [
            PREFCACHE,
            "prepare",
            "--set",
            f"model={file}",
            "--set",
            f"prepare.data={ROOT / 'data/demo/pairs.jsonl'}",
            "--set",
            f"out={folder / 'converted'}",
            "--set",
            f"cache={folder / 'converted'}",
            "-q",
        ],
        check=True,
    )
    converted = gguf_files.find_converted(file, folder / "converted")
    assert converted is not None
    return converted[0]


def _write_data(options: argparse.Namespace) -> None:
    """Messages for as many pairs as one epoch has, those that fit into the length."""
    text = options.data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    pairs = [pair for pair in map(_as_messages, rows) if len(json.dumps(pair)) < 3 * LENGTH]
    n = options.steps * options.batch
    assert len(pairs) >= n, f"{options.data} has {len(pairs)} short pairs, and {n} are needed"
    (options.folder / "pairs.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs[:n]), encoding="utf-8"
    )


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    def turns(role: str, text: Any) -> Any:
        return (
            [{"role": role, "content": text["value"] if isinstance(text, dict) else text}]
            if not isinstance(text, list)
            else text
        )

    if "conversations" in row:
        row = {"prompt": row["conversations"][0]["value"], **row}
    return {
        name: turns("user" if name == "prompt" else "assistant", row[name]) for name in ("prompt", "chosen", "rejected")
    }


# -- runs ------------------------------------------------------------------------------------------------------------------


def _run(name: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    began, cpu = time.perf_counter(), sum(os.times()[2:4])
    same = ["--steps", str(options.steps), "--batch", str(options.batch), "--threads", str(options.threads)]
    command = [sys.executable, "-m", "tests.bench.trl_sweep", "--child", name, json.dumps(settings), *same]
    command += ["--model", str(options.model), "--folder", str(options.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds, cpu = time.perf_counter() - began, sum(os.times()[2:4]) - cpu
    return {"seconds": seconds, "cpu": cpu, **json.loads(done.stdout.splitlines()[-1])}


def _train_in_prefcache(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    import prefcache

    config = {
        "model": str(options.model),
        "out": str(options.folder / "experiment"),
        "cache": str(options.folder / "cache-of-prefcache"),
        # As TRL: every token after the prompt counts, nothing is held out, and the learning rate falls to 0.
        "prepare": {
            "data": str(options.folder / "pairs.jsonl"),
            "held_out": 0,
            "max_length": LENGTH,
            "too_long": "keep_start",
            "train_on": "all",
        },
        "train": {
            "run": "-".join(str(value) for value in settings.values()),
            "batch_size": options.batch,
            "epochs": 1,
            "samples": 0,
            "scheduler": "linear",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            **settings,
        },
    }
    prefcache.prepare(config, quiet=True)
    scored = prefcache.score(config, quiet=True)
    prefcache.train(config, quiet=True)
    steps = prefcache.sql(
        "select seconds from throughput where run = $run",
        options.folder / "experiment",
        parameters={"run": config["train"]["run"]},
    )  # type: ignore[index]
    return {
        "steps": sum(steps.table["seconds"].to_pylist()),
        "reference": scored.scored,
        "peak_mib": contest.resident("VmHWM"),
    }  # type: ignore[union-attr]


def _train_in_trl(name: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import LlamaModel
    from trl import DPOConfig, DPOTrainer

    from prefcache.trl import CachedReference

    n_sequences, forward = 0, LlamaModel.forward

    def counted(self: Any, input_ids: Any = None, **named: Any) -> Any:
        nonlocal n_sequences
        n_sequences += 0 if torch.is_grad_enabled() else len(input_ids)
        return forward(self, input_ids=input_ids, **named)

    LlamaModel.forward = counted

    class Cached(CachedReference, DPOTrainer):
        pass

    cache = options.folder / "cache-of-trl"
    n_before = _rows(cache, options.model) if name == "cached" else 0
    trainer = (Cached if name == "cached" else DPOTrainer)(
        model=str(options.model),
        args=DPOConfig(
            output_dir=str(options.folder / "trl"),
            per_device_train_batch_size=options.batch,
            num_train_epochs=1,
            learning_rate=settings["learning_rate"],
            beta=settings["beta"],
            loss_type=settings["loss"],
            max_length=LENGTH,
            precompute_ref_log_probs=name == "trl-precompute",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(options.folder / "pairs.jsonl"), split="train"),
        **({"reference_cache": cache} if name == "cached" else {}),
    )
    trained = trainer.train()
    scored = _rows(cache, options.model) - n_before if name == "cached" else n_sequences
    return {"steps": trained.metrics["train_runtime"], "reference": scored, "peak_mib": contest.resident("VmHWM")}


def _rows(cache: Path, model: Path) -> int:
    import prefcache

    return len(prefcache.open_cache(cache, model=str(model), quiet=True))


if __name__ == "__main__":
    main()
