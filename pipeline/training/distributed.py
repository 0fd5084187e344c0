"""The processes of a run, and what each of them holds: the whole model, or a shard of it.

Processes share the examples of a step. Each holds the model, and gradients are averaged (DDP); or the model is sharded (PyTorch's
FSDP2): each holds its part of weights, gradients and optimizer state, and a layer is gathered while it is computed. A function that
gathers has to be called by all processes at once. Files always hold whole tensors, so any number of processes can resume.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.logprobs import Logps
from prefcache.pipeline.model.tower import UsedParameters, tower_modules
from prefcache.pipeline.schema import TokenSequence

# Environment variables of `accelerate launch`.
_FSDP = "ACCELERATE_USE_FSDP"
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def make_accelerator(train: Train) -> Accelerator:
    _refuse_launch()
    cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.device == "cuda" and cpu:
        raise UsageError("train.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    # Autocast would keep a bf16 copy of every layer until the forward ends: of a sharded model, all of it.
    handlers = [AutocastKwargs(cache_enabled=False)] if _wants_shards(train) else []
    # accelerate keeps a process's first precision, and the runs of a sweep may have several.
    AcceleratorState._reset_state()
    with hidden_fsdp_launch():
        return Accelerator(cpu=cpu, mixed_precision=mixed_precision(train, on_gpu=not cpu), kwargs_handlers=handlers)


def mixed_precision(train: Train, *, on_gpu: bool) -> str:
    """Return accelerate's name for the arithmetic with float32 weights. Weights in bf16 compute in it without autocast."""
    bf16 = train.precision == "bf16" or (train.precision == "auto" and on_gpu)
    return "bf16" if bf16 and train.weights == "float32" else "no"


def arithmetic(train: Train, accelerator: Accelerator) -> str:
    """The dtype that the policy computes in."""
    weights = train.lora.base_dtype if train.lora else train.weights
    return "bfloat16" if accelerator.mixed_precision == "bf16" or weights == "bfloat16" else "float32"


def is_sharded(train: Train, accelerator: Accelerator, quantization: str | None) -> bool:
    """Whether the model is sharded: if asked for, and by more than one process."""
    if not _wants_shards(train):
        return False
    if quantization:
        raise UsageError(
            f"Weights in {quantization} (score.quantization) are not sharded. Set train.shard=none: each process then holds the "
            "quantized model, and its own copy of the adapter; or leave the quantization out."
        )
    if train.compile:
        raise UsageError(
            "train.compile: layers of a sharded model are not compiled. Leave it out, or set train.shard=none."
        )
    if train.optimizer != "adamw":
        # Its blocks start anew in each shard, so there is no whole state for a checkpoint to keep.
        raise UsageError(
            f"train.optimizer={train.optimizer} quantizes its state in blocks, which are not sharded. Take adamw, whose state is "
            "divided among the processes; or set train.shard=none."
        )
    return bool(accelerator.num_processes > 1)


def _wants_shards(train: Train) -> bool:
    return _is_set(_FSDP) if train.shard is None else train.shard == "fsdp"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _refuse_launch() -> None:
    """Refuse options of `accelerate launch` that training does not follow."""
    if other := next((name for variable, name in _UNSUPPORTED.items() if _is_set(variable)), None):
        raise UsageError(
            f"accelerate was launched with {other}, which train does not drive. Shard the model with FSDP2 instead, as ZeRO 3 does: "
            "train.shard=fsdp, or accelerate launch --use_fsdp --fsdp_version 2."
        )
    if not _is_set(_FSDP):
        return
    if (launched := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(
            f"accelerate was launched with FSDP {launched}; train shards with FSDP 2. Add --fsdp_version 2."
        )
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise UsageError("--fsdp_offload_params true: shards stay on their device here. Leave it out.")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UsageError("--fsdp_activation_checkpointing true: say train.gradient_checkpointing=true instead.")


@contextlib.contextmanager
def hidden_fsdp_launch() -> Iterator[None]:
    """Hide an FSDP launch from accelerate, which would wrap the model in its own way, and from Transformers, which would load
    the weights in the first process only."""
    value = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_FSDP] = value


class Calls(torch.nn.Module):
    """Everything that computes with the policy's weights.

    DDP wraps its forward, and only within these methods are a sharded model's weights whole. It lives in this file because torch
    keeps a sharded class alive, and with it all that its module imports.
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = forward.model, forward
        self._tower = UsedParameters(forward.model)

    def forward(self, groups: list[list[TokenSequence]], **options: Any) -> Logps:
        logps = self._forward.logps(groups, **options)
        return logps._replace(values_N=self._tower.add_to(logps.values_N))

    def choose_layout(self, like: Sequence[TokenSequence]) -> None:
        self._forward.choose_layout(like)

    def adopt(self, change: Callable[[], Callable[[], None]], like: Sequence[TokenSequence]) -> str | None:
        return self._forward.adopt(change, like)

    def generate(self, prompt: TokenSequence | None = None, **inputs: Any) -> torch.Tensor:
        """Generate answers; `prompt` is the only one of the batch, if it has images."""
        if prompt is not None and self._forward.vision is not None:
            inputs |= self._forward.vision.plain_inputs(prompt, len(prompt.prompt_ids))
        ids: torch.Tensor = self.model.generate(**inputs)
        return ids


# -- shards ----------------------------------------------------------------------------------------------------------


def shard(calls: Calls, layers: Sequence[torch.nn.Module], accelerator: Accelerator) -> None:
    """Leave each process its part of the weights.

    A layer is gathered while it is computed, and so are embeddings; what lies outside of them (the last norm, the head, and embeddings
    that are the head's weight as well, and a vision tower that is trained), during a whole call.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # A process whose examples have no picture does not compute the tower, so it is gathered with the call, not layer by layer.
    seeing = tower_modules(calls.model)
    layers = [layer for layer in layers if layer not in seeing]
    # Launched with false, layers are gathered once for forward and backward, as in ZeRO 2.
    reshard = os.environ.get(_RESHARD, "true").lower() != "false"
    # Gradients are summed over the processes in float32 where they are kept in bf16.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    embeddings, head = calls.model.get_input_embeddings(), calls.model.get_output_embeddings()
    # At 70B they take a gathered 2 GiB, and their gradient as much, and 4 GiB where it is summed in float32.
    apart = [] if head is not None and head.weight is embeddings.weight else [embeddings]
    for layer in [*reversed(layers), *apart]:  # nested ones first
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision)
    for module in apart:
        # The gradient of a look-up does not depend on the table.
        if isinstance(module, FSDPModule) and isinstance(module, torch.nn.Embedding):
            module.set_unshard_in_backward(False)
    fully_shard(calls, mesh=mesh, mp_policy=precision)
    for method in ("choose_layout", "adopt", "generate"):
        register_fsdp_forward_method(calls, method)


def reshard(calls: Calls) -> None:
    """Free what the last call gathered, before weights are replaced: the next call would compute with the old ones."""
    if isinstance(calls, FSDPModule):
        calls.reshard()


def gather_tensors(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors in the processes that keep them, and nothing in the others. Tied tensors stay one tensor."""
    whole: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in whole:
            full = tensor.detach()
            if isinstance(full, DTensor):
                full = full.full_tensor()
                # One after another: a device that holds a shard may have no room for everything.
                full = full.cpu() if keep else full.new_empty(0)
            whole[id(tensor)] = full
    return {name: whole[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def take_shard(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, if `like` is sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_start(tensor: torch.Tensor) -> int:
    """Return at which value of the whole tensor this process's part begins."""
    if not isinstance(tensor, DTensor):
        return 0
    # Rows are divided as torch.chunk does.
    n_rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    first_row = min(n_rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return first_row * math.prod(tensor.shape[1:])


def reduce_scalar(value: torch.Tensor) -> torch.Tensor:
    """Return the whole of a scalar that may be spread over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
