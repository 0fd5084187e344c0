"""The optimizer, its learning rate, and what of it a checkpoint keeps.

AdamW, whose two moments take as many bits as the weights, or 8 or 4; torchao has these, quantized in blocks. Weights in bf16 are
rounded stochastically. Its state is stored as the plain tensors that it consists of, quantized or not, so that a resumed run
continues bit by bit.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.model.device import finish_copies
from prefcache.pipeline.model.stochastic_rounding import make_key
from prefcache.pipeline.safetensors_files import shorten_list
from prefcache.pipeline.training.bf16_adamw import Bf16AdamW
from prefcache.pipeline.training.distributed import take_shard

# Bytes of quantized state for each trained value: two moments, and the scales of their blocks of 256 or 128.
_QUANTIZED_BYTES = {"adamw_8bit": 2 * (1 + 4 / 256), "adamw_4bit": 2 * (0.5 + 4 / 128)}


def state_bytes(optimizer: str, dtype: torch.dtype) -> float:
    """Return the bytes of state for each trained value of this data type."""
    return _QUANTIZED_BYTES.get(optimizer, 2 * dtype.itemsize)


def refuse_missing(train: Train) -> None:
    if train.optimizer == "adamw":
        return
    try:
        version("torchao")
    except PackageNotFoundError:
        raise UsageError(
            f"train.optimizer={train.optimizer} needs torchao. Install it (pip install 'prefcache[optimizers]'), or take adamw."
        ) from None


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], train: Train, device: torch.device
) -> torch.optim.Optimizer:
    """Make the optimizer. Norms and biases do not decay. A parameter that is updated apart from others is a group of its own."""
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    one_by_one = train.release_gradients or train.optimizer != "adamw" or "optimizer" in train.offload
    members = [[p] for p in (*matrices, *vectors)] if one_by_one else [matrices, vectors]
    firsts = itertools.accumulate(map(len, members), initial=0)
    groups = [
        {"params": group, "first": first, "weight_decay": train.weight_decay if group and group[0].ndim >= 2 else 0.0}
        for group, first in zip(members, firsts, strict=False)
    ]
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "adamw" and train.weights == "bfloat16":
        return Bf16AdamW(groups, **options)
    if train.optimizer == "adamw":
        # One pass over each parameter and its moments: on a GPU one kernel for all, on a CPU no copies.
        return torch.optim.AdamW(groups, **options, fused=device.type in ("cpu", "cuda"))
    # Takes seconds to import.
    from torchao import optim

    optimizer_class = {"adamw_8bit": optim.AdamW8bit, "adamw_4bit": optim.AdamW4bit}[train.optimizer]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options, bf16_stochastic_round=True)
    make_moment = optimizer._new_buffer  # type: ignore[attr-defined]

    def make_float32_moment(weight: torch.Tensor, signed: bool) -> torch.Tensor:
        # Moments too small to be quantized have the weight's own dtype, and in bf16 the second one would never shrink.
        moment: torch.Tensor = make_moment(weight, signed)
        return moment if hasattr(moment, "__tensor_flatten__") else moment.float()

    optimizer._new_buffer = make_float32_moment  # type: ignore[attr-defined]
    return optimizer


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients down to this norm, if theirs is larger; return theirs, in float32 whatever their data type."""
    parameters = list(parameters)
    norm = total_norm(measure_norms([parameter.grad for parameter in parameters if parameter.grad is not None]))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def measure_norms(gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return torch._foreach_norm(list(gradients), 2, dtype=torch.float32)


def total_norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm


def take_step(optimizer: torch.optim.Optimizer, rate: float, seed: int) -> None:
    """Update the parameters. `seed`, another one in each step, decides how weights in bf16 are rounded."""
    begin_step(optimizer, rate, seed)
    for group in optimizer.param_groups:
        update_group(optimizer, group)


def begin_step(optimizer: torch.optim.Optimizer, rate: float, seed: int) -> None:
    for group in optimizer.param_groups:
        group["seed"] = seed
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Update the parameters of a group that have a gradient, in a step that has begun."""
    device = _parameters(optimizer)[0].device
    # torchao compiles its update for every shape; on a CPU that takes a C++ compiler, and minutes.
    stance = torch.compiler.set_stance("force_eager") if device.type == "cpu" else contextlib.nullcontext()
    seeded: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if _rounds_by_generator(optimizer):
        seeded = _seeded(make_key(group["seed"], group["first"]), device)
    every, optimizer.param_groups = optimizer.param_groups, [group]
    try:
        with stance, seeded:
            optimizer.step()
    finally:
        optimizer.param_groups = every


def _rounds_by_generator(optimizer: torch.optim.Optimizer) -> bool:
    """Whether updates draw from PyTorch's generator, as torchao's do. They are then taken one by one, each with its own seed."""
    unwrapped = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return type(unwrapped).__module__.startswith("torchao")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw PyTorch's random numbers from this seed, and leave its generators as they were. torchao rounds with them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# -- the learning rate -----------------------------------------------------------------------------------------------


def warmup_steps(n_steps: int, train: Train) -> int:
    if train.warmup_ratio is None:
        return train.warmup_steps or 0  # as Transformers does it: more than all steps never reach the peak
    return min(math.ceil(train.warmup_ratio * n_steps), n_steps - 1)


def learning_rate(step: int, n_steps: int, train: Train) -> float:
    """Linear warm-up, then the scheduler's rate. `step` counts from 1; the first has the rate after no warm-up step."""
    done, warmup = step - 1, warmup_steps(n_steps, train)
    if done < warmup:
        return train.learning_rate * done / warmup
    progress = (done - warmup) / max(1, n_steps - warmup)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return train.learning_rate * share[train.scheduler]


# -- its state -------------------------------------------------------------------------------------------------------


def get_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state's tensors, by parameter and name; for a quantized one, the tensors it consists of."""
    finish_copies()
    state: dict[str, torch.Tensor] = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            # A shard consists of parts as well, and is gathered as one.
            if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
                state[f"{i}.{name}"] = value
            else:
                parts, _ = value.__tensor_flatten__()
                state |= {f"{i}.{name}.{part}": getattr(value, part) for part in parts}
    return state


def restore(optimizer: torch.optim.Optimizer, saved: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Fill in a state that was saved in this folder. Restore weights afterwards.

    The optimizer creates the tensors itself, by a step with gradients of zero. Parameters that are updated apart have them one by
    one: there may be no room for all.
    """
    parameters = _parameters(optimizer)
    begin_step(optimizer, 0.0, seed=0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        update_group(optimizer, group)
        optimizer.zero_grad()
    state, restored = get_state(optimizer), set[str]()
    for name, value in saved:
        if name not in state or value.shape != state[name].shape:
            raise _other_state(folder, f"has a tensor {name[:80]!r} {tuple(value.shape)} that this one does not have")
        state[name].copy_(take_shard(value, state[name]))
        restored.add(name)
    with_state = {name.partition(".")[0] for name in restored}
    if missing := [name for name in state if name.partition(".")[0] in with_state and name not in restored]:
        raise _other_state(folder, f"lacks {shorten_list(missing)}")
    if not restored:
        raise _other_state(folder, "is empty")
    for i, parameter in enumerate(parameters):
        if str(i) not in with_state:  # no step had a gradient of it
            optimizer.state.pop(parameter)


def _other_state(folder: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{folder} holds the state of another optimizer: it {reason}. Delete it, and the run resumes from the previous checkpoint."
    )
