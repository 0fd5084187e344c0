"""Products of float32 matrices on an AMD processor, by oneDNN where it is faster than what PyTorch would take.

PyTorch multiplies by MKL, which does less well on these processors than oneDNN, which PyTorch brings along. The product
is the same but for rounding, and both the scorer and the trainer take this one.

Shapes: a product is of [M, K] and [K, N].
"""

import os
import warnings
from functools import cache
from pathlib import Path

import torch

_CPUS = Path("/proc/cpuinfo")
# Values of the second matrix below which the call itself takes longer than what is won. Not of the product: what a token gives
# must not depend on how many others are in its row.
_FEWEST = 1 << 16
# oneDNN makes a kernel for every shape and keeps a thousand, at half a MiB each, unless told otherwise. Rows of tokens have ever
# new lengths; what is used again is used within a pass through the layers.
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


@cache
def use_onednn() -> torch.library.Library | None:
    """From now on in this process; None where it is not so. One that nothing refers to is taken back: the cache refers to it."""
    if not (_is_amd() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    for name, value in _KERNELS_KEPT.items():
        os.environ.setdefault(name, value)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # It warns that a kernel of PyTorch's own is replaced.
        warnings.simplefilter("ignore")
        library.impl("mm", _product, "CPU")  # type: ignore[no-untyped-call]
        library.impl("addmm", _product_and_sum, "CPU")  # type: ignore[no-untyped-call]
    return library


def _is_amd() -> bool:
    return _CPUS.exists() and "AuthenticAMD" in _CPUS.read_text(encoding="utf-8", errors="replace")


def _product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    if _is_faster(a_MK, b_KN):
        return _by_onednn(a_MK, b_KN, None)
    found: torch.Tensor = torch.ops.aten.mm.out(a_MK, b_KN, out=a_MK.new_empty(0))
    return found


def _product_and_sum(
    bias: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    plain = beta == alpha == 1 and bias.shape == b_KN.shape[1:] and bias.dtype == a_MK.dtype and bias.is_contiguous()
    if plain and _is_faster(a_MK, b_KN):
        return _by_onednn(a_MK, b_KN, bias)
    found: torch.Tensor = torch.ops.aten.addmm.out(bias, a_MK, b_KN, beta=beta, alpha=alpha, out=a_MK.new_empty(0))
    return found


def _by_onednn(a_MK: torch.Tensor, b_KN: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), bias_N, "none", [], "")
    return found


def _is_faster(a_MK: torch.Tensor, b_KN: torch.Tensor) -> bool:
    """Where both lie in memory as in the forward of a linear layer: the first row by row, the second column by column. In a
    backward pass they do not; there oneDNN would copy the second, and is slower than MKL with the first."""
    return (
        a_MK.dtype == b_KN.dtype == torch.float32
        and a_MK.dim() == b_KN.dim() == 2
        and a_MK.shape[1] == b_KN.shape[0]
        and a_MK.stride(1) == b_KN.stride(0) == 1
        and b_KN.stride(1) >= b_KN.shape[0]
        and b_KN.numel() >= _FEWEST
        and a_MK.numel() > 0
        and torch._C._get_mkldnn_enabled()
    )
