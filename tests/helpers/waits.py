"""How often the host waits for a device in a step of real values."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefcache.pipeline.model.device import traced_as

# Operations whose result is a value in Python, or a tensor of a length that depends on values.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in _WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts["to_host"] += 1
        return tensor.detach().clone()


@contextmanager
def count_waits() -> Iterator[Waits]:
    """Compute by a GPU's rules, on the CPU."""
    waits = Waits()
    with traced_as("cuda", waits.to_host), waits:
        yield waits
