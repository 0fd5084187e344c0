"""How much likelier a prompt is among desirable answers than among undesirable ones.

BCO weighs undesirable answers by it where the two kinds answer different prompts (https://arxiv.org/abs/2404.04656, Sec. 3.4). As
there, it is what a logistic regression that tells the two apart says of a prompt; what it sees of the prompt is which tokens are
in it, where the authors take an embedding model's vector.
Shapes: B prompts, F tokens as features, N tokens of all prompts.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_BUCKETS = 4096
_PENALTY = 1e-3  # on squared weights: few examples shall not be told apart by rare tokens
_STEPS = 100


def density_ratios(prompts: Sequence[np.ndarray], label: np.ndarray) -> np.ndarray:
    """p(desirable | prompt) / p(undesirable | prompt), times undesirable examples per desirable one.

    `label` is of the first of the prompts, on which it is fitted; the others, which are held out, are only asked about.
    """
    is_good, n = label.astype(bool), len(label)
    if is_good.all() or not is_good.any():
        return np.ones(len(prompts))
    row_N, token_N, value_N = _features(prompts)
    target_B = torch.from_numpy(is_good.astype(np.float64))
    weight_F = torch.zeros(_BUCKETS, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([weight_F, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def logits_B() -> torch.Tensor:
        zeros_B = torch.zeros(len(prompts), dtype=torch.float64)
        return zeros_B.index_add(0, row_N, weight_F.index_select(0, token_N) * value_N) + bias

    def closure() -> torch.Tensor:
        fit.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits_B()[:n], target_B) + _PENALTY * weight_F.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    fit.step(closure)  # type: ignore[no-untyped-call]
    prior = np.log(is_good.sum() / (~is_good).sum())
    with torch.no_grad():
        ratios: np.ndarray = np.exp(np.clip(logits_B().numpy() - prior, -50, 50))
    return ratios


def _features(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens each prompt has, as rows of length 1: row, token and value of everything that is not 0."""
    rows, tokens, values = [], [], []
    for row, ids in enumerate(prompts):
        # Frequent tokens have small ids, so these keep a place of their own.
        buckets = np.unique(ids % _BUCKETS).astype(np.int64)
        rows.append(np.full(len(buckets), row))
        tokens.append(buckets)
        values.append(np.full(len(buckets), len(buckets) ** -0.5))
    row_N, token_N, value_N = (torch.from_numpy(np.concatenate(each)) for each in (rows, tokens, values))
    return row_N, token_N, value_N
