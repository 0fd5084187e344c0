"""The device that computes: the copies to and from it, and the kind that decides which kernels and sizes it is given.

What depends on the kind of device asks `kind_of`, and what the host waits for goes through `to_host`. A step can therefore be
traced as on a GPU where there is none (`traced_as`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

ToHost = Callable[[torch.Tensor], torch.Tensor]
_traced: tuple[str, ToHost] | None = None
_TORCH_TYPES = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32", "float64")}
_ALIGNMENT = 16  # bytes; a view of a buffer has to start at a multiple of its type's size


def kind_of(device: torch.device | str) -> str:
    """The kind of a device, such as cuda or cpu, by which kernels, dtypes and chunk sizes are chosen."""
    return torch.device(device).type if _traced is None else _traced[0]


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to a device, to a GPU from pinned memory.

    Otherwise the host would wait for all queued GPU work, and could not lay out a micro-batch while the previous one computes.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_together(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Copy arrays of any types to a device in one transfer. A transfer of a few bytes takes as long as one of many."""
    starts, end = [], 0
    for values in arrays.values():
        starts.append(end)
        end += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = np.empty(end, np.uint8)
    for start, values in zip(starts, arrays.values(), strict=True):
        buffer[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    copied = to_device(torch.from_numpy(buffer), device)
    return {
        name: copied[start : start + values.nbytes].view(_TORCH_TYPES[values.dtype]).view(values.shape)
        for start, (name, values) in zip(starts, arrays.items(), strict=True)
    }


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host, which waits until it is computed: once a step, for all that the step reports."""
    return tensor.detach().cpu() if _traced is None else _traced[1](tensor)


def finish_copies() -> None:
    """Wait for all copies to the host that are still under way (offload.py)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_together(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copy tensors to the host, as float64, waiting for the device once."""
    if not tensors:
        return {}
    flat = to_host(torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])).numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors.values()])
    parts = zip(tensors.items(), np.split(flat, ends[:-1]), strict=True)
    return {name: values.reshape(tensor.shape) for (name, tensor), values in parts}


@contextlib.contextmanager
def traced_as(kind: str, to_host: ToHost) -> Iterator[None]:
    """Compute as this kind of device does, with tensors that may be fake; `to_host` stands in for the copy back."""
    global _traced
    _traced, before = (kind, to_host), _traced
    try:
        yield
    finally:
        _traced = before
