"""What prefcache reaches on a GPU: training, scoring, memory, and the kernels behind them, beside TRL and vLLM.

    make bench-gpu
    python -m tests.bench.gpu train score memory kernels    some of them
    python -m tests.bench.gpu --tiny                        all of it on any machine, in a minute: to try it, no figures

First the device is held against plain float32 forwards on the CPU, on pairs drawn afresh: if log-probs or gradients are
off, the command ends with exit code 1 and nothing is timed. Models have random weights and are built from their config, pairs are
random ids with the lengths of real ones; nothing is fetched. Each part has its seconds, nine minutes in all; what they do not
suffice for is said. What falls short of its target is printed as it is, with "short of".

It takes torch, transformers, accelerate and pyarrow. peft adds adapters; pydantic, duckdb, xxhash and PyYAML the program's own
step (Policy.update) beside the same techniques without it; trl and datasets add TRL; `make vllm` adds vLLM. What is not installed is
said to be absent.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing is looked up anywhere, and models of many sizes come and go.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

from transformers.utils import logging

from tests.bench.gpu import kernels, machine, memory, score, train
from tests.bench.gpu.machine import Budget

Part = Callable[[bool, Budget, dict[str, float]], dict[str, Any]]
# In this order, with their seconds.
PARTS: dict[str, tuple[float, Part]] = {
    "kernels": (40, lambda tiny, budget, _: kernels.run(tiny, budget)),
    "train": (260, train.run),
    "score": (90, lambda tiny, budget, _: score.run(tiny, budget)),
    "memory": (110, lambda tiny, budget, _: memory.run(tiny, budget)),
}
# Dense bf16 TFLOP/s that the makers state.
NOMINAL = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them unless said")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few pairs, to try the benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("runs/bench-gpu.json"))
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not machine.ON_GPU and not options.tiny:
        parser.error("PyTorch sees no GPU here. --tiny tries every part without one.")
    logging.disable_progress_bar()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {**machine.facts(), "tiny": options.tiny}
    _say(found)
    try:
        found["check"] = kernels.check(options.tiny)
        found["tflops"] = _rates(found["device"], options.tiny)
        for name in PARTS:
            if not options.parts or name in options.parts:
                found[name] = _part(name, options.tiny, found["tflops"])
                _write(options.json, found)
    except kernels.Wrong as error:
        found["wrong"] = str(error)
        _write(options.json, found)
        sys.exit(f"error: the device does not compute what it should, so nothing is timed: {error}")
    print(f"All figures: {options.json}")
    if failed := [name for name in PARTS if "failed" in found.get(name, {})]:
        sys.exit(f"error: {', '.join(failed)} failed; see above")


def _part(name: str, tiny: bool, tflops: dict[str, float]) -> dict[str, Any]:
    """What it found. One that fails does not keep the others from being measured."""
    print(f"-- {name} {'-' * (100 - len(name))}", flush=True)
    seconds, part = PARTS[name]
    try:
        return part(tiny, Budget(seconds), tflops)
    except kernels.Wrong:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"failed": machine.why_failed(error)}
    finally:
        machine.free()


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _say(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in found["versions"].items())
    print(f"{found['date']}  {found['device']}, {found['cores']} cores; {versions}", flush=True)


def _rates(device: str, tiny: bool) -> dict[str, float]:
    size = 256 if tiny else 8192
    rates = machine.matrix_rates(size, size, size, 10)
    nominal = next((rate for name, rate in NOMINAL.items() if name in device), None)
    found = {**rates, "measured": rates["bfloat16" if machine.ON_GPU else "float32"]}
    said = f", of {nominal} that are stated: {found['measured'] / nominal:.1%}" if nominal else ""
    print(f"Matrix product of {size:,}: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()) + f" TFLOP/s{said}\n", flush=True)  # fmt: skip
    return found | ({"nominal": float(nominal)} if nominal else {})


if __name__ == "__main__":
    main()
