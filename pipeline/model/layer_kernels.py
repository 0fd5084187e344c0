"""Fewer and larger kernels within a model's layers.

    fuse_kernels     an RMSNorm as one kernel of PyTorch instead of eight, a rotary embedding as three instead of five
    compile_layers   each layer by torch.compile, which fuses what lies between its products

Each function changes a model in place and returns how to undo it. Whether the model still computes the same is tried by
`Forward.adopt`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from prefcache.pipeline.model import attention
from prefcache.pipeline.model.trainable import Recomputed, model_layers

Undo = Callable[[], None]


def fuse_kernels(model: Any) -> Undo:
    """Compute RMSNorm and rotary embeddings with fewer kernels, where the model's code for them is Llama's, word for word.

    Of 169 classes of RMSNorm in Transformers 5.19, 128 are. Gemma's, for one, is not: it adds 1 to the weight.
    """
    changed: list[Any] = []
    for module in model.modules():
        if "forward" not in vars(module) and (forward := _fused_forward(module)):
            module.forward = forward
            changed.append(module)

    def undo() -> None:
        for module in changed:
            del module.forward

    return undo


def _fused_forward(module: Any) -> Callable[..., Any] | None:
    original = type(module).forward
    if type(module).__name__.endswith("RMSNorm") and _is_llamas(original, modeling_llama.LlamaRMSNorm.forward):
        return partial(_rms_norm, module)
    rotates = isinstance(original, FunctionType) and "apply_rotary_pos_emb" in original.__code__.co_names
    if not rotates or not all(
        _is_llamas(original.__globals__.get(name), getattr(modeling_llama, name))
        for name in ("apply_rotary_pos_emb", "rotate_half")
    ):
        return None
    # The same code with another function under that name, for this model alone.
    names = {**original.__globals__, "apply_rotary_pos_emb": _rotate}
    forward = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    forward.__kwdefaults__ = original.__kwdefaults__
    return MethodType(forward, module)


def _is_llamas(function: Any, llamas: Any) -> bool:
    return function is not None and inspect.getsource(function) == inspect.getsource(llamas)


def _rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    # In float32 within, and rounded once. In the wider type of the two, as Llama's product with the weight is.
    dtype = torch.promote_types(hidden.dtype, norm.weight.dtype)
    return F.rms_norm(hidden.to(dtype), norm.weight.shape, norm.weight.to(dtype), norm.variance_epsilon)


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    """[x1, x2] cos + [-x2, x1] sin, by halves in place. Only the cosines and sines are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        out = x * cos
        (out1, out2), (x1, x2), (sin1, sin2) = (each.chunk(2, -1) for each in (out, x.to(out.dtype), sin))
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = gradient * cos
        (out1, out2), (gradient1, gradient2), (sin1, sin2) = (each.chunk(2, -1) for each in (out, gradient, sin))
        out1.addcmul_(gradient2, sin2)
        out2.addcmul_(gradient1, sin1, value=-1)
        return out.to(ctx.dtype), None, None


def compile_layers(model: Any, backend: str = "inductor") -> Undo:
    """Compile each layer for rows of any length, within its recomputation. Attention over segments is not compiled."""
    forwards = {layer: layer.forward for layer in model_layers(model)}
    inner = {layer: each.forward if isinstance(each, Recomputed) else each for layer, each in forwards.items()}
    attend = attention.attend
    _replace_attention(torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
    for layer, forward in forwards.items():
        compiled = torch.compile(inner[layer], dynamic=True, backend=backend)
        layer.forward = Recomputed(compiled, forward.inputs) if isinstance(forward, Recomputed) else compiled

    def undo() -> None:
        _replace_attention(attend)
        for layer, forward in forwards.items():
            layer.forward = forward

    return undo


def _replace_attention(attend: Callable[..., Any]) -> None:
    attention.attend = attend  # which `use_segments` registers anew after generation
    AttentionInterface.register(attention.NAME, attend)
