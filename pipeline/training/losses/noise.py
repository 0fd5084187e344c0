"""Losses for pairs of which some are mislabelled, or lie too far from the reference.

In the formulas: a = policy minus reference log-prob of an answer, w the chosen one and l the rejected, m = a_w - a_l,
u = beta m, s the sigmoid.
"""

from prefcache.pipeline.training.losses.lazy_torch import F, torch
from prefcache.pipeline.training.losses.margin_targets import running_moments, z_scores
from prefcache.pipeline.training.losses.registry import (
    ACCURACY_RISES,
    HEALTHY_PAIRS,
    MARGIN_RISES,
    Healthy,
    loss,
    statistic,
)

# A ratio of exp(20) is clipped at any beta above 1e-7, unless both answers have it.
_LARGEST_LOG_RATIO = 20.0


@loss(
    "-beta_prime log mean exp(-l / beta_prime), l = -log s(u)",
    when="An unknown share of the labels is wrong: pairs with a large loss are doubted.",
    ranges={"beta_prime": "(0, inf)"},
    over_batch=True,
)
def dr_dpo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1, beta_prime=1.0):
    """DPO under the most favourable reweighting of the batch close to uniform: every example has the batch's value.

    Wu et al. 2024, https://arxiv.org/abs/2407.07880, with the beta' of 1 of the authors' code. That code takes the mean over a
    micro-batch of one process; here it is over the whole step. A large beta' trusts every label: at infinity it is sigmoid.
    """
    losses_B = -F.logsigmoid(beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)))
    # From the smallest loss, since exp would underflow, and in expm1, since a large beta_prime would leave 1 plus rounding.
    smallest = losses_B.min().detach()
    excess = torch.expm1((smallest - losses_B) / beta_prime).mean()
    return (smallest - beta_prime * torch.log1p(excess)).expand(len(losses_B))


@loss(
    "-log s(clip(beta (phi(a_w) - phi(a_l)), -2 r_max, 2 r_max)), phi(a) = exp(a) + a",
    when="Many epochs or a small beta, where sigmoid drifts to answers that the reference almost never gives.",
    healthy=HEALTHY_PAIRS,
    ranges={"r_max": "(0, inf)"},
)
def chi_po(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1, r_max=10.0):
    """DPO also regularized by the chi-squared divergence: the ratio is added to its logarithm.

    Huang et al. 2024, https://arxiv.org/abs/2407.13399, Algorithm 1. r_max is the largest plausible reward, which the paper
    leaves to the task; a pair whose margin lies beyond twice that has no gradient, whichever answer it favours. Some
    implementations leave the clipping out. Ratios are cut at exp(20).
    """
    chosen_B, rejected_B = _chi_link(chosen_logp - ref_chosen_logp), _chi_link(rejected_logp - ref_rejected_logp)
    return -F.logsigmoid((beta * (chosen_B - rejected_B)).clamp(-2 * r_max, 2 * r_max))


def _chi_link(log_ratio_B):
    return torch.exp(log_ratio_B.clamp(max=_LARGEST_LOG_RATIO)) + log_ratio_B


@statistic
def calibrated_beta(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    alpha=0.6,
    keep=0.8,
    momentum=0.9,
    min_beta=1e-3,
    running=None,
    learning=True,
):
    """The batch's beta: larger if the margins of the sampled pairs are above the running mean."""
    columns = _on_cpu(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    margin_B = _margin(*columns)
    moments = _moments_on_cpu(margin_B, running, momentum, learning)
    sampled_B = _sample_pairs(columns, moments, keep if learning else 1.0)
    mean = float(margin_B[sampled_B].sort().values.mean())
    return max(min_beta, beta * (1 + alpha * (mean - moments["mean"]))), moments


@statistic
def kept_share(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    keep=0.8,
    momentum=0.9,
    running=None,
    learning=True,
):
    """0 for a pair that is left out; for the others, the factor that makes the batch's mean a mean over the sampled pairs."""
    from prefcache.pipeline.model.device import to_device

    columns = _on_cpu(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    moments = _moments_on_cpu(_margin(*columns), running, momentum, learning)
    sampled_B = _sample_pairs(columns, moments, keep if learning else 1.0)
    share = len(sampled_B) / int(sampled_B.sum())
    return to_device(sampled_B, chosen_logp.device).to(chosen_logp.dtype) * share, moments


@loss(
    "-log s(b m) over the pairs kept, b = beta (1 + alpha (mean(m) - M)), M: the running mean of m",
    when="Data of mixed quality: easy batches get a larger beta, and pairs with unusual margins are left out.",
    healthy=(
        MARGIN_RISES,
        ACCURACY_RISES,
        Healthy(
            "calibrated_beta",
            "holds",
            "within a few times beta, above it while margins grow; if larger, lower alpha",
        ),
    ),
    ranges={"alpha": "[0, inf)", "keep": "(0, 1]", "momentum": "[0, 1)", "min_beta": "(0, inf)"},
)
def beta_dpo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    calibrated_beta,
    kept_share,
    *,
    beta=0.1,
    alpha=0.6,
    keep=0.8,
    momentum=0.9,
    min_beta=1e-3,
):
    """DPO with a beta for each batch, on a share of its pairs drawn with Gaussian weights around the usual margin.

    Wu et al. 2024, https://arxiv.org/abs/2407.08639, with the values, the floor on beta and the order (first the running mean,
    then beta, over the kept pairs) of the authors' code. m has no beta in it there; the paper writes it with rewards. That code
    starts its running mean and deviation at 0 and draws per micro-batch. Here they start at the first batch's, the draw is over
    the step and the same for any order of its examples, and an evaluation leaves out none. keep=1 filters nothing; with alpha=0
    too it is sigmoid.
    """
    return -kept_share * F.logsigmoid(
        calibrated_beta * _margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    )


def _margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp):
    return (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)


def _on_cpu(*columns):
    from prefcache.pipeline.model.device import to_host

    # The same margins sample the same pairs, whatever the policy's device.
    return list(to_host(torch.stack([column.detach().double() for column in columns])))


def _moments_on_cpu(margin_B, running, momentum, learning):
    return {name: float(value) for name, value in running_moments(margin_B, running, momentum, learning).items()}


def _sample_pairs(columns, moments, keep):
    """Sample pairs without replacement, with weights exp(-z^2 / 2), by the Gumbel top-k trick."""
    margin_B = _margin(*columns)
    n_sampled = max(1, int(keep * len(margin_B) + 1e-9))  # 0.29 * 100 is 28.999...
    # Noise is assigned in the order of the values, since the order within the batch depends on how it was split. The
    # reference's values decide first: they are the same bit by bit, whichever examples share a forward.
    order_B = torch.arange(len(margin_B))
    for key_B in columns:
        order_B = order_B[key_B[order_B].argsort(stable=True)]
    draw = torch.Generator().manual_seed(int(moments["steps"]))
    uniform_B = torch.rand(len(margin_B), generator=draw, dtype=torch.float64).clamp(min=1e-300)
    log_weight_B = -0.5 * z_scores(margin_B, moments)[order_B] ** 2
    sampled_B = torch.zeros(len(margin_B), dtype=torch.bool)
    sampled_B[order_B[(log_weight_B - torch.log(-torch.log(uniform_B))).topk(n_sampled).indices]] = True
    return sampled_B
