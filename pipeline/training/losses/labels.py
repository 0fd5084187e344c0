"""Losses for answers with a label, good or not: KTO and its relatives.

In the formulas: a = policy minus reference log-prob of an answer, d of a desirable one and n of an undesirable, s the sigmoid.
Rewards of desirable and undesirable answers have TRL's names, rewards/chosen and rewards/rejected.
"""

from prefcache.pipeline.training.losses.lazy_torch import F, torch
from prefcache.pipeline.training.losses.registry import Healthy, loss, statistic

_HEALTHY = (
    Healthy(
        "rewards/margins",
        "rises",
        "desirable answers' rewards separate from undesirable ones'; noisy, so look at tens of steps",
    ),
    Healthy("rewards/accuracies", "rises", "from about 0.5: how often a desirable answer has the higher reward"),
)
_KL = Healthy(
    "kl", "holds", "noisy and small; a steady rise beyond tens of nats is the policy drifting away", high=100.0
)


@statistic
def kl(kl_logp, ref_kl_logp):
    """KTO's z: the divergence from the reference, estimated on mismatched answers; not below 0."""
    log_ratio_B = kl_logp - ref_kl_logp
    is_known_B = log_ratio_B.isfinite()  # an example may have no mismatched answer
    total = torch.where(is_known_B, log_ratio_B, 0.0).sum()
    return (total / is_known_B.sum().clamp(min=1)).clamp(min=0)


@loss(
    "d: w_d (1 - s(beta (a - z))), n: w_n (1 - s(beta (z - a)))",
    when="Thumbs up or down instead of pairs, also with many more of one than of the other (then set the weights).",
    healthy=(*_HEALTHY, _KL),
    ranges={"desirable_weight": "[0, inf)", "undesirable_weight": "[0, inf)"},
)
def kto(
    completion_logp,
    ref_completion_logp,
    label,
    kl,
    *,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    """Kahneman-Tversky optimization: gains and losses against a reference point.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. z is estimated over the whole step, TRL's over each
    micro-batch and as a mean of the processes' means. Weights times counts should lie within 1:1 and 4:3.
    """
    beyond_B = completion_logp - ref_completion_logp - kl
    desirable_B, undesirable_B = torch.sigmoid(-beta * beyond_B), torch.sigmoid(beta * beyond_B)
    return torch.where(label > 0, desirable_weight * desirable_B, undesirable_weight * undesirable_B)


@loss(
    "d: 1 - s(beta a), n: s(beta a)",
    when="Labels as for kto, without mismatched answers: half as many tokens to compute.",
    healthy=_HEALTHY,
    ranges={"desirable_weight": "[0, inf)", "undesirable_weight": "[0, inf)"},
)
def apo_zero_unpaired(
    completion_logp, ref_completion_logp, label, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
):
    """apo_zero for single answers: KTO with a reference point of 0.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, Eq. 7, unpaired as TRL has it.
    """
    reward_B = beta * (completion_logp - ref_completion_logp)
    return torch.where(
        label > 0, desirable_weight * torch.sigmoid(-reward_B), undesirable_weight * torch.sigmoid(reward_B)
    )


@statistic
def delta(completion_logp, ref_completion_logp, *, beta=0.1, running=None, learning=True):
    """BCO's delta: the mean of all rewards of the run so far, including this step's."""
    if running and not learning:
        return running["mean"], running
    running = running or {"n": 0.0, "mean": 0.0}
    reward_B = beta * (completion_logp - ref_completion_logp)
    n = running["n"] + len(reward_B)
    mean = running["mean"] + (reward_B.double().mean() - running["mean"]) * len(reward_B) / n
    return mean, {"n": n, "mean": mean}


@loss(
    "d: -log s(beta a - delta), n: -r log s(delta - beta a)",
    when="Noisy labels, or prompts that differ between the kinds: train.density_ratio weighs prompts that only one kind has.",
    healthy=_HEALTHY,
    ranges={"min_density_ratio": "[0, inf)", "max_density_ratio": "(0, inf)"},
)
def bco(
    completion_logp,
    ref_completion_logp,
    label,
    delta,
    density_ratio,
    *,
    beta=0.1,
    min_density_ratio=0.5,
    max_density_ratio=10.0,
):
    """Binary classification of rewards against their running mean.

    Jung et al. 2024, https://arxiv.org/abs/2404.04656, Eq. 9, with the running mean and the limits of r as in TRL. r is 1;
    with train.density_ratio it is how much likelier the prompt is among desirable answers (Sec. 3.4).
    """
    beyond_B = beta * (completion_logp - ref_completion_logp) - delta
    weight_B = density_ratio.clamp(min_density_ratio, max_density_ratio)
    return torch.where(label > 0, -F.logsigmoid(beyond_B), -weight_B * F.logsigmoid(-beyond_B))
