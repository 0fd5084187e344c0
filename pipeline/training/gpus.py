"""The GPUs whose rates are known, from the makers' data sheets: what bounds a step's time, and how much memory there is."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    bf16_flops: float  # operations per second on the tensor cores, dense
    float32_flops: float  # operations per second outside of them: without TF32, which PyTorch leaves off
    bytes_per_second: float  # of its own memory
    memory_bytes: float


# The first whose words all occur in the device's name is used, so a variant stands before the plain name.
GPUS = (
    Gpu("B200", 2250e12, 75e12, 8.0e12, 192e9),
    Gpu("H200 NVL", 835e12, 60e12, 4.8e12, 141e9),
    Gpu("H200", 989e12, 67e12, 4.8e12, 141e9),
    Gpu("H100 PCIe", 756e12, 51e12, 2.0e12, 80e9),
    Gpu("H100 NVL", 835e12, 60e12, 3.9e12, 94e9),
    Gpu("H100", 989e12, 67e12, 3.35e12, 80e9),
    Gpu("A100 40GB", 312e12, 19.5e12, 1.555e12, 40e9),
    Gpu("A100 PCIe", 312e12, 19.5e12, 1.935e12, 80e9),
    Gpu("A100", 312e12, 19.5e12, 2.039e12, 80e9),
    Gpu("L40S", 362e12, 91.6e12, 0.864e12, 48e9),
    Gpu("L4", 121e12, 30.3e12, 0.3e12, 24e9),
    Gpu("RTX 4090", 165e12, 82.6e12, 1.008e12, 24e9),
)


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU of a CUDA name or a plain one, or None if it is unknown, a part of a GPU, or a smaller variant."""
    words = set(re.split(r"[- ]", name.casefold()))
    if words & {"mig", "laptop", "d"}:
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.casefold().split())), None)
