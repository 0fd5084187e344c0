"""Log-probs of completions: the one place that shifts and gathers.

`plain_logps` is the definition: one sequence, no tricks. `padded_logps` here and `row_logps` in packed_row.py must equal it.

A sequence may ask for some of its completion's tokens only (`TokenSequence.counted`); all results are of these.

Shapes: S sequences, T positions, K positions kept for the head, N counted tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from prefcache.pipeline.model.device import copy_together, to_device
from prefcache.pipeline.schema import TokenSequence

# Called with the router logits [T, E] of each layer that routes tokens to experts.
RouterHook = Callable[[Sequence[torch.Tensor]], None]


class ImageInputs(Protocol):
    """Inputs of a model's own forward next to ids: `vision.Vision`."""

    def plain_inputs(self, sequence: TokenSequence, n_tokens: int) -> dict[str, Any]: ...


def gather_logps(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Log softmax of the targets, in float32 whatever dtype the model computed in."""
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def log_sum_squares(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log of the summed squared probabilities, which is the log of a sampled token's expected probability."""
    return torch.logsumexp(2 * logits_NV.float(), -1) - 2 * torch.logsumexp(logits_NV.float(), -1)


def plain_logps(model: Any, sequence: TokenSequence, vision: ImageInputs | None = None) -> torch.Tensor:
    """Log-prob of each counted token of one sequence, by the model's plain forward."""
    device = next(model.parameters()).device
    ids_T = to_device(_concat_ids(sequence), device)
    more = vision.plain_inputs(sequence, len(ids_T)) if vision and sequence.images else {}
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False, **more).logits.squeeze(0)
    counted_N = to_device(torch.from_numpy(len(sequence.prompt_ids) + sequence.counted_positions), device)
    return gather_logps(logits_TV[counted_N - 1], ids_T[counted_N])


class Logps(NamedTuple):
    """Log-probs of counted tokens, sequence after sequence."""

    values_N: torch.Tensor
    squares_N: torch.Tensor | None  # log_sum_squares of each token's distribution, without gradient; only if asked for
    lengths_S: torch.Tensor  # counted tokens of each sequence, on the device
    counts: list[int]  # the same on the host

    @property
    def logps(self) -> list[torch.Tensor]:
        """One tensor for each sequence."""
        return list(torch.split(self.values_N, self.counts))

    @property
    def squares(self) -> list[torch.Tensor]:
        return [] if self.squares_N is None else list(torch.split(self.squares_N, self.counts))

    def sums(self) -> torch.Tensor:
        """The log-prob of each sequence. Shape: [S]."""
        return sum_segments(self.values_N, self.lengths_S)


def padded_logps(
    model: Any,
    sequences: Sequence[TokenSequence],
    *,
    vision: ImageInputs | None = None,
    squares: bool = False,
    router_hook: RouterHook | None = None,
) -> Logps:
    """Log-prob of each counted token of each sequence, in one padded forward. A sequence with images must come alone.

    Sequences are padded on the right, which a causal model never looks at, so no mask is needed and the fastest attention is
    used. The head computes only positions that predict a counted token of some sequence. The last token of a sequence is
    never an input.
    """
    device = next(model.parameters()).device
    ids = [_concat_ids(sequence) for sequence in sequences]
    counts = [sequence.n_counted for sequence in sequences]
    column_N = np.concatenate([len(each.prompt_ids) - 1 + each.counted_positions for each in sequences])
    kept_K, kept_N = np.unique(column_N, return_inverse=True)
    inputs = {
        "input_ST": pad_sequence([ids_T[:-1] for ids_T in ids], batch_first=True).numpy(),
        "row_N": np.repeat(np.arange(len(sequences)), counts),
        "column_N": column_N,
        "kept_K": kept_K,
        "kept_N": kept_N,
        "target_N": np.concatenate([each.completion_ids[each.counted_positions] for each in sequences]).astype(
            np.int64
        ),
        "lengths_S": np.array(counts),
    }
    if router_hook:
        is_token_ST = pad_sequence([torch.ones(len(ids_T) - 1) for ids_T in ids], batch_first=True)
        inputs["tokens"] = np.flatnonzero(is_token_ST)
    on_device = copy_together(inputs, device)
    more = vision.plain_inputs(sequences[0], len(ids[0]) - 1) if vision and sequences[0].images else {}
    out = model(
        input_ids=on_device["input_ST"],
        use_cache=False,
        logits_to_keep=on_device["kept_K"],
        **router_options(router_hook),
        **more,
    )
    if router_hook:
        router_hook([logits.flatten(0, -2)[on_device["tokens"]] for logits in out.router_logits])
    # A few models (xLSTM, TrOCR) ignore `logits_to_keep` and return the logits of all positions.
    is_kept = out.logits.shape[1] == len(kept_K)
    logits_NV = out.logits[on_device["row_N"], on_device["kept_N" if is_kept else "column_N"]]
    return make_logps(score_logits(logits_NV, on_device["target_N"], squares), on_device["lengths_S"], counts)


def score_logits(logits_NV: torch.Tensor, target_N: torch.Tensor, squares: bool) -> tuple[torch.Tensor, ...]:
    """Log-probs of the targets and, if asked for, log_sum_squares of their distributions."""
    logps_N = gather_logps(logits_NV, target_N)
    return (logps_N, log_sum_squares(logits_NV.detach())) if squares else (logps_N,)


def make_logps(scores: tuple[torch.Tensor, ...], lengths_S: torch.Tensor, counts: list[int]) -> Logps:
    values_N, *squares = scores
    return Logps(values_N, squares[0] if squares else None, lengths_S, counts)


def concat_logps(results: Sequence[Logps]) -> Logps:
    """The results of several forwards as those of one."""
    if len(results) == 1:
        return results[0]
    squares = [result.squares_N for result in results if result.squares_N is not None]
    return Logps(
        torch.cat([result.values_N for result in results]),
        torch.cat(squares) if squares else None,
        torch.cat([result.lengths_S for result in results]),
        [n for result in results for n in result.counts],
    )


def router_options(router_hook: RouterHook | None) -> dict[str, bool]:
    """A keyword of the forward that only mixtures of experts accept."""
    return {} if router_hook is None else {"output_router_logits": True}


def sum_segments(values_N: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
    """The sum of each sequence's values, in one kernel and in the same order every time."""
    # In float64: float32 drifts visibly over answers of tens of thousands of tokens. `unsafe` because the check of the
    # lengths would wait for a GPU.
    return torch.segment_reduce(values_N.double(), "sum", lengths=lengths_S, unsafe=True)


def sum_logps(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum_segments(
        torch.cat(list(logps)), torch.tensor([len(logps_N) for logps_N in logps], device=logps[0].device)
    )


def _concat_ids(sequence: TokenSequence) -> torch.Tensor:
    # A copy: the ids may be views of a read-only memory map.
    return torch.from_numpy(sequence.ids.astype(np.int64))
