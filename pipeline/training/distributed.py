"""The processes of a run, and what each of them holds: the whole model, or a shard of it.

Processes share the examples of a step. Each holds the model, and gradients are averaged (DDP); or, where it is sharded (PyTorch's
FSDP2), each holds its part of weights, gradients and optimizer state, and a layer is gathered while it is computed. What gathers
has to be called by all processes at once. What is written is always whole, so any number of processes goes on from it.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Train
from pipeline.errors import UsageError
from pipeline.model.forward import Forward
from pipeline.model.logprobs import Logps
from pipeline.schema import Sequence as TokenSequence

# What `accelerate launch` says to a process.
_FSDP = "ACCELERATE_USE_FSDP"
_NOT_DRIVEN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"


def accelerator(train: Train) -> Accelerator:
    _refuse_launch()
    cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.device == "cuda" and cpu:
        raise UsageError("train.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    bf16 = train.precision == "bf16" or (train.precision == "auto" and not cpu)
    # Autocast would keep a bf16 copy of every layer that it has met until the forward ends: of a sharded model, all of it.
    handlers = [AutocastKwargs(cache_enabled=False)] if _wanted(train) else []
    with on_our_own():
        return Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=handlers)


def is_sharded(train: Train, accelerator: Accelerator, quantization: str | None) -> bool:
    """One process has nobody to share a model with."""
    if _wanted(train) and quantization:
        raise UsageError(
            f"Weights in {quantization} (score.quantization) are not sharded. Set train.shard=none: each process then holds the "
            "quantised model, and its own copy of the adapter; or leave the quantisation out."
        )
    if _wanted(train) and train.optimizer != "adamw":
        # Its blocks begin anew in each shard, so there is no whole state for a checkpoint to keep.
        raise UsageError(
            f"train.optimizer={train.optimizer} quantises its state in blocks, which are not sharded. Take adamw, whose state is "
            "divided among the processes; or set train.shard=none."
        )
    return _wanted(train) and accelerator.num_processes > 1


def _wanted(train: Train) -> bool:
    return _said(_FSDP) if train.shard is None else train.shard == "fsdp"


def _said(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _refuse_launch() -> None:
    """What `accelerate launch` was asked for, and would not happen."""
    if other := next((theirs for name, theirs in _NOT_DRIVEN.items() if _said(name)), None):
        raise UsageError(
            f"accelerate was launched with {other}, which train does not drive. Shard the model with FSDP2 instead, as ZeRO 3 does: "
            "train.shard=fsdp, or accelerate launch --use_fsdp --fsdp_version 2."
        )
    if not _said(_FSDP):
        return
    if (found := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(f"accelerate was launched with FSDP {found}; train shards with FSDP 2. Add --fsdp_version 2.")
    if _said("FSDP_OFFLOAD_PARAMS"):
        raise UsageError("--fsdp_offload_params true: shards stay on their device here. Leave it out.")
    if _said("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UsageError("--fsdp_activation_checkpointing true: say train.gradient_checkpointing=true instead.")


@contextlib.contextmanager
def on_our_own() -> Iterator[None]:
    """Hide from accelerate that it was asked for FSDP, since it would wrap the model in its own way; and from Transformers, which
    would load the weights in the first process only."""
    said = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[_FSDP] = said


class Calls(torch.nn.Module):
    """All that computes with the policy's weights. DDP's wrapper goes around its forward, and a sharded model's weights are whole
    within any of these only. It stands here because torch holds on to a sharded class, and so to what its module imports."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = forward.model, forward

    def forward(self, groups: list[list[TokenSequence]], **asked: Any) -> Logps:
        return self._forward.logps(groups, **asked)

    def choose(self, like: Sequence[TokenSequence]) -> None:
        self._forward.choose(like)

    def generate(self, **inputs: Any) -> torch.Tensor:
        found: torch.Tensor = self.model.generate(**inputs)
        return found


# -- shards ----------------------------------------------------------------------------------------------------------


def shard(calls: Calls, layers: Sequence[torch.nn.Module], accelerator: Accelerator) -> None:
    """Leave each process its part of the weights. A layer is gathered while it is computed; what lies outside of layers
    (embeddings, the last norm, the head), for the whole of a call."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Gathered only once for forward and backward, as ZeRO 2 does, if so launched.
    again = os.environ.get(_RESHARD, "true").lower() != "false"
    for layer in reversed(layers):  # one within another comes first
        fully_shard(layer, mesh=mesh, reshard_after_forward=again)
    fully_shard(calls, mesh=mesh)
    for method in ("choose", "generate"):
        register_fsdp_forward_method(calls, method)


def let_go(calls: Calls) -> None:
    """Of what the last call has gathered, before weights are replaced: the next one would compute with the old ones."""
    if isinstance(calls, FSDPModule):
        calls.reshard()


def gathered(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """The same tensors, whole, in the process that keeps them, and nothing in the others. Every process has to ask for the same
    ones. What is tied stays one tensor."""
    whole: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = _whole(tensor.detach(), keep=keep)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def _whole(tensor: torch.Tensor, *, keep: bool) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    # One after another: a device that holds a shard may have no room for everything.
    return full.cpu() if keep else full.new_empty(0)


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, if `like` is sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def number(value: torch.Tensor) -> float:
    """Of a scalar to which every process has added its share."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)
