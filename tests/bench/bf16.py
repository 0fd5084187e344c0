"""What weights in bf16 learn: the demo trained in float32, in bf16, and in bf16 rounded to the nearest, for some seeds each.

    make bench-bf16
    PYTHONPATH=.venv/torchao python -m tests.bench.bf16 --seeds 5 --folder /tmp/bf16

A seed orders the examples and rounds the weights. Printed are the held-out figures of each way: the mean over the seeds and, in
brackets, the lowest and the highest. With torchao at hand, moments of 8 bits are a way of their own.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from unittest import mock

from tests.helpers.project import ROOT, invoke, open_folder, options
from tests.helpers.runs import metrics

BF16 = "train.weights=bfloat16"
WAYS = {
    "float32": [],
    "bfloat16": [BF16],
    "bfloat16, 8-bit moments": [BF16, "train.optimizer=adamw_8bit"],
    "bfloat16, to the nearest": [BF16],
}
FIGURES = ("eval_rewards/margins", "eval_loss", "eval_rewards/accuracies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use those that are there")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    with open_folder(arguments.folder) as folder:
        found = compare(folder, arguments.seeds, arguments.epochs)
    print(f"{'held out, after training':28}" + "".join(f"{name.removeprefix('eval_'):>28}" for name in FIGURES))
    for way, rows in found.items():
        columns = ([row[name] for row in rows] for name in FIGURES)
        cells = (f"{mean(values):.4f} ({min(values):.4f}-{max(values):.4f})" for values in columns)
        print(f"{way:28}" + "".join(f"{cell:>28}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


def compare(folder: Path, n_seeds: int, epochs: float) -> dict[str, list[dict[str, float]]]:
    """Train each way with each seed; return the last evaluations."""
    _score_demo(folder)
    has_torchao = importlib.util.find_spec("torchao") is not None
    ways = {way: settings for way, settings in WAYS.items() if has_torchao or "8-bit" not in way}
    return {
        way: [_train(folder, way, [*settings, f"train.epochs={epochs}"], seed) for seed in range(n_seeds)]
        for way, settings in ways.items()
    }


def _score_demo(folder: Path) -> None:
    demo = folder / "data/demo"
    if not (demo / "reference").exists():
        shutil.copytree(ROOT / "data/demo", demo, dirs_exist_ok=True, ignore=shutil.ignore_patterns("reference"))
        subprocess.run([sys.executable, demo / "make_reference.py"], check=True, stdout=sys.stderr)
    for stage in ("prepare", "score"):
        invoke(folder, stage, "data/demo/config.yaml")


def _train(folder: Path, way: str, settings: list[str], seed: int) -> dict[str, float]:
    run = f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    said = [*settings, f"train.seed={seed}", f"train.run={run}", "train.samples=0", "train.alerts=off"]
    with _rounded_to_the_nearest() if "nearest" in way else nullcontext():
        invoke(folder, "train", "data/demo/config.yaml", *options(*said))
    last = metrics(folder / "runs/demo" / run)[-1]
    return {name: last[name] for name in FIGURES}


def _rounded_to_the_nearest() -> mock._patch:
    from prefcache.pipeline.training import bf16_adamw

    return mock.patch.object(bf16_adamw, "round_stochastically", lambda values_N, bits_N: values_N.bfloat16())


if __name__ == "__main__":
    main()
