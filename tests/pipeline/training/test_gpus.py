"""A GPU is known by its CUDA name, and has the rates of its maker's data sheet."""

import pytest

from prefcache.pipeline.training.gpus import find_gpu


# The makers' data sheets: bf16 without sparsity in TFLOP/s, memory in GB and GB/s.
@pytest.mark.parametrize(
    ("name", "teraflops", "memory", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 80, 3350),
        ("NVIDIA H100 PCIe", 756, 80, 2000),
        ("NVIDIA H200", 989, 141, 4800),
        ("NVIDIA B200", 2250, 192, 8000),
        ("NVIDIA A100-SXM4-80GB", 312, 80, 2039),
        ("NVIDIA A100-SXM4-40GB", 312, 40, 1555),
        ("NVIDIA A100 80GB PCIe", 312, 80, 1935),
        ("NVIDIA L40S", 362, 48, 864),
        ("NVIDIA L4", 121, 24, 300),
        ("NVIDIA GeForce RTX 4090", 165, 24, 1008),
        ("h100", 989, 80, 3350),
    ],
)
def test_a_gpu_is_known_by_its_name(name, teraflops, memory, bandwidth):
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.bf16_flops, gpu.memory_bytes) == (teraflops * 1e12, memory * 1e9)
    assert gpu.bytes_per_second == pytest.approx(bandwidth * 1e9, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40", ""]
)
def test_a_part_a_smaller_variant_and_an_unknown_gpu_have_no_rates(name):
    assert find_gpu(name) is None
