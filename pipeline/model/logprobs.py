"""Log-probs of completions: the one place that shifts and gathers.

`plain_logps` is the definition: one sequence, no tricks. `padded_logps` here and `row_logps` in packed_row.py must equal it.

Shapes: B sequences, T positions, K positions kept for the head, N completion tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from prefcache.pipeline.model.device import to_device
from prefcache.pipeline.schema import TokenSequence

# Called with the router logits [T, E] of each layer that routes tokens to experts.
RouterHook = Callable[[Sequence[torch.Tensor]], None]


def gather_logps(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Log softmax of the targets, in float32 whatever dtype the model computed in."""
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def log_sum_squares(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log of the summed squared probabilities, which is the log of a sampled token's expected probability."""
    return torch.logsumexp(2 * logits_NV.float(), -1) - 2 * torch.logsumexp(logits_NV.float(), -1)


def plain_logps(model: Any, sequence: TokenSequence) -> torch.Tensor:
    """Log-prob of each completion token of one sequence, by the model's plain forward."""
    device = next(model.parameters()).device
    ids_T = to_device(_concat_ids(sequence), device)
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits.squeeze(0)
    n_prompt = len(sequence.prompt_ids)
    return gather_logps(logits_TV[n_prompt - 1 : -1], ids_T[n_prompt:])


class Logps(NamedTuple):
    """Values per completion token, one tensor for each sequence."""

    logps: list[torch.Tensor]
    # log_sum_squares of each token's distribution, without gradient; empty unless asked for
    squares: list[torch.Tensor]


def padded_logps(
    model: Any, sequences: Sequence[TokenSequence], *, squares: bool = False, router_hook: RouterHook | None = None
) -> Logps:
    """Log-prob of each completion token of each sequence, in one padded forward.

    Sequences are padded on the right, which a causal model never looks at, so no mask is needed and the fastest attention is
    used. The head computes only positions that predict a completion token of some sequence. The last token of a sequence is
    never an input.
    """
    device = next(model.parameters()).device
    ids = [_concat_ids(sequence) for sequence in sequences]
    input_BT = to_device(pad_sequence([ids_T[:-1] for ids_T in ids], batch_first=True), device)
    first = min(len(sequence.prompt_ids) for sequence in sequences) - 1
    kept_K = torch.arange(first, input_BT.shape[1], device=device)
    out = model(input_ids=input_BT, use_cache=False, logits_to_keep=kept_K, **router_options(router_hook))
    if router_hook:
        is_token_BT = pad_sequence([torch.ones(len(ids_T) - 1) for ids_T in ids], batch_first=True)
        tokens = is_token_BT.flatten().nonzero().flatten().to(device)
        router_hook([logits.flatten(0, -2)[tokens] for logits in out.router_logits])

    if out.logits.shape[1] != len(kept_K):
        first = 0  # A few models (xLSTM, TrOCR) ignore `logits_to_keep` and return the logits of all positions.
    counts = [len(sequence.completion_ids) for sequence in sequences]
    row_N = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts))
    starts = [len(sequence.prompt_ids) - 1 - first for sequence in sequences]
    column_N = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
    target_N = torch.cat([ids_T[-n:] for ids_T, n in zip(ids, counts, strict=True)])
    logits_NV = out.logits[to_device(row_N, device), to_device(column_N, device)]
    return split_by_sequence(score_logits(logits_NV, to_device(target_N, device), squares), counts)


def score_logits(logits_NV: torch.Tensor, target_N: torch.Tensor, squares: bool) -> tuple[torch.Tensor, ...]:
    """Log-probs of the targets and, if asked for, log_sum_squares of their distributions."""
    logps_N = gather_logps(logits_NV, target_N)
    return (logps_N, log_sum_squares(logits_NV.detach())) if squares else (logps_N,)


def split_by_sequence(scores: tuple[torch.Tensor, ...], counts: list[int]) -> Logps:
    logps, *squares = (list(torch.split(values_N, counts)) for values_N in scores)
    return Logps(logps, squares[0] if squares else [])


def router_options(router_hook: RouterHook | None) -> dict[str, bool]:
    """A keyword of the forward that only mixtures of experts accept."""
    return {} if router_hook is None else {"output_router_logits": True}


def sum_logps(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    # In float64: float32 drifts visibly over answers of tens of thousands of tokens.
    return torch.stack([logps_N.double().sum() for logps_N in logps])


def _concat_ids(sequence: TokenSequence) -> torch.Tensor:
    # A copy: the ids may be views of a read-only memory map.
    return torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64))
