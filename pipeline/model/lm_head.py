"""The LM head's products: operands of one dtype, sums and logits in float32.

Operands in half precision are multiplied by a GPU's tensor cores, whose products are exact and whose sums are float32. Where
weights and hidden states are in half precision anyway, the logits are those of a float32 head up to the order of the sums. A
CPU, which has no such product, rounds the operands alike and multiplies them in float32.

Shapes: N positions, V vocabulary, D hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prefcache.pipeline.model.device import kind_of


def choose_head_dtype(wanted: str | None, arithmetic: str, device: torch.device | str) -> str:
    """Return the dtype of the head's operands, by default that of the arithmetic on a GPU, and float32 on a CPU."""
    return wanted or (arithmetic if kind_of(device) == "cuda" else "float32")


def set_head_dtype(model: Any, dtype: str, *, frozen: bool = False) -> None:
    """Make the model's head multiply operands of this dtype, regardless of its own and of autocast.

    With `frozen` weights they are converted once.
    """
    head = model.get_output_embeddings()
    head.operand_dtype = getattr(torch, dtype)
    head.frozen_weight_VD = head.weight.detach().to(head.operand_dtype) if frozen else None

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits_NV = multiply_head(head, hidden.flatten(0, -2), head.weight, getattr(head, "bias", None))
        return logits_NV.view(*hidden.shape[:-1], -1)

    head.forward = forward


def operand_dtype(head: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(head, "operand_dtype", torch.float32)
    return dtype


def operand_weight(head: Any) -> torch.Tensor:
    """The head's weight as an operand."""
    frozen_VD: torch.Tensor | None = getattr(head, "frozen_weight_VD", None)
    return head.weight.detach().to(operand_dtype(head)) if frozen_VD is None else frozen_VD


def multiply_head(
    head: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """The logits of hidden states, in float32. Gradients flow to these weights, which are the head's own or stand for them."""
    logits_NV: torch.Tensor = _HeadProduct.apply(hidden_ND, weight_VD, bias_V, head)  # type: ignore[no-untyped-call]
    return logits_NV


class _HeadProduct(torch.autograd.Function):
    """A product whose result has another dtype than its operands: PyTorch cannot differentiate it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, head: Any
    ) -> torch.Tensor:
        ctx.head = head
        ctx.save_for_backward(hidden_ND)
        return multiply(hidden_ND.to(operand_dtype(head)), operand_weight(head).t(), bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits_NV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_ND,) = ctx.saved_tensors
        head, (_, trains_weight, trains_bias, _) = ctx.head, ctx.needs_input_grad
        grad_NV = grad_logits_NV.to(operand_dtype(head))
        grad_hidden_ND = multiply(grad_NV, operand_weight(head)).to(hidden_ND.dtype)
        grad_weight_VD = grad_bias_V = None
        if trains_weight:
            grad_weight_VD = multiply(grad_NV.t(), hidden_ND.to(grad_NV.dtype)).to(head.weight.dtype)
        if trains_bias:
            grad_bias_V = grad_logits_NV.sum(0).to(head.bias.dtype)
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None


# -- products --------------------------------------------------------------------------------------------------------


def multiply(a_NK: torch.Tensor, b_KM: torch.Tensor, bias_M: torch.Tensor | None = None) -> torch.Tensor:
    """The product of operands of one dtype, in float32."""
    with torch.autocast(a_NK.device.type, enabled=False):
        if a_NK.dtype != torch.float32 and kind_of(a_NK.device) == "cuda":
            product_NM = torch.mm(a_NK, b_KM, out_dtype=torch.float32)
            return product_NM if bias_M is None else product_NM.add_(bias_M)
        return F.linear(a_NK.float(), b_KM.t().float(), None if bias_M is None else bias_M.float())


def add_product(sum_NM: torch.Tensor, a_NK: torch.Tensor, b_KM: torch.Tensor) -> None:
    """Add a product to a sum of float32 or of the operands' dtype, with no tensor of its size in between."""
    if sum_NM.dtype == a_NK.dtype:
        sum_NM.addmm_(a_NK, b_KM)
    elif kind_of(a_NK.device) == "cuda":
        torch.addmm(sum_NM, a_NK, b_KM, out_dtype=torch.float32, out=sum_NM)
    else:
        sum_NM.addmm_(a_NK.float(), b_KM.float())
