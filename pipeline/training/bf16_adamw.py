"""AdamW for weights in bf16: arithmetic in float32, moments in bf16, weights and second moment rounded stochastically.

Rounded to the nearest, weights would not move at a usual learning rate of DPO, and a second moment would never shrink: beta2 = 0.999
takes away a tenth of a percent per step, and bf16 numbers are 0.4 to 0.8 percent apart. torchao's AdamW rounds only the weights
stochastically, and with bits of PyTorch's global generator, which an interrupted run would have to restore.

On a GPU one compiled kernel updates a parameter; on a CPU small chunks stay in the cache. Neither holds float32 copies of a
parameter.

Shapes: N values of one parameter, or of this process's shard of it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.stochastic_rounding import advance_key, make_key, random_bits, round_stochastically
from prefcache.pipeline.training.distributed import shard_start

_CPU_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 30


class Bf16AdamW(torch.optim.Optimizer):
    """Parameters that a model keeps in float32 have float32 moments, and nothing of them is rounded."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, seed: int = 0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "seed": seed, "first": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        A group's `seed`, another one in each step, and a parameter's number, from the group's `first` on, decide the rounding.
        """
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"], group["first"]):
                if parameter.grad is not None:
                    self._update(parameter, group, make_key(group["seed"], number))

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any], key: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        weight = _local(parameter.detach())
        weight_N = weight.reshape(-1)  # a copy, if it is not contiguous
        _step(
            weight_N,
            _local(parameter.grad).reshape(-1),
            _local(state["exp_avg"]).view(-1),
            _local(state["exp_avg_sq"]).view(-1),
            state["step"],
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            advance_key(key, shard_start(parameter)),
        )
        if not weight.is_contiguous():
            weight.copy_(weight_N.view_as(weight))


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# An operation of its own, so that a trace with fake tensors sees what a GPU runs: one kernel without temporary tensors.
@torch.library.custom_op("prefcache::bf16_adamw", mutates_args=("weight_N", "exp_avg_N", "exp_avg_sq_N"))
def _step(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    step: torch.Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    key: int,
) -> None:
    """Take the step of these weights."""
    steps = step.double()
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    # Tensors, as a compiled function would be compiled again for each new number.
    size, root = (rate / correction1).float(), correction2.sqrt().float()
    decay = torch.tensor(1 - rate * weight_decay)
    on_gpu = kind_of(weight_N.device) == "cuda"
    update, n = (_compile_update(), _GPU_CHUNK) if on_gpu else (_update_chunk, _CPU_CHUNK)
    for start in range(0, len(weight_N), n):
        part = slice(start, start + n)
        tensors = weight_N[part], grad_N[part], exp_avg_N[part], exp_avg_sq_N[part]
        chunk_key = torch.tensor(advance_key(key, start), dtype=torch.int32)
        update(*tensors, size, root, decay, chunk_key, beta1, beta2, eps)


def _update_chunk(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    size: torch.Tensor,
    root: torch.Tensor,
    decay: torch.Tensor,
    key: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, with Loshchilov & Hutter's decay, https://arxiv.org/abs/1711.05101."""
    gradient_N = grad_N.float()
    first_N = exp_avg_N.float().lerp(gradient_N, 1 - beta1)
    second_N = exp_avg_sq_N.float().lerp(gradient_N.square(), 1 - beta2)
    new_N = weight_N.float() * decay - size * first_N / (second_N.sqrt() / root + eps)
    exp_avg_N.copy_(first_N)
    if weight_N.dtype == torch.bfloat16:
        bits_N = random_bits(len(weight_N), key, weight_N.device)
        new_N = round_stochastically(new_N, bits_N & 0xFFFF)
        second_N = round_stochastically(second_N, bits_N >> 16 & 0xFFFF)
    exp_avg_sq_N.copy_(second_N)
    weight_N.copy_(new_N)


@functools.cache
def _compile_update() -> Callable[..., None]:
    return torch.compile(_update_chunk, dynamic=True)
