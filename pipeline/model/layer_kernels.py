"""Fewer and larger kernels within a model's layers.

    fused norms       each RMSNorm as one kernel of PyTorch, instead of the operations that Transformers writes out
    compiled layers   each layer by torch.compile, which fuses what lies between its products

Each function changes a model in place and returns how to undo it. Whether the model still computes the same is tried by
`Forward.adopt`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefcache.pipeline.model import attention
from prefcache.pipeline.model.trainable import Recomputed, model_layers

Undo = Callable[[], None]


def fuse_norms(model: Any) -> Undo:
    """Compute each RMSNorm by PyTorch's function, if its class computes what Llama's does, word for word.

    128 of 169 such classes in Transformers 5.19 do. Gemma's, for one, does not: it adds 1 to the weight.
    """
    llama = inspect.getsource(LlamaRMSNorm.forward)
    candidates = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    norms: list[Any] = [module for module in candidates if inspect.getsource(type(module).forward) == llama]
    for norm in norms:
        norm.forward = partial(_rms_norm, norm)

    def undo() -> None:
        for norm in norms:
            del norm.forward

    return undo


def _rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    # In float32 within, and rounded once. In the wider type of the two, as Llama's product with the weight is.
    dtype = torch.promote_types(hidden.dtype, norm.weight.dtype)
    return F.rms_norm(hidden.to(dtype), norm.weight.shape, norm.weight.to(dtype), norm.variance_epsilon)


def compile_layers(model: Any, backend: str = "inductor") -> Undo:
    """Compile each layer for rows of any length, within its recomputation. Attention over segments stays as it is."""
    forwards = {layer: layer.forward for layer in model_layers(model)}
    inner = {layer: each.forward if isinstance(each, Recomputed) else each for layer, each in forwards.items()}
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))  # type: ignore[no-untyped-call]
    for layer, forward in forwards.items():
        compiled = torch.compile(inner[layer], dynamic=True, backend=backend)
        layer.forward = Recomputed(compiled, forward.inputs) if isinstance(forward, Recomputed) else compiled

    def undo() -> None:
        AttentionInterface.register(attention.NAME, attention.attend)
        for layer, forward in forwards.items():
            layer.forward = forward

    return undo
