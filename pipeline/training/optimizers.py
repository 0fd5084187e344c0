"""The optimizer, its learning rate, and what of it a checkpoint keeps.

AdamW, whose two moments take 32, 8 or 4 bits; torchao has the smaller ones, quantised in blocks. Its state is the tensors that
it is made of, quantised or not, so that a checkpoint holds plain tensors and a resumed run goes on bit by bit.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pipeline.config import Train
from pipeline.errors import UsageError
from pipeline.training.devices import part_of

# Of state, for each value that is trained: two moments, and the scales of their blocks of 256 or 128.
N_BYTES = {"adamw": 8, "adamw_8bit": 2 * (1 + 4 / 256), "adamw_4bit": 2 * (0.5 + 4 / 128)}


def refuse_missing(train: Train) -> None:
    if train.optimizer == "adamw":
        return
    try:
        version("torchao")
    except PackageNotFoundError:
        raise UsageError(
            f"train.optimizer={train.optimizer} needs torchao. Install it (pip install 'prefcache[optimizers]'), or take adamw."
        ) from None


def make(parameters: Sequence[torch.nn.Parameter], train: Train, device: torch.device) -> torch.optim.Optimizer:
    """Norms and biases do not decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    said: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "adamw":
        # One pass over each parameter and its moments, and nothing beside them: on a GPU a kernel for all, on a CPU no copies.
        return torch.optim.AdamW(groups, **said, fused=device.type in ("cpu", "cuda"))
    # Takes seconds to import.
    from torchao import optim

    kind = {"adamw_8bit": optim.AdamW8bit, "adamw_4bit": optim.AdamW4bit}[train.optimizer]
    found: torch.optim.Optimizer = kind(groups, **said)
    return found


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    # torchao compiles its update, for every shape anew; on a CPU that wants a compiler of C++, and minutes.
    on_cpu = _parameters(optimizer)[0].device.type == "cpu"
    with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
        optimizer.step()


# -- the learning rate -----------------------------------------------------------------------------------------------


def warmup_steps(n_steps: int, train: Train) -> int:
    return min(math.ceil(train.warmup_ratio * n_steps), n_steps - 1)


def learning_rate(step: int, n_steps: int, train: Train) -> float:
    """Linear warm-up, then as the scheduler says. `step` counts from 1; the first has the rate after no warm-up step."""
    done, warmup = step - 1, warmup_steps(n_steps, train)
    if done < warmup:
        return train.learning_rate * done / warmup
    progress = (done - warmup) / max(1, n_steps - warmup)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return train.learning_rate * share[train.scheduler]


# -- its state -------------------------------------------------------------------------------------------------------


def state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors that the state is in, by parameter and name; of a quantised one, those that it is made of."""
    found: dict[str, torch.Tensor] = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            found |= _plain(f"{i}.{name}", value)
    return found


def restore(optimizer: torch.optim.Optimizer, saved: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill in a state that was saved. The optimizer lays it out itself, by a step of nothing; weights are to be restored after."""
    parameters = _parameters(optimizer)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    take_step(optimizer, 0.0)
    optimizer.zero_grad()
    laid_out, seen = state(optimizer), set[int]()
    for name, value in saved:
        laid_out[name].copy_(part_of(value, laid_out[name]))
        seen.add(int(name.partition(".")[0]))
    for i, parameter in enumerate(parameters):
        if i not in seen:  # no step had a gradient of it
            optimizer.state.pop(parameter)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plain(name: str, value: Any) -> dict[str, torch.Tensor]:
    # A shard is made of parts as well, and is gathered as one.
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    parts, _ = value.__tensor_flatten__()
    return {f"{name}.{part}": getattr(value, part) for part in parts}
