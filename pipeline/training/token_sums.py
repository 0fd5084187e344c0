"""How the log-probs of an answer's tokens become the one number that a loss reads. By default their sum.

Every way of weighing tokens is a modifier of any loss: it changes sums before the loss sees them. A run always stores the plain
sums. Only tokens that count are seen here: the first of them is number 0, whatever stands before it. What weighs tokens is laid
out on the host, flat and in the order of the forward, so that the device sums all answers in one operation.
Shapes: N tokens of a forward, S its sequences, B examples, A their answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefcache.pipeline.config import Tokens
from prefcache.pipeline.model.logprobs import Logps, sum_segments

# What `answer_sums` reads besides the policy's log-probs.
_PLACES, _WEIGHTS, _REFERENCE, _REFERENCE_WEIGHTS = "places", "weights", "reference", "reference_weights"


@dataclass(frozen=True)
class Seed:
    """What a random choice of tokens depends on; the batch that an example is in is not part of it."""

    seed: int
    epoch: int
    rows: Sequence[int]  # of the examples


@dataclass(frozen=True)
class Answers:
    """The answers that a forward computes, one of each name for every example."""

    counts: Mapping[str, Sequence[int]]  # tokens that count, by name and example
    # The forward's sequences, as positions in the list of all answers of the first name, of the second, ...
    order: Sequence[int]

    def lay_out(
        self, tokens: Tokens, seed: Seed, reference: Mapping[str, Sequence[np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Arrays for the device. `reference` has the log-probs of its tokens, by answer."""
        arrays = {_PLACES: np.argsort(self.order)}
        if not tokens.weighs:
            return arrays
        weights = _token_weights(self.counts, tokens, seed)
        arrays[_WEIGHTS] = self._flatten(weights)
        if tokens.of_reference and reference:
            # Only a clamp reads the reference of every answer.
            unread = {name: [np.zeros(n, np.float32) for n in lengths] for name, lengths in self.counts.items()}
            arrays[_REFERENCE] = self._flatten(reference if tokens.clamp else {**unread, **reference})
            if tokens.ld_alpha_of == "policy":
                weights = _token_weights(self.counts, tokens.model_copy(update={"ld_alpha": None}), seed)
            arrays[_REFERENCE_WEIGHTS] = self._flatten(weights)
        return arrays

    def _flatten(self, by_name: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        lists = [values_N for name in self.counts for values_N in by_name[name]]
        return np.concatenate([lists[i] for i in self.order])


def answer_sums(
    policy: Logps, names: Sequence[str], inputs: Mapping[str, torch.Tensor], tokens: Tokens
) -> dict[str, torch.Tensor]:
    """`X_logp` of the policy's answers, and `ref_X_logp` where the reference's tokens are weighed."""
    if not tokens.weighs:
        return split_answers(policy.sums(), names, inputs)
    values_N = policy.values_N
    if tokens.clamp is not None:
        values_N = _clamp(values_N, inputs[_REFERENCE], tokens.clamp)
    sums = split_answers(sum_segments(values_N.double() * inputs[_WEIGHTS], policy.lengths_S), names, inputs)
    if _REFERENCE in inputs:
        reference_S = sum_segments(inputs[_REFERENCE].double() * inputs[_REFERENCE_WEIGHTS], policy.lengths_S)
        sums |= {f"ref_{name}": values_B for name, values_B in split_answers(reference_S, names, inputs).items()}
    return sums


def split_answers(
    values_S: torch.Tensor, names: Sequence[str], inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Values of a forward's sequences as columns of examples: `X_logp` of each answer."""
    values_AB = values_S.index_select(0, inputs[_PLACES]).view(len(names), -1)
    return {f"{name}_logp": values_B for name, values_B in zip(names, values_AB.unbind(), strict=True)}


def _clamp(policy_N: torch.Tensor, reference_N: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """Humanline: no token's log-ratio counts beyond the limits, and a token beyond them is not learned from.

    Ethayarajh et al. 2025, https://arxiv.org/abs/2509.24207.
    """
    return reference_N + (policy_N - reference_N).clamp(*limits)


def _token_weights(counts: Mapping[str, Sequence[int]], tokens: Tokens, seed: Seed) -> dict[str, list[np.ndarray]]:
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


def wpo_weights(
    policy: Logps, names: Sequence[str], inputs: Mapping[str, torch.Tensor], weighed: Sequence[str]
) -> torch.Tensor:
    """How likely the policy would generate the answers `weighed` itself, per token and relative to what it would prefer.

    WPO: Zhou et al. 2024, https://arxiv.org/abs/2406.11827, Eq. 2, with weights aligned to
    what it samples. No gradient flows.
    """
    assert policy.squares_N is not None
    mean_S = sum_segments(policy.values_N.detach() - policy.squares_N, policy.lengths_S) / policy.lengths_S
    means = split_answers(mean_S, names, inputs)
    return torch.stack([means[f"{name}_logp"] for name in weighed]).sum(0).exp()
