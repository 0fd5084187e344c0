"""The machine that is measured: what it is, what is installed, its memory, its time, and how fast it multiplies matrices."""

import datetime
import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from prefcache.pipeline.model.oom import is_out_of_memory
from tests.bench import contest

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "vllm", "datasets", "pydantic", "prefcache")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def facts() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": "cpu",
        "versions": {name: installed(name) for name in PACKAGES},
    }
    if ON_GPU:
        of_gpu = torch.cuda.get_device_properties(DEVICE)
        found |= {"device": of_gpu.name, "memory_bytes": of_gpu.total_memory, "cuda": torch.version.cuda}
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def absent(*modules: str) -> str | None:
    """Which of these cannot be imported, in words; None where all can. Nothing is imported for it."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"absent: {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed" if lacking else None


def why_failed(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


# -- time ------------------------------------------------------------------------------------------------------------


class Budget:
    """The seconds that a part may take. What would begin after them does not."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.perf_counter() + seconds

    def share(self, of_what_is_left: float) -> "Budget":
        return Budget(of_what_is_left * (self._ends - now()))

    def over(self) -> bool:
        return now() > self._ends


def now() -> float:
    return time.perf_counter()


def timed(work: Callable[[], Any]) -> float:
    """Seconds until all of it is computed, not only asked for."""
    wait()
    began = now()
    work()
    wait()
    return now() - began


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# -- memory ----------------------------------------------------------------------------------------------------------


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def forget_peak() -> None:
    """From now on a new peak is looked for. What is cached stays: to be asked for again would take time."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        contest.forget_peaks()


def peak() -> int:
    """Bytes: what tensors took of the GPU at most, or this process of the CPU's memory."""
    return torch.cuda.max_memory_allocated() if ON_GPU else int(contest.resident("VmHWM") * 2**20)


# -- matrix products -------------------------------------------------------------------------------------------------


def matrix_rates(m: int, k: int, n: int, times: int) -> dict[str, float]:
    """TFLOP/s of a product [m, k] x [k, n] of random numbers: bf16, float32, and float32 as TF32 where there is a GPU."""
    found = {"bfloat16": _rate(m, k, n, torch.bfloat16, times), "float32": _rate(m, k, n, torch.float32, times)}
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            found["tf32"] = _rate(m, k, n, torch.float32, times)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    return found


def _rate(m: int, k: int, n: int, dtype: torch.dtype, times: int) -> float:
    left, right = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype)
    for _ in range(3):
        left @ right

    def several() -> None:
        for _ in range(times):
            left @ right

    seconds = statistics.median(timed(several) for _ in range(5))
    return 2 * m * k * n * times / seconds / 1e12
