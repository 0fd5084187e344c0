"""The optimizer's state in host memory: on the device are the moments of the parameter that is updated, and those of the next one.

It works with any optimizer, whose arithmetic stays on the device, so that a step gives the same weights bit by bit. (torchao's
CPUOffloadOptimizer updates on the host, with the gradients as they were before clipping.)
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.offload import Shuttle

_LEAST_VALUES = 4096  # as torchao quantizes; smaller ones are too many to copy one by one
Moments = dict[str, torch.Tensor]


class OffloadedState:
    """Brings the state of the parameters of an optimizer's step, before the step, and takes it back afterwards."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._shuttle = Shuttle(device)
        self._hosts: dict[tuple[torch.Tensor, str], Moments] = {}  # by parameter and name, the parts of a moment
        self._fetched: dict[torch.Tensor, Moments] = {}
        self._order: dict[torch.Tensor, None] = {}  # of this step
        self._following: dict[torch.Tensor, torch.Tensor] = {}  # in the order of the step before
        optimizer.register_step_pre_hook(self._bring)
        optimizer.register_step_post_hook(self._take_back)

    def _bring(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in _find_updated(optimizer):
            moments = self._fetched.pop(parameter, None) or self._fetch(optimizer, parameter)
            for name, moment in moments.items():
                optimizer.state[parameter][name] = _map_parts(moment, lambda _, part: self._shuttle.receive(part))
            if parameter in self._order:
                self._following, self._order = dict(itertools.pairwise(self._order)), {}
            self._order[parameter] = None
            if (following := self._following.get(parameter)) is not None:
                self._fetched[following] = self._fetch(optimizer, following)

    def _fetch(self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Moments:
        return {
            name: _map_parts(moment, lambda _, part: self._shuttle.fetch(part))
            for name, moment in optimizer.state.get(parameter, {}).items()
            if (parameter, name) in self._hosts
        }

    def _take_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in _find_updated(optimizer):
            state = optimizer.state[parameter]
            for name, moment in state.items():
                if moment.numel() < _LEAST_VALUES or kind_of(parameter.device) == "cpu":
                    continue
                hosts = self._hosts.setdefault((parameter, name), {})

                def send(part_name: str, part: torch.Tensor, hosts: Moments = hosts) -> torch.Tensor:
                    hosts[part_name] = self._shuttle.send(part, hosts.get(part_name))
                    return hosts[part_name]

                state[name] = _map_parts(moment, send)


def _find_updated(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _map_parts(moment: torch.Tensor, convert: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Convert a tensor, or the tensors that a quantized one consists of, by their names."""
    if not hasattr(moment, "__tensor_flatten__"):
        return convert("", moment)
    names, context = moment.__tensor_flatten__()
    parts = {name: convert(name, getattr(moment, name)) for name in names}
    made: torch.Tensor = type(moment).__tensor_unflatten__(parts, context, moment.shape, moment.stride())  # type: ignore[attr-defined]
    return made
