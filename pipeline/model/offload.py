"""Tensors that wait in host memory until the device needs them (train.offload).

Copies from and to pinned memory run on a stream of their own while the device computes: one after another, so that a tensor is never
read back before it was written. Not measured on a GPU.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch

from prefcache.pipeline.model.device import kind_of

# Smaller tensors take less time to compute than to copy.
_LEAST_BYTES = 1 << 16


class Shuttle:
    """Copies between a device and the host. On a CPU, where both are one, they are plain copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arrivals: dict[torch.Tensor, torch.cuda.Event] = {}

    def send(self, tensor: torch.Tensor, host: torch.Tensor | None = None) -> torch.Tensor:
        """Begin to copy a tensor, with the value that is computed by now, to the host; return the copy."""
        if host is None:
            host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            tensor.record_stream(self._stream)  # its memory may be freed before the copy is done
        with self._on_own_stream():
            return host.copy_(tensor, non_blocking=True)

    def fetch(self, host: torch.Tensor) -> torch.Tensor:
        """Begin to copy back what was sent; `receive` it before it is used."""
        with self._on_own_stream():
            tensor = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
            if self._stream is not None:
                self._arrivals[tensor] = self._stream.record_event()
        return tensor

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let the device wait for a tensor that was fetched; the host does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrivals.pop(tensor))
            tensor.record_stream(current)
        return tensor

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            yield


# -- what a backward pass needs --------------------------------------------------------------------------------------


class _Sent:
    """A tensor on the host, and the one that was sent before it, which the backward pass needs after it."""

    def __init__(self, shuttle: Shuttle, tensor: torch.Tensor, before: "_Sent | None") -> None:
        self._shuttle, self._host = shuttle, shuttle.send(tensor)
        self._fetched: torch.Tensor | None = None
        self._before = None if before is None else weakref.ref(before)

    def restore(self) -> torch.Tensor:
        """Return the tensor, and begin to fetch the next one, which comes while the device computes with this one."""
        fetched = self._shuttle.receive(self._fetch())
        self._fetched = None
        if self._before and (before := self._before()):
            before._fetched = before._fetch()
        return fetched

    def _fetch(self) -> torch.Tensor:
        return self._shuttle.fetch(self._host) if self._fetched is None else self._fetched


class OffloadedInputs:
    """Keeps the inputs of recomputed layers on the host from the forward to the backward pass."""

    def __init__(self) -> None:
        self._shuttle: Shuttle | None = None  # to the device of the first tensor
        self._last: weakref.ref[_Sent] | None = None

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Send what autograd saves in this context, which are a layer's inputs if only its checkpoint is called there."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Sent:
        is_large = tensor.is_floating_point() and tensor.nbytes >= _LEAST_BYTES
        if kind_of(tensor.device) == "cpu" or not is_large or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._shuttle = self._shuttle or Shuttle(tensor.device)
        sent = _Sent(self._shuttle, tensor, self._last() if self._last else None)
        self._last = weakref.ref(sent)
        return sent

    def _unpack(self, packed: torch.Tensor | _Sent) -> torch.Tensor:
        return packed.restore() if isinstance(packed, _Sent) else packed
