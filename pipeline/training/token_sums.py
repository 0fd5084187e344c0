"""How the log-probs of an answer's tokens become the one number that a loss reads. By default their sum.

Every way of weighing tokens is a modifier of any loss: it changes sums before the loss sees them. A run always stores the plain
sums. Shapes: N tokens of one answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefcache.pipeline.config import Tokens
from prefcache.pipeline.model.logprobs import sum_logps

TokenLists = Mapping[str, Sequence[torch.Tensor]]  # answer -> per example, its tokens' log-probs


@dataclass(frozen=True)
class Seed:
    """What a random choice of tokens depends on; the batch that an example is in is not part of it."""

    seed: int
    epoch: int
    rows: Sequence[int]  # of the examples


def answer_sums(policy: TokenLists, reference: TokenLists, tokens: Tokens, seed: Seed) -> dict[str, torch.Tensor]:
    """`X_logp` of the policy's answers, and `ref_X_logp` of those whose reference tokens are given."""
    if not tokens.weighs:
        return {f"{name}_logp": sum_logps(lists) for name, lists in policy.items()}
    if tokens.clamp is not None:
        policy = {name: _clamp(lists, reference[name], tokens.clamp) for name, lists in policy.items()}
    counts = {name: [len(logps_N) for logps_N in lists] for name, lists in policy.items()}
    weights = _token_weights(counts, tokens, seed)
    sums = {f"{name}_logp": _weighted_sums(lists, weights[name]) for name, lists in policy.items()}
    if tokens.of_reference:
        if tokens.ld_alpha_of == "policy":
            weights = _token_weights(counts, tokens.model_copy(update={"ld_alpha": None}), seed)
        sums |= {f"ref_{name}_logp": _weighted_sums(lists, weights[name]) for name, lists in reference.items()}
    return sums


def _clamp(
    policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], limits: tuple[float, float]
) -> list[torch.Tensor]:
    """Humanline: no token's log-ratio counts beyond the limits, and a token beyond them is not learned from.

    Ethayarajh et al. 2025, https://arxiv.org/abs/2509.24207.
    """
    pairs = ((own_N, ref_N.to(own_N)) for own_N, ref_N in zip(policy, reference, strict=True))
    return [ref_N + (own_N - ref_N).clamp(*limits) for own_N, ref_N in pairs]


def _weighted_sums(lists: Sequence[torch.Tensor], weights: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.stack(
        [
            (logps_N.double() * torch.as_tensor(weight_N, device=logps_N.device)).sum()
            for logps_N, weight_N in zip(lists, weights, strict=True)
        ]
    )


def _token_weights(counts: dict[str, list[int]], tokens: Tokens, seed: Seed) -> dict[str, list[np.ndarray]]:
    shorter = [min(lengths) for lengths in zip(*counts.values(), strict=True)]
    weights: dict[str, list[np.ndarray]] = {}
    for side, (name, lengths) in enumerate(counts.items()):
        weights[name] = []
        for i, n in enumerate(lengths):
            weight_N = np.ones(n)
            if tokens.ld_alpha is not None:
                # LD-DPO: Liu et al. 2024, https://arxiv.org/abs/2409.06411.
                weight_N[shorter[i] :] = tokens.ld_alpha
            if tokens.sampo:
                # SamPO: Lu et al. 2024, https://arxiv.org/abs/2406.10957. Drawn anew each epoch.
                generator = np.random.default_rng([seed.seed, seed.epoch, seed.rows[i], side])
                weight_N[:] = 0
                weight_N[generator.permutation(n)[: shorter[i]]] = 1
            if tokens.decay is not None:
                # Earlier tokens count more: Shao et al. 2025, https://arxiv.org/abs/2502.14340.
                weight_N *= tokens.decay ** np.arange(n)
            weights[name].append(weight_N)
    return weights


def wpo_weights(policy: TokenLists, log_sum_squares: TokenLists) -> torch.Tensor:
    """How likely the policy would generate the example's answers itself, per token and relative to what it would prefer.

    WPO: Zhou et al. 2024, https://arxiv.org/abs/2406.11827, Eq. 2, with weights aligned to
    what it samples. No gradient flows.
    """
    means = [
        torch.stack([(own_N - square_N).mean() for own_N, square_N in zip(lists, log_sum_squares[name], strict=True)])
        for name, lists in policy.items()
    ]
    return torch.stack(means).detach().double().sum(0).exp()
