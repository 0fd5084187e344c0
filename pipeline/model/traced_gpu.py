"""A GPU that is only traced: the program's own code on fake tensors, and what each operation would cost on a GPU.

FakeTensorMode runs model code with real shapes, without values, weights or time. Autograd refuses fake tensors of a CUDA device, so
the traced GPU is PyTorch's device `cpu:0`, which differs from the host's `cpu`: copies between them are operations to be counted, and
mixing them fails, as on a GPU. Code that asks `device.kind_of` is told cuda.

What a trace cannot see: temporaries inside of a kernel, gaps between the allocator's blocks, the CUDA context. Autocast is that of the
CPU, whose list of operations in bf16 is CUDA's; its list of operations in float32 is shorter (softmax, norms, pow), which the models
here compute in float32 by themselves.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefcache.pipeline.model import device

GPU = torch.device("cpu", 0)
# What memory is held for. Activations are made while gradients are recorded, in a layer's recomputation as well; logits are
# tensors as wide as the vocabulary; rest is everything else, such as copies of weights in another dtype.
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "rest")
_BLOCK = 512  # bytes to which PyTorch's CUDA allocator rounds
# Elements of the lists that one kernel of a foreach or fused operation takes: 320 blocks of 65,536.
_ELEMENTS_PER_LAUNCH = 320 * 65_536
# Kernels of operations that are several: FlashAttention's backward pass sums first and converts its result; that of a norm sums
# the weight's gradient in two.
_LAUNCHES = {
    "fused_rms_norm_backward": 3,
    "_varlen_attn_backward": 3,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "device",
    "resize_",
}
# Operations that read as much of their first argument as they return.
_GATHERS = {"embedding", "index", "index_select", "gather", "slice_backward", "select_backward"}
_GROUPED = torch.ops.aten._grouped_mm.default
# Products of matrices, and where their factors stand among the arguments.
_PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
_OVERWRITES = {"copy_", "zero_", "fill_"}


class Op(NamedTuple):
    """An operation's cost. `dtype` is that of its operands."""

    name: str
    dtype: str
    flops: int
    bytes: int
    kernels: int


@dataclass
class _Block:
    reference: weakref.ref[torch.UntypedStorage]
    bytes: int
    part: str


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations and the memory of the traced GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[Op] = Counter()
        self.syncs = self.copies = 0
        self.attention: set[str] = set()
        self.head: set[str] = set()
        self.held: Counter[str] = Counter()  # bytes now, by part
        self.phase = ""  # of the work, named by what runs it
        self.peaks: dict[str, dict[str, int]] = {}  # bytes by part, when a phase held most
        self.head_shape = (0, 0)  # vocabulary, hidden width
        # Pairs of a query and a key in the row that is computed: lengths are values, which fake tensors lack.
        self.attended = 0
        self._blocks: dict[int, _Block] = {}
        self._bytes = 0
        self._counts_ops = True

    def restart(self) -> None:
        """Forget operations and peak, and keep what is held."""
        self.ops.clear()
        self.syncs = self.copies = 0
        self.peaks = {self.phase: dict(self.held)}

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak_parts.values())

    @property
    def peak_parts(self) -> dict[str, int]:
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()), default={})

    def assign(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say what these tensors are held for."""
        for tensor in tensors:
            self._track(tensor, part)
            block = self._blocks[tensor.untyped_storage()._cdata]
            self.held[block.part] -= block.bytes
            self.held[part] += block.bytes
            block.part = part

    @contextlib.contextmanager
    def as_fused(self, op: Op) -> Iterator[None]:
        """Count what happens inside as this operation, without temporaries: on a GPU it is compiled."""
        peaks = dict(self.peaks)
        self._counts_ops = False
        try:
            yield
        finally:
            self._counts_ops = True
            self.peaks = peaks
            self._note_peak()
            self.ops[op] += 1

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # a sharded tensor computes with its parts, which come here again
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += args[0].device == GPU
            return _plain_values(args[0]).item()
        out = _multiply_groups(*args, **kwargs) if func is _GROUPED else func(*args, **kwargs)
        inputs = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        outputs = _tensors(out) or _find_mutated(func, args, kwargs)
        if any(tensor.device == GPU for tensor in (*inputs, *outputs)):
            for tensor in outputs:
                if tensor.device == GPU:
                    self._track(tensor, self._part_of(func, tensor, inputs))
            if self._counts_ops:
                self._count(func, args, kwargs, inputs, outputs)
        return out

    def _count(
        self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_LAUNCH or not outputs:
            return
        crosses = {tensor.device for tensor in (*inputs, *outputs) if tensor.ndim or tensor.device == GPU}
        if len(crosses) > 1:
            # The host waits for what it copies, unless told otherwise.
            self.copies += outputs[0].device == GPU
            self.syncs += not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False))
            if name in ("_to_copy", "copy_"):
                return
        if not func._schema.is_mutable and all(_shares_storage(tensor, inputs) for tensor in outputs):
            return  # an alias
        # A product that is added to a sum is counted under the dtype of its factors.
        operands = args[_PRODUCTS.get(name, 0) :] if args else inputs
        dtype = next((tensor.dtype for tensor in _tensors(operands) if tensor.is_floating_point()), outputs[0].dtype)
        flops = self._flops(name, args)
        cost = Op(
            name, str(dtype).removeprefix("torch."), flops, _traffic(name, inputs, outputs), _launches(name, inputs)
        )
        self.ops[cost] += 1
        if "attn" in name or "attention" in name:
            self.attention.add(name.removesuffix("_backward").removesuffix("_forward"))
        if flops and outputs[0].shape[-1:] == (self.head_shape[0],):
            self.head.add(f"{name}, {cost.dtype} to {str(outputs[0].dtype).removeprefix('torch.')}")

    def _flops(self, name: str, args: Any) -> int:
        backward = "backward" in name
        if name in _PRODUCTS:  # [.., M, K] x [.., K, N]; of groups of rows, each row is multiplied once
            left, right = args[_PRODUCTS[name] :][:2]
            return int(2 * left.numel() * right.shape[-1])
        # Attention has two products forward and five backward, which computes the scores once more.
        if name.startswith("_varlen_attn"):
            query = args[1] if backward else args[0]
            return int((10 if backward else 4) * query.shape[-2] * query.shape[-1] * self.attended)
        if name.startswith("_scaled_dot_product"):
            query, key = args[1:3] if backward else args[:2]
            is_causal = args[7 if backward else 4] if len(args) > (7 if backward else 4) else False
            return int((10 if backward else 4) * query.numel() * key.shape[-2]) // (2 if is_causal else 1)
        return 0

    # -- memory ------------------------------------------------------------------------------------------------------

    def _part_of(self, func: Any, tensor: torch.Tensor, inputs: list[torch.Tensor]) -> str:
        if func._schema.name == "aten::_to_copy" and inputs and self._holds("weights", inputs[0]):
            return "rest"  # in another dtype, for autocast or the head
        if tuple(tensor.shape) == self.head_shape:
            return "gradients"  # the head's, which is summed in a tensor of its own
        if tensor.ndim >= 2 and tensor.shape[-1] == self.head_shape[0]:
            return "logits"
        return "activations" if torch.is_grad_enabled() else "rest"

    def _holds(self, part: str, tensor: torch.Tensor) -> bool:
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        return block is not None and block.part == part

    def _track(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        n_bytes = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._blocks[key] = _Block(weakref.ref(storage, lambda _: self._free(key)), n_bytes, part)
        self.held[part] += n_bytes
        self._bytes += n_bytes
        self._note_peak()

    def _note_peak(self) -> None:
        if self._bytes > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self.held)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Follow a storage that was resized, as FSDP does to free a gathered layer and gather it again."""
        block = self._blocks.get(storage._cdata)
        if block is None:
            return
        n_bytes = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.held[block.part] += n_bytes - block.bytes
        self._bytes += n_bytes - block.bytes
        block.bytes = n_bytes
        self._note_peak()

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.held[block.part] -= block.bytes
        self._bytes -= block.bytes

    # -- what it comes to --------------------------------------------------------------------------------------------

    def total(self, value: Callable[[Op], float]) -> float:
        return sum(value(op) * n for op, n in self.ops.items())

    def flops_by_dtype(self) -> dict[str, int]:
        """Operations on tensor cores count as bfloat16, all others as float32."""
        flops: Counter[str] = Counter()
        for op, n in self.ops.items():
            flops["bfloat16" if op.dtype in ("bfloat16", "float16") else "float32"] += op.flops * n
        return {dtype: flops[dtype] for dtype in ("bfloat16", "float32")}


@torch.library.custom_op("prefcache::fused_rms_norm", mutates_args=())
def _fused_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("it stands for CUDA's kernel in a trace, which has no values")


@torch.library.custom_op("prefcache::fused_rms_norm_backward", mutates_args=())
def _fused_rms_norm_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("it stands for CUDA's kernel in a trace, which has no values")


@_fused_rms_norm.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)


@_fused_rms_norm_backward.register_fake
def _(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate_norm(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_fused_rms_norm_backward(gradient, *ctx.saved_tensors), None


_fused_rms_norm.register_autograd(_differentiate_norm, setup_context=_keep_for_backward)


class _HostValues(TorchFunctionMode):
    """Give fake tensors of the host the values that code in Python asks for, and copy its own to the traced GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor) and args[0].device != GPU:
            return _plain_values(args[0])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            # PyTorch makes it on the host's device, whatever the number.
            return func(*args, **{name: value for name, value in kwargs.items() if name != "device"}).to(
                kwargs["device"]
            )
        return func(*args, **kwargs)


def _plain_values(tensor: torch.Tensor) -> np.ndarray:
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@contextlib.contextmanager
def trace_gpu(kind: str = "cuda") -> Iterator[Trace]:
    """Trace what runs inside as on a GPU. Make models under `with GPU:`. Any other kind gives that device's kernels and sizes."""
    trace = Trace()
    with (
        FakeTensorMode(),
        device.traced_as(kind, lambda tensor: tensor.detach().cpu()),
        # PyTorch clips gradients by operations on all of them at once for CUDA only.
        replaced(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_, **__: True),
        # PyTorch swaps a module's fake parameters for those of another device or dtype, which fails.
        replaced(torch.nn.Module, "_apply", _apply_to_fakes),
        # One kernel on CUDA; PyTorch writes it out elsewhere.
        replaced(
            torch.nn.functional, "rms_norm", lambda hidden, _, weight, eps: _fused_rms_norm(hidden, weight, eps)[0]
        ),
        # A fake tensor would ask for each value by itself.
        replaced(torch.UntypedStorage, "resize_", _resize_traced(trace)),
        replaced(FakeTensor, "tolist", lambda tensor: _plain_values(tensor.cpu()).tolist()),
        _HostValues(),
        trace,
    ):
        yield trace


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _resize_traced(trace: Trace) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
    plain = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, n_bytes: int) -> torch.UntypedStorage:
        plain(storage, n_bytes)
        trace.resize(storage)
        return storage

    return resize


def _apply_to_fakes(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    for child in module.children() if recurse else ():
        child._apply(function)  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is not None and (moved := function(parameter)) is not parameter:
            module._parameters[name] = torch.nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else function(buffer)
    return module


def _multiply_groups(left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Multiply in float32 as well, as CUDA does in a loop; PyTorch's fake tensors take bf16 alone."""
    out: torch.Tensor = _GROUPED(left.bfloat16(), right.bfloat16(), *args, **kwargs)
    return out.to(left.dtype)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _find_mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    by_name = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    return _tensors([by_name.get(name) for name in written])


def _shares_storage(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> bool:
    key = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == key for other in others)


def _n_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading a tensor touches: an expanded one repeats its own."""
    return (
        math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
        * tensor.itemsize
    )


def _traffic(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    written = sum(map(_n_bytes, outputs))
    if name in _GATHERS:
        return 2 * written + sum(map(_n_bytes, inputs[1:]))
    if name.startswith("index_put") or name in ("scatter_", "scatter_add_"):  # values in, their places read and written
        return 3 * _n_bytes(inputs[-1])
    return written + sum(map(_n_bytes, inputs[1:] if name in _OVERWRITES else inputs))


def _launches(name: str, inputs: list[torch.Tensor]) -> int:
    if name.startswith(("_foreach", "_fused")):
        groups = 5 if name.startswith("_fused") else 1  # the lists of parameters, gradients, two moments and steps
        return max(1, math.ceil(sum(tensor.numel() for tensor in inputs) / groups / _ELEMENTS_PER_LAUNCH))
    return _LAUNCHES.get(name, 1)
