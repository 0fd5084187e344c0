"""How much likelier a prompt is among desirable answers than among undesirable ones.

BCO weighs undesirable answers by this ratio if the two kinds answer different prompts (https://arxiv.org/abs/2404.04656, Sec. 3.4).
As in the paper, a logistic regression that separates the two kinds gives the ratio; its features are which tokens a prompt has,
where the authors use an embedding model's vector.
Shapes: B prompts, F tokens as features, N tokens of all prompts.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_BUCKETS = 4096
_PENALTY = 1e-3  # on squared weights, so that a few examples are not separated by rare tokens
_STEPS = 100


def density_ratios(prompts: Sequence[np.ndarray], label: np.ndarray) -> np.ndarray:
    """p(desirable | prompt) / p(undesirable | prompt), times undesirable examples per desirable one.

    The ratio is fitted on the first prompts, those with a `label`; the others are held out.
    """
    is_desirable, n = label.astype(bool), len(label)
    if is_desirable.all() or not is_desirable.any():
        return np.ones(len(prompts))
    # Which tokens each prompt has, as rows of length 1. Frequent tokens have small ids, so they keep buckets of their own.
    tokens = [np.unique(ids % _BUCKETS).astype(np.int64) for ids in prompts]
    counts = np.array([len(buckets) for buckets in tokens])
    row_N = torch.from_numpy(np.repeat(np.arange(len(prompts)), counts))
    token_N = torch.from_numpy(np.concatenate(tokens))
    value_N = torch.from_numpy(np.repeat([int(n) ** -0.5 for n in counts], counts))
    target_B = torch.from_numpy(is_desirable.astype(np.float64))
    weight_F = torch.zeros(_BUCKETS, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_F, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def logits_B() -> torch.Tensor:
        zeros_B = torch.zeros(len(prompts), dtype=torch.float64)
        return zeros_B.index_add(0, row_N, weight_F.index_select(0, token_N) * value_N) + bias

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits_B()[:n], target_B) + _PENALTY * weight_F.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    prior = np.log(is_desirable.sum() / (~is_desirable).sum())
    with torch.no_grad():
        ratios: np.ndarray = np.exp(np.clip(logits_B().numpy() - prior, -50, 50))
    return ratios
