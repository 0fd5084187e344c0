"""What a training step costs on a GPU, from a model's config and the lengths of examples alone: no weights, no GPU.

The program's own step (`Policy.update`) runs on fake tensors, so what is counted is what the program does. `traced_gpu` says how.
"""

import contextlib
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from prefcache.pipeline.config import Train
from prefcache.pipeline.model import attention, layer_kernels, trainable, weights
from prefcache.pipeline.model.device import kind_of, to_device
from prefcache.pipeline.model.logprobs import Logps
from prefcache.pipeline.model.offload import OffloadedInputs
from prefcache.pipeline.model.packed_row import lay_out
from prefcache.pipeline.model.tower import tower_names
from prefcache.pipeline.model.traced_gpu import GPU, Op, Trace, replaced, trace_gpu
from prefcache.pipeline.model.vision import ImageFeatures, Vision
from prefcache.pipeline.schema import PAIRS, TokenSequence
from prefcache.pipeline.spans import whole_span
from prefcache.pipeline.training import distributed, optimizers
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.distributed import mixed_precision
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy

# PyTorch keeps functions of this module, and so its globals, until the interpreter ends. Python clears the globals of modules
# that are alive then, and this one is because it refers to itself. Otherwise DuckDB reports leaks on the terminal.
_THIS_MODULE = sys.modules[__name__]


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int
    image: int = 0  # of the prompt's, those that stand for a picture


@dataclass(frozen=True)
class Parts:
    """Bytes, by what they are held for; traced_gpu.PARTS says what each is."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    rest: int = 0


@dataclass(frozen=True)
class StepCost:
    """One process's step."""

    peak_bytes: int
    parts: Parts  # at the peak
    peaks: dict[str, Parts]  # of its phases: forward, head (backward), layers (backward), update
    held_bytes: int  # between steps: weights and the optimizer's state
    flops: dict[str, int]  # by dtype: bfloat16 on tensor cores, float32
    kernels: int
    syncs: int  # times that the host waits for the GPU
    copies: int  # from the host to the GPU
    bytes_moved: int
    attention: tuple[str, ...]  # the kernels that were chosen
    head: tuple[str, ...]
    ops: dict[Op, int] = field(repr=False)  # how often each

    def seconds(self, flops_per_second: dict[str, float], bytes_per_second: float) -> float:
        """The roofline: each operation takes the longer of its arithmetic and its traffic."""
        return sum(
            n * max(op.flops / flops_per_second[_rate_of(op)], op.bytes / bytes_per_second)
            for op, n in self.ops.items()
        )


def _rate_of(op: Op) -> str:
    return "bfloat16" if op.dtype in ("bfloat16", "float16") else "float32"


def measure_cost(trace: Trace) -> StepCost:
    return StepCost(
        peak_bytes=trace.peak_bytes,
        parts=Parts(**trace.peak_parts),
        peaks={phase: Parts(**parts) for phase, parts in trace.peaks.items()},
        held_bytes=sum(trace.held.values()),
        flops=trace.flops_by_dtype(),
        kernels=int(trace.total(lambda op: op.kernels)),
        syncs=trace.syncs,
        copies=trace.copies,
        bytes_moved=int(trace.total(lambda op: op.bytes)),
        attention=tuple(sorted(trace.attention)),
        head=tuple(sorted(trace.head)),
        ops=dict(trace.ops),
    )


def trace_step(
    config: Any, train: Train, pairs: Sequence[Lengths], *, processes: int = 1, kind: str = "cuda"
) -> StepCost:
    """Trace a process's step on these pairs, the second one of a run: the optimizer has its state.

    `config` is a Transformers config or a folder that holds one. A vision tower is frozen and not in memory. Several `processes` share a sharded model (train.shard: fsdp);
    what passes between them is counted as memory traffic alone. `kind` is the device's (see traced_gpu).
    """
    if isinstance(config, str | Path):
        config = AutoConfig.from_pretrained(config, trust_remote_code=False)
    with trace_gpu(kind) as trace, _fake_processes(processes, trace):
        policy = TracedPolicy(make_model(config, train, trace), train, trace, processes)
        examples, objective = make_examples(pairs, getattr(config, "image_token_id", 0)), Objective(train)
        policy.make_optimizer_state()
        trace.phase = "forward"
        trace.restart()
        policy.update(examples, np.arange(len(pairs)), objective, {}, train.learning_rate)
        return measure_cost(trace)


def make_model(config: Any, train: Train, trace: Trace) -> trainable.Trainable:
    """Make the policy that trainable.load would load."""
    dtype = getattr(torch, train.lora.base_dtype if train.lora else train.weights)
    with GPU, no_init_weights():  # of fake weights, which some initializations would draw again and again
        model = weights.make_language_model(config, dtype=dtype, attn_implementation="sdpa")
        model.tie_weights()  # which comes with the initialization
        adapter = trainable.create_adapter(model, train.lora, train.seed) if train.lora else None
    model.eval()
    if train.gradient_checkpointing:
        trainable.recompute_layers(model, OffloadedInputs() if "activations" in train.offload else None)
    trace.head_shape = tuple(model.get_output_embeddings().weight.shape)
    trace.assign("weights", [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_note_gradient, trace))
    return trainable.Trainable(model, adapter, [])


def _note_gradient(trace: Trace, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        trace.assign("gradients", [parameter.grad])
    if tuple(parameter.shape) != trace.head_shape:
        trace.phase = "layers"


def make_examples(pairs: Sequence[Lengths], image_token: int = 0) -> Examples:
    """Examples of these lengths. Prompts differ, and the answers of a pair from their first token on."""
    rows = []
    for i, lengths in enumerate(pairs):
        row: dict[str, Any] = dict.fromkeys(PAIRS.names)
        row |= {"example_id": str(i), "prompt": "", "n_prompt": lengths.prompt}
        row["prompt_ids"] = np.full(lengths.prompt, i, np.int32)
        if lengths.image:
            row["prompt_ids"][1 : 1 + lengths.image] = image_token
            row["images"] = [_name_image(i, lengths.image)]
        for token, name in enumerate(("rejected", "chosen")):
            n = getattr(lengths, name)
            row |= {f"{name}_ids": np.full(n, token, np.int32), f"n_{name}": n}
            row |= {f"{name}_spans": whole_span(n), f"n_{name}_counted": n}
        rows.append(row)
    columns = {f"ref_{name}_logp": np.zeros(len(pairs)) for name in ("chosen", "rejected")}
    return Examples(SplitData(pa.Table.from_pylist(rows, schema=PAIRS), columns, ("chosen", "rejected")))


def _name_image(number: int, n_tokens: int) -> bytes:
    """The id of a picture that exists by its size alone."""
    return struct.pack("<QQ", number, n_tokens)


class _TracedVision(Vision):
    """Counts positions as those of text, since their values cost nothing."""

    def _count_by_grid(self, prompt: bytes, grids: tuple[tuple[int, ...], ...]) -> np.ndarray:
        return np.tile(np.arange(len(prompt) // 4), (3, 1))


class TracedImages:
    """What a frozen tower made of pictures, read from the host's memory: as RunImages gives it, but without values."""

    trains_tower = False

    def attach(self, model: Any, device: torch.device) -> Vision:
        self._width, self._dtype, self._device = model.config.get_text_config().hidden_size, model.dtype, device
        return _TracedVision(model, self)

    def describe(self, model: Any) -> list[str]:
        return []

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        return [self._make(struct.unpack("<QQ", image)[1]) for image in images]

    def _make(self, n_tokens: int) -> ImageFeatures:
        embeds_ND = to_device(torch.empty(n_tokens, self._width, dtype=self._dtype), self._device)
        return ImageFeatures(embeds_ND, grid=(1, 1, n_tokens))


@dataclass
class TracedAccelerator:
    """What the policy uses of accelerate's Accelerator, for one process on the traced GPU."""

    trace: Trace
    mixed_precision: str
    device: torch.device = GPU
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def no_sync(self, module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, prepared: Any) -> Any:
        return prepared

    def backward(self, loss: torch.Tensor) -> None:
        self.trace.phase = "head"
        torch.autograd.backward(loss)
        self.trace.phase = "update"  # until the next forward

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return value


@contextlib.contextmanager
def _fake_processes(n: int, trace: Trace) -> Iterator[None]:
    """Shard over processes that do not exist: what they would send is of the right size."""
    if n == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    reduce = _fsdp_param_group.foreach_reduce  # type: ignore[attr-defined]

    def reduce_and_assign(parameters: list[Any], *arguments: Any) -> Any:
        done = reduce(parameters, *arguments)
        gradients = [each.sharded_param.grad for each in parameters]  # None, if it was used and released
        trace.assign("gradients", [_local(gradient) for gradient in gradients if gradient is not None])
        return done

    torch.distributed.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        with unset_fake_temporarily():
            mesh = init_device_mesh("cpu", (n,))
        with (
            replaced(distributed, "init_device_mesh", lambda *_: mesh),
            replaced(_fully_shard, "_get_device_from_mesh", lambda _: GPU),
            replaced(_fsdp_param_group, "foreach_reduce", reduce_and_assign),
        ):
            yield
    finally:
        torch.distributed.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class TracedPolicy(Policy):
    """A policy on the traced GPU, by the layout that most models take."""

    def __init__(self, trained: trainable.Trainable, train: Train, trace: Trace, processes: int = 1) -> None:
        self.train, self.sharded, self._trace = train, processes > 1, trace
        self.accelerator: Any = TracedAccelerator(trace, mixed_precision(train, on_gpu=True))
        shortest = TokenSequence(np.zeros(1, np.int32), np.zeros(1, np.int32))
        images: Any = TracedImages() if tower_names(trained.model) else None
        self._set_up(trained, "sdpa", [shortest], print, images)
        trace.assign("weights", map(_local, self._parameters.values()))
        if type(self._optimizer).__module__.startswith("torchao"):
            self._optimizer.step = self._count_as_compiled(self._optimizer.step)

    def _choose_layout(self, like: Sequence[TokenSequence]) -> None:
        """Take shared rows without the trial, which needs values."""
        self.forward.layout = "shared"
        attention.use_segments(self.forward.model)
        compute = self.forward.logps

        def counted(groups: Sequence[Sequence[TokenSequence]], **options: Any) -> Logps:
            self._trace.attended, self._trace.phase = count_attended(groups), "forward"
            return compute(groups, **options)

        self.forward.logps = counted  # type: ignore[method-assign]

    def _change_kernels(self, like: Sequence[TokenSequence]) -> None:
        """Take fused kernels without the trial, which needs values. Compiled layers are not traced."""
        if self.train.fuse_kernels and kind_of(self.accelerator.device) == "cuda":
            layer_kernels.fuse_kernels(self.forward.model)

    def _count_as_compiled(self, step: Callable[[], None]) -> Callable[[], None]:
        """torchao compiles its update of each parameter into one kernel."""

        def counted() -> None:
            # The groups are those of this call, which may be one of several in a step.
            trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            state = sum(tensor.nbytes for tensor in optimizers.get_state(self._optimizer).values())
            traffic = 2 * (state + sum(p.nbytes for p in trained)) + sum(p.grad.nbytes for p in trained)
            update = Op("compiled_update", "float32", 0, traffic, len(trained))
            with self._trace.as_fused(update), replaced(torch, "compile", lambda *_, **__: lambda *_, **__: None):
                step()  # makes the state

        return counted

    def make_optimizer_state(self) -> None:
        """Take a step with gradients of zero, as resuming does."""
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.take_step(self._optimizer, 0.0, seed=0)
        self._optimizer.zero_grad()
        self._trace.assign("optimizer", map(_local, optimizers.get_state(self._optimizer).values()))


def count_attended(groups: Sequence[Sequence[TokenSequence]]) -> int:
    """Pairs of a query and a key that it may see: those of its path, of its branch those up to itself."""
    branches = lay_out(groups).branches
    return sum(each.n_queries * each.n_keys - each.n_queries * (each.n_queries - 1) // 2 for each in branches)
