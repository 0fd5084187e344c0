"""Log-probs from the decoder's last hidden states, computed in chunks of positions.

The logits of all tokens over the whole vocabulary, by far the largest tensor of a step, never exist at once.

Shapes: N counted tokens, n of one chunk, V vocabulary, D hidden width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.lm_head import add_product, multiply, multiply_head, operand_dtype, operand_weight


def trained_beyond_head(model: Any) -> list[str]:
    """Names of trained parameters that are neither before the head nor its matrix. `score_hidden` gives them no gradient."""
    # A tower and its projector are outside the decoder, but computed before it.
    before = getattr(model, model.base_model_prefix) if hasattr(model, "get_image_features") else model.get_decoder()
    covered = {id(p) for part in (before, model.get_output_embeddings()) for p in part.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]


def score_hidden(
    model: Any, hidden_ND: torch.Tensor, target_N: torch.Tensor, squares: bool
) -> tuple[torch.Tensor, ...]:
    """Log-probs of the targets, and log_sum_squares if asked for, from the decoder's last hidden states."""
    head = model.get_output_embeddings()
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head.weight.requires_grad):
        bias_V = getattr(head, "bias", None)
        scores: tuple[torch.Tensor, ...] = _ChunkedHead.apply(hidden_ND, head.weight, bias_V, target_N, model, squares)  # type: ignore[no-untyped-call]
        return scores
    return _concat([_score_chunk(model, *chunk, squares=squares) for chunk in _chunks(model, hidden_ND, target_N)])


class _ChunkedHead(torch.autograd.Function):
    """Score all chunks and differentiate each token's log-prob by itself, since it depends on its own hidden state alone.

    The gradients come from the logits that gave the log-probs; the backward pass scales them by the slopes that it brings. With
    a frozen head all of them are made in the forward pass, because one row of hidden width is all that a token leaves. A
    trained weight's gradient needs logits and slopes at once: the last chunks are kept, because the backward pass starts
    there, and the others are recomputed. Other parameters between the decoder and the logits get no gradient here.
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
        _, *trains, _, _, _ = ctx.needs_input_grad
        ctx.model, ctx.trains, ctx.kept = model, trains, []
        chunks = _chunks(model, hidden_ND.detach(), target_N)
        if any(trains):
            ctx.save_for_backward(hidden_ND, target_N)
            n_kept = _n_kept(model)
            scores = [_score_chunk(model, *chunk, squares=squares) for chunk in chunks[:-n_kept]]
            ctx.kept = [_differentiate_chunk(model, *chunk, squares=squares) for chunk in chunks[-n_kept:]]
            scores += [chunk.scores for chunk in ctx.kept]
        else:
            scores, gradients = [], []
            for chunk in chunks:
                differentiated = _differentiate_chunk(model, *chunk, squares=squares)
                scores.append(differentiated.scores)
                gradients.append(differentiated.hidden_nD.to(hidden_ND.dtype))
                del differentiated  # before the next chunk's logits are made
            ctx.save_for_backward(torch.cat(gradients))
        result = _concat(scores)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope_N = -grad_logps_N
        if not any(ctx.trains):
            (gradient_ND,) = ctx.saved_tensors
            return (gradient_ND * slope_N.unsqueeze(1)).to(gradient_ND.dtype), None, None, None, None, None
        hidden_ND, target_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        sums = _GradientSums(ctx.model.get_output_embeddings(), *ctx.trains)
        for hidden_nD, target_n, slope_n, grad_hidden_nD in reversed(
            _chunks(ctx.model, hidden_ND.detach(), target_N, slope_N, grad_hidden_ND)
        ):
            chunk = ctx.kept.pop() if ctx.kept else _differentiate_chunk(ctx.model, hidden_nD, target_n, squares=False)
            torch.mul(chunk.hidden_nD, slope_n.unsqueeze(1), out=grad_hidden_nD)
            sums.add(chunk, slope_n)
            del chunk  # before the next chunk's logits are made
        return grad_hidden_ND, *sums.result(), None, None, None


@dataclass
class _Chunk:
    """A chunk's scores, and the gradients of its tokens' negative log-probs."""

    scores: tuple[torch.Tensor, ...]
    input_nD: torch.Tensor  # what the head multiplies
    logits_nV: torch.Tensor  # the gradient at the head's product, as an operand
    hidden_nD: torch.Tensor  # the gradient at the decoder's hidden states


class _GradientSums:
    """The gradients of a head's weight and bias, summed over its chunks.

    A weight of the operands' own dtype has its gradient summed in that dtype: inside a chunk the sum is float32, and a chunk is
    hundreds of positions, so half precision rounds a few times where a float32 sum would round once, and would take twice the
    memory of the weight. Any other weight's gradient is summed in float32.
    """

    def __init__(self, head: Any, trains_weight: bool, trains_bias: bool) -> None:
        self._head, self._trains_weight, self._trains_bias = head, trains_weight, trains_bias
        self._weight_VD: torch.Tensor | None = None
        self._bias_V: torch.Tensor | None = None

    def add(self, chunk: _Chunk, slope_n: torch.Tensor) -> None:
        # Rows of hidden states are scaled, because those of logits are many times as wide.
        grad_nV, slope_n1 = chunk.logits_nV, slope_n.unsqueeze(1)
        input_nD = (chunk.input_nD * slope_n1).to(grad_nV.dtype)
        if self._weight_VD is not None:
            add_product(self._weight_VD, grad_nV.t(), input_nD)
        elif self._trains_weight:
            is_own = self._head.weight.dtype == grad_nV.dtype
            self._weight_VD = torch.mm(grad_nV.t(), input_nD) if is_own else multiply(grad_nV.t(), input_nD)
        if self._trains_bias:
            grad_V = multiply(grad_nV.t(), slope_n1.to(grad_nV.dtype)).squeeze(1)
            self._bias_V = grad_V if self._bias_V is None else self._bias_V + grad_V

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dtype = self._head.weight.dtype
        weight_VD, bias_V = (None if grad is None else grad.to(dtype) for grad in (self._weight_VD, self._bias_V))
        return weight_VD, bias_V


# -- a chunk ---------------------------------------------------------------------------------------------------------


def _score_chunk(
    model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor, *, squares: bool
) -> tuple[torch.Tensor, ...]:
    logits_nV = _compute_logits(model, hidden_nD, target_n)
    return _score(_log_softmax(logits_nV, overwrite=True), target_n, squares)


def _differentiate_chunk(model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor, *, squares: bool) -> _Chunk:
    """Score a chunk, and turn its logits into the gradient of the negative log-probs: softmax, minus 1 at the target."""
    head = _HeadCall(model.get_output_embeddings())
    leaf_nD = hidden_nD.detach().requires_grad_()
    with torch.enable_grad(), _replaced_forward(head.module, head):
        logits_nV = _compute_logits(model, leaf_nD, target_n)
    is_plain = _is_same(head.hidden_nD, leaf_nD) and _is_same(head.logits_nV, logits_nV)
    with torch.no_grad():
        log_softmax_nV = _log_softmax(logits_nV.detach(), overwrite=is_plain)
        scores = _score(log_softmax_nV, target_n, squares)
        dtype = operand_dtype(head.module) if is_plain else torch.float32
        grad_nV = log_softmax_nV if dtype == torch.float32 else torch.empty_like(log_softmax_nV, dtype=dtype)
        torch.exp(log_softmax_nV, out=grad_nV)
        # Not its softmax minus 1, of which little is left for a likely target.
        grad_nV.scatter_(1, target_n.unsqueeze(1), torch.expm1(scores[0]).unsqueeze(1).to(dtype))
        del log_softmax_nV
        if is_plain:
            return _Chunk(scores, leaf_nD.detach(), grad_nV, multiply(grad_nV, operand_weight(head.module)))
    (grad_hidden_nD,) = torch.autograd.grad(logits_nV, leaf_nD, grad_nV)
    grad_product_nV = head.gradients[0].to(operand_dtype(head.module))
    return _Chunk(scores, head.hidden_nD.detach(), grad_product_nV, grad_hidden_nD)


class _HeadCall:
    """Stands in for the head in its model's forward, and keeps what it multiplies, what it returns and the gradient there."""

    def __init__(self, module: Any) -> None:
        self.module, self.gradients = module, list[torch.Tensor]()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        bias_V = getattr(self.module, "bias", None)
        detached_V = None if bias_V is None else bias_V.detach()
        self.hidden_nD = hidden.flatten(0, -2)
        self.logits_nV = multiply_head(self.module, self.hidden_nD, self.module.weight.detach(), detached_V)
        # A hook that held this object would be a cycle, which keeps logits in memory until they are collected.
        self.logits_nV.register_hook(self.gradients.append)  # type: ignore[no-untyped-call]
        return self.logits_nV.view(*hidden.shape[:-1], self.logits_nV.shape[-1])


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the model only changed the shape between these two, so that they share one unchanged memory."""
    is_shared = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.numel() == b.numel()
    return is_shared and a._version == 0 and a.is_contiguous() and b.is_contiguous()


def _compute_logits(model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
    """Run the model's own forward, which may scale or cap logits, with the decoder replaced by its result."""
    decoder = model.get_decoder()
    # A decoder inside a wrapper that also sees images needs a token; its embedding is not used.
    is_wrapped = decoder is not getattr(model, model.base_model_prefix, decoder)
    input_ids = target_n.new_zeros(1, 1) if is_wrapped else None
    with _replaced_forward(decoder, lambda *_, **__: _DecoderOutput(hidden_nD.unsqueeze(0))):
        logits_nV: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits.squeeze(0).float()
        return logits_nV


def _log_softmax(logits_nV: torch.Tensor, *, overwrite: bool) -> torch.Tensor:
    out = logits_nV if overwrite and logits_nV.is_contiguous() else None
    return torch.log_softmax(logits_nV, -1, out=out)


def _score(log_softmax_nV: torch.Tensor, target_n: torch.Tensor, squares: bool) -> tuple[torch.Tensor, ...]:
    """What `score_logits` returns, from the log softmax."""
    logps_n = log_softmax_nV.gather(1, target_n.unsqueeze(1)).squeeze(1)
    return (logps_n, torch.logsumexp(2 * log_softmax_nV, -1)) if squares else (logps_n,)


class _DecoderOutput:
    """What a decoder returns, as far as a head reads it."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def keys(self) -> list[str]:
        # Some models unpack it into the output of a wrapper.
        return ["last_hidden_state"]

    def __getitem__(self, i: Any) -> torch.Tensor:
        assert i in (0, "last_hidden_state")
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
    """Split into near-equal chunks, so that the last one, which is kept, is not tiny."""
    n = max(1, -(-len(by_position[0]) // _chunk_positions(model)))
    return list(zip(*(torch.tensor_split(values, n) for values in by_position), strict=True))


def _chunk_positions(model: Any) -> int:
    """Positions whose float32 logits take 16 MiB, which stays in a CPU's cache, or 256 MiB on a GPU.

    With fewer than 512 positions a GPU would wait for the weight and its gradient to be read more than it multiplies.
    """
    on_gpu = kind_of(next(model.parameters()).device) == "cuda"
    n_logits, fewest = (1 << 26, 512) if on_gpu else (1 << 22, 64)
    return max(fewest, n_logits // int(model.get_output_embeddings().weight.shape[0]))


def _n_kept(model: Any) -> int:
    """Chunks to keep: in the backward pass, their gradients take what a chunk takes while it is recomputed.

    That is the gradient alone, made in place of the logits, or in half precision the logits and the gradient of half their size.
    """
    return 1 if operand_dtype(model.get_output_embeddings()) == torch.float32 else 3


def _concat(chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.cat, zip(*chunks, strict=True)))
