"""Log-probs of completions: the one place that shifts and gathers.

`plain_logps` is the definition, one sequence and no tricks; the others must equal it. `row_logps` computes a packed row:
no padding, a prompt once for all of its answers, the head in chunks. `completion_logps` computes a padded batch.

Shapes: B sequences, T positions, K positions kept for the head, N completion tokens, n of a chunk of them, V vocabulary,
D hidden width.
"""

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from pipeline.schema import Sequence

# What is told, of each layer that routes tokens to experts, its router's logits [T, E] of the inputs.
Watch = Callable[[SequenceOf[torch.Tensor]], None]


def gather_logps(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """log softmax of the targets, in float32 whatever the model computed in."""
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def plain_logps(model: Any, sequence: Sequence) -> torch.Tensor:
    """Log-prob of each completion token of one sequence, by the model's plain forward."""
    device = next(model.parameters()).device
    ids_T = sent(_tensor(sequence.prompt_ids, sequence.completion_ids), device)
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits.squeeze(0)
    n_prompt = len(sequence.prompt_ids)
    return gather_logps(logits_TV[n_prompt - 1 : -1], ids_T[n_prompt:])


def log_sum_squares(logits_NV: torch.Tensor) -> torch.Tensor:
    """log of the sum of squared probabilities: what a token drawn from the distribution has, in the mean, for a probability."""
    return torch.logsumexp(2 * logits_NV.float(), -1) - 2 * torch.logsumexp(logits_NV.float(), -1)


class Logps(NamedTuple):
    """Of some sequences, per completion token."""

    logps: list[torch.Tensor]
    squares: list[torch.Tensor]  # log_sum_squares of the token's distribution, without gradient; empty unless asked for


def completion_logps(
    model: Any, sequences: SequenceOf[Sequence], *, squares: bool = False, watch: Watch | None = None
) -> Logps:
    """Log-prob of each completion token of each sequence, in one padded forward."""
    logits_NV, target_N, counts = _completion_logits(model, sequences, watch)
    return _split(_of_logits(logits_NV, target_N, squares), counts)


def _of_logits(logits_NV: torch.Tensor, target_N: torch.Tensor, squares: bool) -> tuple[torch.Tensor, ...]:
    logps_N = gather_logps(logits_NV, target_N)
    return (logps_N, log_sum_squares(logits_NV.detach())) if squares else (logps_N,)


def _split(found: tuple[torch.Tensor, ...], counts: list[int]) -> Logps:
    return Logps(*(list(torch.split(values_N, counts)) for values_N in found), *([[]] if len(found) == 1 else []))


def _asking(watch: Watch | None) -> dict[str, bool]:
    """A keyword that only mixtures of experts know."""
    return {} if watch is None else {"output_router_logits": True}


def _completion_logits(
    model: Any, sequences: SequenceOf[Sequence], watch: Watch | None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What predicts each completion token, these tokens, and how many each sequence has.

    Sequences are padded on the right, where a causal model never looks back from; so no mask is needed, and the
    fastest attention is used. The head sees only positions that predict a completion token of some sequence. The last
    token of a sequence is never an input.
    """
    device = next(model.parameters()).device
    ids = [_tensor(sequence.prompt_ids, sequence.completion_ids) for sequence in sequences]
    input_BT = sent(torch.nn.utils.rnn.pad_sequence([ids_T[:-1] for ids_T in ids], batch_first=True), device)
    first = min(len(sequence.prompt_ids) for sequence in sequences) - 1
    kept_K = torch.arange(first, input_BT.shape[1], device=device)
    out = model(input_ids=input_BT, use_cache=False, logits_to_keep=kept_K, **_asking(watch))
    if watch:
        rows = [torch.ones(len(ids_T) - 1) for ids_T in ids]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).flatten().nonzero().flatten().to(device)
        watch([logits.flatten(0, -2)[inputs] for logits in out.router_logits])

    counts = [len(sequence.completion_ids) for sequence in sequences]
    row_N = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts))
    starts = [len(sequence.prompt_ids) - 1 - first for sequence in sequences]
    column_N = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
    target_N = torch.cat([ids_T[-n:] for ids_T, n in zip(ids, counts, strict=True)])
    return out.logits[sent(row_N, device), sent(column_N, device)], sent(target_N, device), counts


@dataclass(frozen=True)
class Row:
    """Groups of sequences with one prompt each, laid out in one row: prompt, answer, answer, ..., prompt, ..."""

    input_T: np.ndarray
    position_T: np.ndarray  # an answer's go on from its prompt's
    source_N: np.ndarray  # where in the row each completion token is predicted
    target_N: np.ndarray
    counts: list[int]  # completion tokens of each sequence, in the order of the groups
    trunks: list[slice]  # each prompt with its first answer
    branches: list[tuple[slice, slice]]  # each further answer's prompt, and itself


def lay_out(groups: SequenceOf[SequenceOf[Sequence]]) -> Row:
    """The last token of an answer predicts nothing, so it is no input."""
    inputs, positions, sources, trunks, branches = [], [], [], [], []
    at = 0
    for group in groups:
        n_prompt = len(group[0].prompt_ids)
        prompt = slice(at, at + n_prompt)
        inputs.append(group[0].prompt_ids)
        positions.append(np.arange(n_prompt))
        at = prompt.stop
        for first, sequence in enumerate(group):
            own = slice(at, at + len(sequence.completion_ids) - 1)
            inputs.append(sequence.completion_ids[:-1])
            positions.append(np.arange(n_prompt, n_prompt + own.stop - own.start))
            # The prompt's last token predicts the first token of every answer.
            sources += [np.array([prompt.stop - 1]), np.arange(own.start, own.stop)]
            if first == 0:
                trunks.append(slice(prompt.start, own.stop))
            elif own.stop > own.start:
                branches.append((prompt, own))
            at = own.stop
    sequences = [sequence for group in groups for sequence in group]
    return Row(
        input_T=np.concatenate(inputs).astype(np.int64),
        position_T=np.concatenate(positions),
        source_N=np.concatenate(sources),
        target_N=np.concatenate([sequence.completion_ids for sequence in sequences]).astype(np.int64),
        counts=[len(sequence.completion_ids) for sequence in sequences],
        trunks=trunks,
        branches=branches,
    )


def row_logps(model: Any, row: Row, segments: Any, *, squares: bool = False, watch: Watch | None = None) -> Logps:
    """Log-prob of each completion token of each sequence of a row. `segments` says to the model's attention what
    `row.trunks` and `row.branches` say here; see attention.py."""
    device = next(model.parameters()).device
    out = model.get_decoder()(
        input_ids=sent(torch.from_numpy(row.input_T), device).unsqueeze(0),
        position_ids=sent(torch.from_numpy(row.position_T), device).unsqueeze(0),
        use_cache=False,
        segments=segments,
        **_asking(watch),
    )
    if watch:
        watch([logits.flatten(0, -2) for logits in out.router_logits])
    hidden_ND = out.last_hidden_state[0, sent(torch.from_numpy(row.source_N), device)]
    target_N = sent(torch.from_numpy(row.target_N), device)
    if torch.is_grad_enabled():
        head = model.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        found = _Chunked.apply(hidden_ND, head.weight, bias_V, target_N, model, squares)  # type: ignore[no-untyped-call]
    else:
        found = _joined([_head_logps(model, *part, squares=squares) for part in _chunks(model, hidden_ND, target_N)])
    return _split(found, row.counts)


# -- the head, some positions at a time ------------------------------------------------------------------------------


class _Chunked(torch.autograd.Function):
    """So that the logits of all tokens over the whole vocabulary, by far the largest tensor there would be, never exist.

    The backward pass computes each chunk anew. Only the last is kept: the pass begins with it, and would make it again at once.
    The chunks' gradients of the head's weight are added up in one tensor, for each would be as large as the head. What else a model
    computes with on the way from its decoder to its logits must not be trained: its gradients do not come out here.
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
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        ctx.model, ctx.sums = model, _Sums(of_weight, of_bias)
        ctx.save_for_backward(hidden_ND, target_N)
        *others, last = _chunks(model, hidden_ND.detach(), target_N)
        found = [_head_logps(model, *part, squares=squares) for part in others]
        ctx.kept = _with_gradient(model, *last, sums=ctx.sums, squares=squares)
        found.append(tuple(each.detach() for each in ctx.kept[1]))
        joined = _joined(found)
        ctx.mark_non_differentiable(*joined[1:])
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, target_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        parts = _chunks(ctx.model, hidden_ND.detach(), target_N, grad_logps_N, grad_hidden_ND)
        ctx.sums.taken()  # what a pass before has left
        for hidden_nD, target_n, grad_logps_n, grad_hidden_nD in reversed(parts):
            leaf_nD, found = ctx.kept or _with_gradient(ctx.model, hidden_nD, target_n, sums=ctx.sums, squares=False)
            ctx.kept = None
            torch.autograd.backward(found[0], grad_logps_n)
            grad_hidden_nD.copy_(leaf_nD.grad)
            del leaf_nD, found  # before the next chunk's are made
        head = ctx.model.get_output_embeddings()
        weight_VD, bias_V = (None if each is None else each.to(head.weight.dtype) for each in ctx.sums.taken())
        return grad_hidden_ND, weight_VD, bias_V, None, None, None


@dataclass
class _Sums:
    """Over the chunks of a head, the gradients of its weight and its bias."""

    of_weight: bool
    of_bias: bool
    weight_VD: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None

    def add(self, hidden_nD: torch.Tensor, grad_logits_nV: torch.Tensor) -> None:
        if self.weight_VD is not None:
            self.weight_VD.addmm_(grad_logits_nV.t(), hidden_nD)
        elif self.of_weight:
            self.weight_VD = grad_logits_nV.t() @ hidden_nD
        if self.of_bias:
            grad_V = grad_logits_nV.sum(0)
            self.bias_V = grad_V if self.bias_V is None else self.bias_V + grad_V

    def taken(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        found = self.weight_VD, self.bias_V
        self.weight_VD = self.bias_V = None
        return found


class _Multiplied(torch.autograd.Function):
    """What a head gives, whose gradients of weight and bias go into the sums."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Any, multiply: Callable[[torch.Tensor], torch.Tensor], sums: _Sums
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
            grad_hidden = (grad_logits_nV @ _in_float32(ctx.head)).to(hidden.dtype)
        return grad_hidden.view_as(hidden), None, None, None


def trained_after_the_decoder(model: Any) -> list[str]:
    """What is trained besides the head's matrix and the decoder: row_logps has no gradient for it."""
    known = {id(each) for part in (model.get_decoder(), model.get_output_embeddings()) for each in part.parameters()}
    return [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in known]


def _chunks(model: Any, *of_positions: torch.Tensor) -> list[tuple[Any, ...]]:
    """Of like lengths: the last, which is kept, is no small rest."""
    n = -(-len(of_positions[0]) // _head_positions(model))
    return list(zip(*(torch.tensor_split(each, n) for each in of_positions), strict=True))


def _head_positions(model: Any) -> int:
    """So many at once that their float32 logits take 16 MiB, which stays in a processor's cache, or 1 GiB on a GPU."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return max(64, (1 << (28 if on_gpu else 22)) // int(model.get_output_embeddings().weight.shape[0]))


def _joined(chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


def _head_logps(
    model: Any, hidden_ND: torch.Tensor, target_N: torch.Tensor, *, squares: bool
) -> tuple[torch.Tensor, ...]:
    """By the model's own forward, which may scale or cap logits, with nothing under its head."""
    decoder = model.get_decoder()
    with _instead(decoder, lambda *_, **__: _Hidden(hidden_ND.unsqueeze(0))):
        return _of_logits(model(input_ids=None, use_cache=False).logits.squeeze(0), target_N, squares)


def _with_gradient(
    model: Any, hidden_nD: torch.Tensor, target_n: torch.Tensor, *, sums: _Sums, squares: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The hidden states as a leaf, and what the head makes of them."""
    head = model.get_output_embeddings()
    multiply = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Multiplied.apply(hidden, head, multiply, sums)  # type: ignore[no-untyped-call]
        return found

    leaf_nD = hidden_nD.detach().requires_grad_()
    with torch.enable_grad(), _instead(head, forward):
        return leaf_nD, _head_logps(model, leaf_nD, target_n, squares=squares)


@contextlib.contextmanager
def _instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward  # which hid the class's own
        else:
            module.forward = own


class _Hidden:
    """What a decoder would have returned, as far as a head asks for it."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, i: Any) -> torch.Tensor:
        assert i == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def sums(logps: SequenceOf[torch.Tensor]) -> torch.Tensor:
    # In float64: float32 drifts visibly over answers of tens of thousands of tokens.
    return torch.stack([logps_N.double().sum() for logps_N in logps])


def use_float32_head(model: Any, *, frozen: bool = False) -> None:
    """Make the model's head multiply in float32, whatever its own dtype or an autocast says.

    With `frozen` weights the float32 copy is made once.
    """
    head = model.get_output_embeddings()
    head.weight_in_float32 = head.weight.detach().float() if frozen else None

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if getattr(head, "bias", None) is None else head.bias.float()
            return F.linear(hidden.float(), _in_float32(head), bias)

    head.forward = forward


def _in_float32(head: Any) -> torch.Tensor:
    kept_VD: torch.Tensor | None = getattr(head, "weight_in_float32", None)
    return head.weight.float() if kept_VD is None else kept_VD


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On that device. To a GPU from pinned memory: otherwise the host would wait until the GPU has done all it was asked before,
    and a micro-batch could not be laid out while the one before it is computed."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _tensor(*parts: Any) -> torch.Tensor:
    # A copy: the ids may be views of a read-only memory map.
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
