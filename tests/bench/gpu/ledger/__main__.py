"""What a step costs on a GPU, exactly, without one: ours, TRL's, and supervised fine-tuning's.

    make gpu-ledger
    python -m tests.bench.gpu.ledger --only 8B              rows of some models, printed and not written
    python -m tests.bench.gpu.ledger --rates                the rates that the bounds assume

Every step runs on fake tensors as it would on a GPU (pipeline/model/traced_gpu.py). Bytes, FLOPs, kernels and syncs are exact;
times are bounds: `roofline`, where each operation takes the longer of its arithmetic and its traffic at the data sheet's rates, and
`launches`, 4 microseconds for each kernel. MFU is the needed arithmetic in the larger bound.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from prefcache.pipeline.training.step_trace import StepCost
from tests.bench.gpu.ledger.rows import (
    GPUS,
    LAUNCH_SECONDS,
    Row,
    count_needed_flops,
    gpu,
    roofline_seconds,
    rows,
    step_seconds,
    trace_row,
)
from tests.bench.gpu.ledger.targets import list_targets

FILE = Path(__file__).parents[1] / "ledger.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu.ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose model, trainer or name has one of these words"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write there; all rows are written to {FILE.name}")
    parser.add_argument("--rates", action="store_true", help="print the assumed rates only")
    parser.add_argument(
        "--targets", action="store_true", help="print only what was wanted and what the written rows have"
    )
    options = parser.parse_args()
    logging.disable_progress_bar()
    sys.path.append(str(Path(sys.prefix) / "torchao"))  # kept apart from other packages by the tests, which install it
    if find_spec("torchao") is None:
        parser.error(
            "torchao, whose 8-bit AdamW some rows have, is not here: pip install torchao, or run the tests once."
        )
    _print_rates()
    if options.rates:
        return
    if options.targets:
        print(*list_targets(json.loads((options.json or FILE).read_text(encoding="utf-8"))["rows"]), sep="\n")
        return
    file, found = options.json or (None if options.only else FILE), list[dict[str, Any]]()
    for row in rows():
        if _is_wanted(row, options.only):
            found.append(describe(*trace_and_print(row)))
            if file:  # after each row, for all of them take a while
                file.write_text(json.dumps({"pairs": 16, "rows": found}, indent=1) + "\n", encoding="utf-8")
    print(*list_targets(found), sep="\n")


def _is_wanted(row: Row, words: list[str] | None) -> bool:
    return not words or any(word in (row.model, row.trainer, *row.name.split()) for word in words)


def trace_and_print(row: Row) -> tuple[Row, StepCost]:
    row, cost = trace_row(row)
    ms = roofline_seconds(cost, "H100") * 1e3
    launches = cost.kernels * LAUNCH_SECONDS * 1e3
    mfu = "" if row.trainer == "scorer" else f"{mfu_of(row, cost, 'H100'):6.1%}"
    tflops = "+".join(f"{cost.flops[dtype] / 1e12:.3g}" for dtype in ("bfloat16", "float32"))
    parts = " ".join(f"{name[:4]} {n / 2**30:.1f}" for name, n in asdict(cost.parts).items() if n >= 2**26)
    print(
        f"{row.model:8} {row.name:58} {cost.peak_bytes / 2**30:8.2f} GiB  {tflops:>12} TFLOP {cost.kernels:8,} kernels "
        f"{cost.syncs:4} syncs {ms:9.1f} ms {launches:8.1f} ms {mfu}  {parts}",
        flush=True,
    )
    return row, cost


def mfu_of(row: Row, cost: StepCost, name: str) -> float:
    return count_needed_flops(row.model, row.lora) / step_seconds(cost, name) / gpu(name).bf16_flops


def describe(row: Row, cost: StepCost) -> dict[str, Any]:
    return {
        **asdict(row),
        "peak_bytes": cost.peak_bytes,
        "parts": asdict(cost.parts),
        "held_bytes": cost.held_bytes,
        "flops": cost.flops,
        "kernels": cost.kernels,
        "syncs": cost.syncs,
        "copies": cost.copies,
        "bytes_moved": cost.bytes_moved,
        "attention": list(cost.attention),
        "head": list(cost.head),
        "roofline_ms": {name: round(roofline_seconds(cost, name) * 1e3, 2) for name in GPUS},
        "launch_ms": round(cost.kernels * LAUNCH_SECONDS * 1e3, 2),
        "mfu": {} if row.trainer == "scorer" else {name: round(mfu_of(row, cost, name), 4) for name in GPUS},
    }


def _print_rates() -> None:
    print("Assumed, from the makers' data sheets:      TFLOP/s bf16   TFLOP/s float32    TB/s")
    for name in GPUS:
        known = gpu(name)
        print(
            f"  {name:42} {known.bf16_flops / 1e12:12,.0f} {known.float32_flops / 1e12:17,.1f} {known.bytes_per_second / 1e12:7.2f}"
        )
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
