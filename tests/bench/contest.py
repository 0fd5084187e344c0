"""Contenders that do the same work, each in a process of its own, taking turns; and what is counted of them.

Every contender has the same threads and settings, loads once, and is then asked for one thing at a time, by name; in
between it is silent. Work is counted from the shapes of torch's operations, memory as resident memory.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# 35.4 million weights: 19.0 in the layers, 16.4 in the embeddings, which are the head as well, as in most small models.
LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = LLAMA | {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def same_for_all(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Who waits for a turn must not keep a core busy.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def write_llama(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    # Wide enough that a token's log-prob depends visibly on all tokens before it.
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.05)).save_pretrained(folder)


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


# -- turns -----------------------------------------------------------------------------------------------------------


class Process:
    """A contender: asked one thing at a time, and silent in between."""

    def __init__(self, module: str, name: str, folder: Path, *arguments: Any) -> None:
        self._name, self._log = name, folder / f"{name}.log"
        command = [sys.executable, "-m", module, "--serve", name, "--folder", folder, *arguments]
        with open(self._log, "wb") as log:
            self._running = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._running.stdin
        with contextlib.suppress(BrokenPipeError):
            self._running.stdin.close()
        try:
            self._running.wait(30)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._running.stdin and self._running.stdout
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self._running.stdin, flush=True)
        if not (line := self._running.stdout.readline()):
            raise SystemExit(f"{self._name} ended at '{what}':\n{self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def round(self) -> float:
        seconds: float = self.ask("round")["seconds"]
        return seconds


def serve(answers: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """What a contender's process does until nobody asks any more."""
    # Libraries print; answers go where nobody else writes.
    to_whom_asks = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for what in sys.stdin:
        print(json.dumps(answers[what.strip()]()), file=to_whom_asks, flush=True)


def rounds(
    turns: Mapping[str, Callable[[], float]], n_rounds: int, over: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, float]]:
    """Seconds of each one's turn; each time another one begins. When time is over, those left have no turn."""
    names = list(turns)
    for i in range(n_rounds):
        first = i * max(1, len(names) // n_rounds) % len(names)
        seconds: dict[str, float] = {}
        for name in names[first:] + names[:first]:
            if not over():
                seconds[name] = turns[name]()
        if not seconds:
            return
        took = (f"{name} {seconds[name]:.2f} s" for name in names if name in seconds)
        print(f"  round {i + 1}: " + ", ".join(took), flush=True)
        yield seconds


# -- what is counted -------------------------------------------------------------------------------------------------


class Work:
    """What is computed between `with work.counter` and its end, from the shapes of torch's operations.

    For attention it is the whole square of queries and keys, for everyone.
    """

    def __init__(self, hidden: int, vocabulary: int) -> None:
        import torch
        from torch.utils import flop_counter

        self.positions = self.head_positions = 0
        aten = torch.ops.aten

        def embedding(weight: Sequence[int], ids: Sequence[int], *_: Any, **__: Any) -> int:
            self.positions += math.prod(ids)
            return 0

        def mm(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
            if tuple(right) == (hidden, vocabulary):
                self.head_positions += left[0]
            return 2 * left[0] * left[1] * right[1]

        def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
            return int(flop_counter.sdpa_flop_count(query, key, value))

        def attention_backward(gradient: Sequence[int], *inputs: Sequence[int], **__: Any) -> int:
            return int(flop_counter.sdpa_backward_flop_count(gradient, *inputs[:3]))

        self.counter = flop_counter.FlopCounterMode(
            display=False,
            custom_mapping={
                aten.embedding: embedding,
                aten.mm: mm,
                aten._scaled_dot_product_flash_attention_for_cpu: attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
            },
        )


def resident(what: str) -> float:
    """MiB of this process and all below it: now (VmRSS), or at most (VmHWM)."""
    total = 0
    for process in _processes():
        with contextlib.suppress(OSError):
            found = re.search(rf"{what}:\s+(\d+) kB", (process / "status").read_text())
            total += int(found[1]) if found else 0
    return total / 1024


def forget_peaks() -> None:
    for process in _processes():
        # As proc(5) has it. Where that is not allowed, the peak is since the start.
        with contextlib.suppress(OSError):
            (process / "clear_refs").write_text("5")


def _processes() -> list[Path]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # A program's name stands in brackets, and may have any characters.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return [Path(f"/proc/{pid}") for pid in found]
