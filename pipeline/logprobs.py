"""Log-probs of completions: the one place that shifts and gathers.

The scorer and the trainer both call `completion_logps`, so a policy that is the reference starts at a margin of zero.
`plain_logps` is the definition, one sequence and no tricks; the other must equal it.

Shapes: B sequences, T positions, K positions kept for the head, N completion tokens, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.schema import Sequence


def gather_logps(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """log softmax of the targets, in float32 whatever the model computed in."""
    logits_NV = logits_NV.float()
    return logits_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1) - logits_NV.logsumexp(-1)


def plain_logps(model: Any, sequence: Sequence) -> torch.Tensor:
    """Log-prob of each completion token of one sequence, by the model's plain forward."""
    device = next(model.parameters()).device
    ids_T = _tensor(sequence.prompt_ids, sequence.completion_ids).to(device)
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
    n_prompt = len(sequence.prompt_ids)
    return gather_logps(logits_TV[n_prompt - 1 : -1], ids_T[n_prompt:])


def completion_logps(model: Any, sequences: SequenceOf[Sequence]) -> list[torch.Tensor]:
    """Log-prob of each completion token of each sequence, in one forward.

    Sequences are padded on the right, where a causal model never looks back from; so no mask is needed, and the
    fastest attention is used. The head sees only positions that predict a completion token of some sequence. The last
    token of a sequence is never an input.
    """
    device = next(model.parameters()).device
    ids = [_tensor(sequence.prompt_ids, sequence.completion_ids) for sequence in sequences]
    input_BT = torch.nn.utils.rnn.pad_sequence([ids_T[:-1] for ids_T in ids], batch_first=True).to(device)
    first = min(len(sequence.prompt_ids) for sequence in sequences) - 1
    kept_K = torch.arange(first, input_BT.shape[1], device=device)
    logits_BKV = model(input_ids=input_BT, use_cache=False, logits_to_keep=kept_K).logits

    counts = [len(sequence.completion_ids) for sequence in sequences]
    row_N = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts))
    starts = [len(sequence.prompt_ids) - 1 - first for sequence in sequences]
    column_N = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
    target_N = torch.cat([ids_T[-n:] for ids_T, n in zip(ids, counts, strict=True)]).to(device)
    logps_N = gather_logps(logits_BKV[row_N.to(device), column_N.to(device)], target_N)
    return list(torch.split(logps_N, counts))


def sums(logps: SequenceOf[torch.Tensor]) -> torch.Tensor:
    # In float64: float32 drifts visibly over answers of tens of thousands of tokens.
    return torch.stack([logps_N.double().sum() for logps_N in logps])


def use_float32_head(model: Any) -> None:
    """Make the model's head multiply in float32, whatever its own dtype or an autocast says."""
    head = model.get_output_embeddings()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if getattr(head, "bias", None) is None else head.bias.float()
            return F.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward


def _tensor(*parts: Any) -> torch.Tensor:
    # A copy: the ids may be views of a read-only memory map.
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
