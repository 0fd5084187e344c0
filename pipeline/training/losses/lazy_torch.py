"""torch, imported when a loss is first computed.

Listing the losses and recognizing a finished run read signatures only, and importing torch takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any


class _LazyModule:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
else:
    torch, F = _LazyModule("torch"), _LazyModule("torch.nn.functional")

__all__ = ["F", "torch"]
