"""Log-probs of completions: the one place that shifts and gathers.

`plain_logps` is the definition, one sequence and no tricks; the others must equal it. `row_logps` computes a packed row:
no padding, a prompt once for all of its answers, the head in chunks. `completion_logps` computes a padded batch.

Shapes: B sequences, T positions, K positions kept for the head, N completion tokens, V vocabulary, D hidden width.
"""

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
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
    `row.trunks` and `row.branches` say here; see attention.py.

    The head computes some positions at a time. Where gradients are wanted it computes them once more in the backward pass, so
    that the logits of all tokens over the whole vocabulary, by far the largest tensor there would be, never exist. The last
    of them are kept: the backward pass begins with those, and would make them again at once.
    """
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

    def head(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _only_the_head(model) as logits:
            return _of_logits(logits(hidden_ND), target_N, squares)

    n = _head_positions(model)
    parts = list(zip(torch.split(hidden_ND, n), torch.split(target_N, n), strict=True))
    # Nothing is drawn at random, so no state of a generator has to be kept.
    again = partial(checkpoint, head, use_reentrant=False, preserve_rng_state=False)
    chunks = [again(*part) if torch.is_grad_enabled() else head(*part) for part in parts[:-1]]
    chunks.append(head(*parts[-1]))
    return _split(tuple(map(torch.cat, zip(*chunks, strict=True))), row.counts)


def _head_positions(model: Any) -> int:
    """So many at once that their float32 logits take 16 MiB, which stays in a processor's cache, or 1 GiB on a GPU."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return max(64, (1 << (28 if on_gpu else 22)) // int(model.get_output_embeddings().weight.shape[0]))


@contextlib.contextmanager
def _only_the_head(model: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """hidden_ND -> logits_NV by the model's own forward, which may scale or cap them, with nothing under its head."""
    decoder = model.get_decoder()
    given: list[_Hidden] = []

    def logits(hidden_ND: torch.Tensor) -> torch.Tensor:
        given[:] = [_Hidden(hidden_ND.unsqueeze(0))]
        found: torch.Tensor = model(input_ids=None, use_cache=False).logits[0]
        return found

    decoder.forward = lambda *_, **__: given[0]
    try:
        yield logits
    finally:
        del decoder.forward  # which hid the class's own


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
    kept_VD = head.weight.detach().float() if frozen else None

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if getattr(head, "bias", None) is None else head.bias.float()
            return F.linear(hidden.float(), head.weight.float() if kept_VD is None else kept_VD, bias)

    head.forward = forward


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On that device. To a GPU from pinned memory: otherwise the host would wait until the GPU has done all it was asked before,
    and a micro-batch could not be laid out while the one before it is computed."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _tensor(*parts: Any) -> torch.Tensor:
    # A copy: the ids may be views of a read-only memory map.
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
