"""Updates within the backward pass (train.release_gradients): no gradient outlives its layer.

As soon as a parameter's gradient is whole, summed over all uses of the parameter and over the processes of a sharded model, the
optimizer takes this parameter's step and the gradient is freed. So the whole gradient never exists, and cannot be clipped; and
gradients of micro-batches cannot add up. Without clipping the result is that of an ordinary step, bit by bit.

Autograd runs a parameter's hook after all operations that pass it a gradient, and only those still read its old value.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training import optimizers


def refuse_copies(n_processes: int) -> None:
    """Refuse processes that hold a copy of the model each: their gradients are averaged after the hooks ran."""
    if n_processes > 1:
        raise UsageError(
            f"train.release_gradients: {n_processes} processes hold a copy of the model each, whose gradients are averaged after each "
            "copy would have used its own. Shard the model (train.shard=fsdp), or train in one process."
        )


class ReleasedGradients:
    """The optimizer's groups are single parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._group_of: dict[int, dict[str, Any]] = {id(group["params"][0]): group for group in optimizer.param_groups}
        self._norms: dict[int, torch.Tensor] = {}
        self._is_updating = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def updates(self, rate: float, seed: int) -> Iterator[None]:
        """Update the weights in the backward passes of this context."""
        optimizers.begin_step(self._optimizer, rate, seed)
        self._norms, self._is_updating = {}, True
        try:
            yield
        finally:
            self._is_updating = False

    def take_norm(self) -> torch.Tensor:
        """Return the norm of the last step's gradient, added up in the order of an ordinary step."""
        norms = [self._norms[id(parameter)] for parameter in self._parameters if id(parameter) in self._norms]
        self._norms = {}
        return optimizers.total_norm(norms)

    def _update(self, parameter: torch.Tensor) -> None:
        if not self._is_updating or parameter.grad is None:
            return
        # Kept on the device: reading one norm per parameter would stall a GPU as often.
        (self._norms[id(parameter)],) = optimizers.measure_norms([parameter.grad])
        optimizers.update_group(self._optimizer, self._group_of[id(parameter)])
        parameter.grad = None
