"""The LM head in float32, computed in chunks of positions.

The logits of all tokens over the whole vocabulary, by far the largest tensor of a step, never exist at once.

Shapes: N completion tokens, n of one chunk, V vocabulary, D hidden width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.logprobs import score_logits


def use_float32_head(model: Any, *, frozen: bool = False) -> None:
    """Make the model's head multiply in float32, whatever its own dtype or an autocast says.

    With `frozen` weights the float32 copy is made once.
    """
    head = model.get_output_embeddings()
    head.weight_in_float32 = head.weight.detach().float() if frozen else None

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if getattr(head, "bias", None) is None else head.bias.float()
            return F.linear(hidden.float(), _float32_weight(head), bias)

    head.forward = forward


def _float32_weight(head: Any) -> torch.Tensor:
    frozen_VD: torch.Tensor | None = getattr(head, "weight_in_float32", None)
    return head.weight.float() if frozen_VD is None else frozen_VD


def trained_beyond_head(model: Any) -> list[str]:
    """Names of trained parameters outside the decoder and the head's matrix. `score_hidden` gives them no gradient."""
    covered = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]


def score_hidden(
    model: Any, hidden_ND: torch.Tensor, target_N: torch.Tensor, squares: bool
) -> tuple[torch.Tensor, ...]:
    """Log-probs of the targets, and log_sum_squares if asked for, from the decoder's last hidden states."""
    if torch.is_grad_enabled():
        head = model.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        scores: tuple[torch.Tensor, ...] = _ChunkedHead.apply(hidden_ND, head.weight, bias_V, target_N, model, squares)  # type: ignore[no-untyped-call]
        return scores
    return _concat([_score_chunk(model, *chunk, squares=squares) for chunk in _chunks(model, hidden_ND, target_N)])


class _ChunkedHead(torch.autograd.Function):
    """Score all chunks; recompute each in the backward pass.

    The last chunk's graph is kept, because the backward pass starts there. The weight's gradients are summed in one tensor, as
    each chunk's would be as large as the head. Other parameters between the decoder and the logits get no gradient here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        model: Any,
        squares: bool,
    ) -> tuple[torch.Tensor, ...]:
        _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        ctx.model, ctx.sums = model, _GradientSums(trains_weight, trains_bias)
        ctx.save_for_backward(hidden_ND, target_N)
        *others, last = _chunks(model, hidden_ND.detach(), target_N)
        chunks = [_score_chunk(model, *chunk, squares=squares) for chunk in others]
        ctx.last_graph = _chunk_graph(model, *last, squares=squares, sums=ctx.sums)
        scores = _concat([*chunks, tuple(values_n.detach() for values_n in ctx.last_graph[1])])
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, target_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        chunks = _chunks(ctx.model, hidden_ND.detach(), target_N, grad_logps_N, grad_hidden_ND)
        ctx.sums.pop()  # left over from an earlier backward pass
        for hidden_nD, target_n, grad_logps_n, grad_hidden_nD in reversed(chunks):
            leaf_nD, scores = ctx.last_graph or _chunk_graph(
                ctx.model, hidden_nD, target_n, squares=False, sums=ctx.sums
            )
            ctx.last_graph = None
            torch.autograd.backward(scores[0], grad_logps_n)
            grad_hidden_nD.copy_(leaf_nD.grad)
            del leaf_nD, scores  # before the next chunk's are made
        dtype = ctx.model.get_output_embeddings().weight.dtype
        weight_VD, bias_V = (None if grad is None else grad.to(dtype) for grad in ctx.sums.pop())
        return grad_hidden_ND, weight_VD, bias_V, None, None, None


@dataclass
class _GradientSums:
    """The gradients of a head's weight and bias, summed over its chunks."""

    trains_weight: bool
    trains_bias: bool
    weight_VD: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None

    def add(self, hidden_nD: torch.Tensor, grad_logits_nV: torch.Tensor) -> None:
        if self.weight_VD is not None:
            self.weight_VD.addmm_(grad_logits_nV.t(), hidden_nD)
        elif self.trains_weight:
            self.weight_VD = grad_logits_nV.t() @ hidden_nD
        if self.trains_bias:
            grad_V = grad_logits_nV.sum(0)
            self.bias_V = grad_V if self.bias_V is None else self.bias_V + grad_V

    def pop(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        gradients = self.weight_VD, self.bias_V
        self.weight_VD = self.bias_V = None
        return gradients


class _HeadProduct(torch.autograd.Function):
    """The head's own product, whose gradients of weight and bias go into the sums."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Any, multiply: Callable[[torch.Tensor], torch.Tensor], sums: _GradientSums
    ) -> torch.Tensor:
        ctx.head, ctx.sums = head, sums
        ctx.save_for_backward(hidden)
        return multiply(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        grad_logits_nV = grad_logits.flatten(0, -2).float()
        with torch.autocast(hidden.device.type, enabled=False):
            ctx.sums.add(hidden.flatten(0, -2).float(), grad_logits_nV)
            grad_hidden = (grad_logits_nV @ _float32_weight(ctx.head)).to(hidden.dtype)
        return grad_hidden.view_as(hidden), None, None, None


def _chunk_graph(
    model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor, *, squares: bool, sums: _GradientSums
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A chunk's hidden states as a leaf, and its scores with a graph down to them."""
    head = model.get_output_embeddings()
    multiply = head.forward
    leaf_nD = hidden_nD.detach().requires_grad_()
    with torch.enable_grad(), _replaced_forward(head, lambda hidden: _HeadProduct.apply(hidden, head, multiply, sums)):  # type: ignore[no-untyped-call]
        return leaf_nD, _score_chunk(model, leaf_nD, target_n, squares=squares)


def _score_chunk(
    model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor, *, squares: bool
) -> tuple[torch.Tensor, ...]:
    """Run the model's own forward, which may scale or cap logits, with the decoder replaced by its result."""
    decoder = model.get_decoder()
    # A decoder inside a wrapper that also sees images needs a token; its embedding is not used.
    is_wrapped = decoder is not getattr(model, model.base_model_prefix, decoder)
    input_ids = target_n.new_zeros(1, 1) if is_wrapped else None
    with _replaced_forward(decoder, lambda *_, **__: _DecoderOutput(hidden_nD.unsqueeze(0))):
        logits_nV = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)
        return score_logits(logits_nV, target_n, squares)


class _DecoderOutput:
    """What a decoder returns, as far as a head reads it."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, i: Any) -> torch.Tensor:
        assert i == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


@contextlib.contextmanager
def _replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Run with another forward, and leave the module's attributes as they were."""
    replaced = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del module.forward  # the class's own is visible again
        else:
            module.forward = replaced


def _chunks(model: Any, *by_position: torch.Tensor) -> list[tuple[Any, ...]]:
    """Split into near-equal chunks, so that the last one, whose graph is kept, is not tiny."""
    n = -(-len(by_position[0]) // _chunk_positions(model))
    return list(zip(*(torch.tensor_split(values, n) for values in by_position), strict=True))


def _chunk_positions(model: Any) -> int:
    """Positions whose float32 logits take 16 MiB, which stays in a CPU's cache, or 1 GiB on a GPU."""
    on_gpu = kind_of(next(model.parameters()).device) == "cuda"
    return max(64, (1 << (28 if on_gpu else 22)) // int(model.get_output_embeddings().weight.shape[0]))


def _concat(chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.cat, zip(*chunks, strict=True)))
