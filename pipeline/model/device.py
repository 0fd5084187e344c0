"""The device that computes: the copies to and from it, and the kind that decides which kernels and sizes it is given.

What depends on the kind of device asks `kind_of`, and what the host waits for goes through `to_host`. A step can therefore be
traced as on a GPU where there is none (`traced_as`).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch

ToHost = Callable[[torch.Tensor], torch.Tensor]
_traced: tuple[str, ToHost] | None = None


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


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host, which waits until it is computed: once a step, for all that the step reports."""
    return tensor.detach().cpu() if _traced is None else _traced[1](tensor)


def finish_copies() -> None:
    """Wait for all copies to the host that were begun and that nobody waits for (offload.py)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def traced_as(kind: str, to_host: ToHost) -> Iterator[None]:
    """Compute as this kind of device does, with tensors that may be fake; `to_host` stands in for the copy back."""
    global _traced
    _traced, before = (kind, to_host), _traced
    try:
        yield
    finally:
        _traced = before
