"""The DPO family, with TRL's names and values.

In the formulas: a = policy minus reference log-prob of an answer, w the chosen one and l the rejected, u = beta (a_w - a_l),
s the sigmoid, |y| the number of its tokens that count, e label smoothing. A named f-divergence replaces a by its score.
"""

import math

from prefcache.pipeline.training.losses.lazy_torch import F, torch
from prefcache.pipeline.training.losses.registry import (
    ACCURACY_RISES,
    CHOSEN_RISES,
    DIVERGENCES,
    MARGIN_RISES,
    REJECTED_FALLS,
    Healthy,
    loss,
    statistic,
)

LARGEST_EXPONENT = 80.0
LARGEST_SCORE = 2e35  # a beta of 1000 times it is still a float32
_LARGEST_SQUARED = 1e18


def score(log_ratio, f_divergence, f_alpha):
    """f'(policy / reference) of a log-ratio, up to a constant that cancels in differences: the log-ratio itself for reverse_kl.

    Wang et al. 2023, https://arxiv.org/abs/2309.16240, Table 1. Exponents are cut at 80 and scores at 2e35, near where
    float32 ends.
    """
    assert f_divergence in DIVERGENCES
    if f_divergence == "forward_kl":
        return 1 - torch.exp((-log_ratio).clamp(max=LARGEST_EXPONENT))
    if f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    return box_cox(log_ratio, f_alpha - 1) if f_divergence == "alpha_divergence" else log_ratio


def box_cox(log_ratio, power):
    """The Box-Cox transform of a ratio: (ratio^power - 1) / power; the log-ratio if power is 0."""
    if abs(power) < 1e-6:
        return log_ratio
    # Not expm1: its gradient is computed from its value, which loses all digits near -1.
    cut = (torch.exp((power * log_ratio).clamp(max=LARGEST_EXPONENT)) - 1) / power
    return cut.clamp(-LARGEST_SCORE, LARGEST_SCORE)


def soft_labels(logits, label_smoothing):
    """Logistic loss, with a share of the labels assumed to be wrong."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def squared(x):
    # Only a divergence's score, which grows exponentially, comes near the clamp.
    return x.clamp(-_LARGEST_SQUARED, _LARGEST_SQUARED) ** 2


@statistic
def mean_n_chosen_counted(n_chosen_counted):
    """Mean number of tokens that count in the batch's chosen answers; it turns sums over answers into a mean over tokens."""
    return n_chosen_counted.mean()


@loss("-log s(u)", when="The default. Pairs whose labels can be trusted, from answers that the model might give.")
def sigmoid(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    label_smoothing=0.0,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """The original DPO loss: logistic loss on the reward margin.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7. With label smoothing, cDPO: (1-e) times it plus e times the
    same with the answers exchanged (Mitchell 2023, Eq. 3). With a divergence, f-DPO: https://arxiv.org/abs/2309.16240, Eq. 7.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    return soft_labels(beta * (chosen_B - rejected_B), label_smoothing)


@loss(
    "-log s(beta (a_w / |y_w| - a_l / |y_l|))",
    when="Answers of very different lengths: what counts is the log-ratio per token.",
)
def sigmoid_norm(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    *,
    beta=5.0,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """DPO on log-ratios averaged over the answer's tokens.

    Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, Eq. 6, with their beta of 5; TRL's default is 0.1.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha) / n_chosen_counted
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha) / n_rejected_counted
    return -F.logsigmoid(beta * (chosen_B - rejected_B))


@loss(
    "max(0, 1 - u)",
    when="Pairs that are already won should stop counting: beyond a reward margin of 1 nothing is learned.",
)
def hinge(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """Zero once the reward margin reaches 1.

    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, Eq. 11, after SLiC, https://arxiv.org/abs/2305.10425.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    return torch.relu(1 - beta * (chosen_B - rejected_B))


@loss(
    "(a_w / |y_w| - a_l / |y_l| - 1 / (2 beta))^2",
    when="Few or clean pairs, where sigmoid would push margins without end: here the margin has a target.",
    healthy=(
        MARGIN_RISES,
        ACCURACY_RISES,
        Healthy("loss", "falls", "towards 0; it starts at 1 / (4 beta^2), so losses of different beta do not compare"),
    ),
)
def ipo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    *,
    beta=0.1,
    per_token=True,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """Squared distance of the log-ratio margin from 1/(2*beta), so that the margin does not grow without end.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, Eq. 17. The log-ratios are averaged over the answer's tokens,
    as in the paper's experiments and in TRL; per_token=False sums them, as Eq. 17 is printed.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    if per_token:
        chosen_B, rejected_B = chosen_B / n_chosen_counted, rejected_B / n_rejected_counted
    return squared(chosen_B - rejected_B - 1 / (2 * beta))


@loss(
    "KL( [s(u), s(-u)] || [1-e, e] )",
    when="Avoiding bad answers matters more than covering all good ones (mode-seeking).",
    ranges={"label_smoothing": "(0, 1)"},
)
def exo_pair(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    label_smoothing=1e-3,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """The divergence from the policy's choice between the answers to the label, in that direction.

    Ji et al. 2024, https://arxiv.org/abs/2402.00856, Eq. 16, with their smoothing of 1e-3. It has no value at 0.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    logits_B = beta * (chosen_B - rejected_B)
    won_B, lost_B = F.logsigmoid(logits_B), F.logsigmoid(-logits_B)
    return won_B.exp() * (won_B - math.log1p(-label_smoothing)) + lost_B.exp() * (lost_B - math.log(label_smoothing))


@loss(
    "-log s(beta a_w) - 1/2 log s(-beta a_w) - 1/2 log s(-beta a_l)",
    when="Chosen answers must not get less likely: each answer has its own target, not only their difference.",
    healthy=(MARGIN_RISES, ACCURACY_RISES),
)
def nca_pair(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """Noise contrastive alignment of two answers: holds the chosen answer's likelihood up.

    Chen et al. 2024, https://arxiv.org/abs/2402.05369, Eq. 11 for two answers.
    """
    chosen_B, rejected_B = beta * (chosen_logp - ref_chosen_logp), beta * (rejected_logp - ref_rejected_logp)
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


@loss(
    "(-(1-e) log s(u) + e log s(-u)) / (1 - 2e)",
    when="A known share of the labels is wrong.",
    ranges={"label_smoothing": "[0, 0.5)"},
)
def robust(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    label_smoothing=0.1,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """What DPO would be in expectation without the label noise; it can be negative.

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, Eq. 12. label_smoothing is the share of wrong labels; TRL's
    default of 0 makes it sigmoid.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    logits_B = beta * (chosen_B - rejected_B)
    clean_B, flipped_B = -F.logsigmoid(logits_B), -F.logsigmoid(-logits_B)
    return ((1 - label_smoothing) * clean_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


@loss(
    "-log s(beta a_w) - log s(-beta a_l)",
    when="Each answer is good or bad in itself, not only compared with the other.",
    healthy=(MARGIN_RISES, ACCURACY_RISES),
)
def bco_pair(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """Two binary classifications, without BCO's reward shift.

    Jung et al. 2024, https://arxiv.org/abs/2404.04656, Eq. 9 with a shift of 0, as TRL has it.
    """
    chosen_B, rejected_B = beta * (chosen_logp - ref_chosen_logp), beta * (rejected_logp - ref_rejected_logp)
    return -F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B)


@loss(
    "(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2",
    when="Self-play in rounds: each answer is pushed to a target of its own, so neither runs away.",
    healthy=(MARGIN_RISES, ACCURACY_RISES, Healthy("loss", "falls", "towards 0, from 1 / (2 beta^2)")),
)
def sppo_hard(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """SPPO where the chosen answer always wins.

    Wu et al. 2024, https://arxiv.org/abs/2405.00675, Eq. 4.7 with win probabilities 1 and 0.
    """
    chosen_B, rejected_B = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    return (chosen_B - 0.5 / beta) ** 2 + (rejected_B + 0.5 / beta) ** 2


@loss(
    "-log s(beta (sorted(log p_w - log p_l) - sorted(ref_w - ref_l)))",
    when="Large batches: the distribution of margins should dominate the reference's, not each margin its own.",
    over_batch=True,
)
def aot(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1, label_smoothing=0.0):
    """Stochastic dominance of the policy's margins over the reference's, both sorted over the batch.

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, the paired form of Eq. 6 with the logistic loss.
    """
    margin_B = chosen_logp - rejected_logp
    return soft_labels(beta * (margin_B - _match_ranks(ref_chosen_logp - ref_rejected_logp, margin_B)), label_smoothing)


@loss(
    "-log s(beta (sorted(a_w) - sorted(a_l)))",
    when="Chosen and rejected answers that do not belong together: all good ones should dominate all bad ones.",
    over_batch=True,
)
def aot_unpaired(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1, label_smoothing=0.0):
    """Stochastic dominance of the chosen answers' log-ratios over the rejected ones', both sorted over the batch.

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, the unpaired form of Eq. 6 with the logistic loss.
    """
    chosen_B = chosen_logp - ref_chosen_logp
    rejected_B = rejected_logp - ref_rejected_logp
    return soft_labels(beta * (chosen_B - _match_ranks(rejected_B, chosen_B)), label_smoothing)


def _match_ranks(values_B, like_B):
    """Reorder `values`: the k-th smallest goes where `like` has its k-th smallest."""
    rank_B = torch.empty_like(like_B, dtype=torch.long)
    rank_B[like_B.argsort(stable=True)] = torch.arange(len(like_B), device=like_B.device)
    return values_B.sort().values[rank_B]


@loss(
    "1 - s(beta a_w) + s(beta a_l)",
    when="The chosen answers are better than what the model gives today.",
    healthy=(MARGIN_RISES, ACCURACY_RISES, CHOSEN_RISES, REJECTED_FALLS),
)
def apo_zero(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """Chosen answers up, rejected ones down, each on its own and each with a limit.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, Eq. 7.
    """
    chosen_B, rejected_B = beta * (chosen_logp - ref_chosen_logp), beta * (rejected_logp - ref_rejected_logp)
    return torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B)


@loss(
    "s(beta a_w) + 1 - s(u)",
    when="The model today is better than even the chosen answers: both go down, the rejected ones further.",
    healthy=(MARGIN_RISES, ACCURACY_RISES, REJECTED_FALLS),
)
def apo_down(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """Both answers down, the rejected one further.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, Eq. 8.
    """
    chosen_B, rejected_B = beta * (chosen_logp - ref_chosen_logp), beta * (rejected_logp - ref_rejected_logp)
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


@loss(
    "-(1 - s(u/tau)) log s(u) + s(u/tau) exp(-u)",
    when="To compare with sigmoid: found by a search over programs. It has a local optimum on the wrong side of 0.",
    healthy=(
        Healthy("loss", "falls", "from 0.847 at a margin of 0"),
        Healthy(
            "rewards/margins",
            "may fall",
            "at first: at 0 the slope leads to -0.12; pairs cross over as the others pull them",
        ),
    ),
    ranges={"tau": "(0, inf)"},
)
def discopop(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    *,
    beta=0.1,
    tau=0.05,
    f_divergence="reverse_kl",
    f_alpha=0.5,
):
    """Logistic below a margin of 0, exponential above, blended.

    Lu et al. 2024, https://arxiv.org/abs/2406.08414, Eq. 5, who note the local optimum: with their tau a pair whose margin is
    below 0.07 is drawn to -0.12. The exponent is cut at 80, where its weight is 0 anyway for any tau well below 1.
    """
    chosen_B = score(chosen_logp - ref_chosen_logp, f_divergence, f_alpha)
    rejected_B = score(rejected_logp - ref_rejected_logp, f_divergence, f_alpha)
    logits_B = beta * (chosen_B - rejected_B)
    blend_B = torch.sigmoid(logits_B / tau)
    exponential_B = torch.exp((-logits_B).clamp(max=LARGEST_EXPONENT))
    return -(1 - blend_B) * F.logsigmoid(logits_B) + blend_B * exponential_B


@loss(
    "-sum(log p_w) / sum(|y_w|)",
    when="Next to another loss, to hold the chosen answers up: train.loss: {sigmoid: 1, sft: 1} is RPO of the DPO kind.",
    healthy=(CHOSEN_RISES,),
    plain=True,
)
def sft(chosen_logp, mean_n_chosen_counted):
    """Negative log-likelihood of the chosen answers, averaged over the batch's answer tokens.

    As a term next to DPO: Pang et al. 2024, https://arxiv.org/abs/2404.19733, Eq. 1, and Liu et al. 2024,
    https://arxiv.org/abs/2405.16436. Every token of the optimizer step has the same weight, rather than every answer; train.tokens
    does not change that.
    """
    return -chosen_logp / mean_n_chosen_counted


@statistic
def chosen_divergence(chosen_logp, ref_chosen_logp):
    """Mean log-ratio of the batch's chosen answers, not below 0."""
    return (chosen_logp - ref_chosen_logp).mean().clamp(min=0)


@statistic
def rejected_divergence(rejected_logp, ref_rejected_logp):
    """Mean log-ratio of the batch's rejected answers, not below 0."""
    return (rejected_logp - ref_rejected_logp).mean().clamp(min=0)


@loss(
    "1/2 (1 - s(beta (a_w - z_l))) + 1/2 (1 - s(beta (z_w - a_l)))",
    when="KTO's utility for pairs; for labelled data use kto.",
    healthy=(MARGIN_RISES, ACCURACY_RISES),
)
def kto_pair(
    chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_divergence, rejected_divergence, *, beta=0.1
):
    """KTO on pairs: each answer against the mean log-ratio z of the batch's other kind.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. TRL had it until 0.8, as the mean over both answers; there
    gradients flowed through z, here, as the paper says, they do not.
    """
    chosen_B, rejected_B = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    desirable_B = torch.sigmoid(-beta * (chosen_B - rejected_divergence))
    undesirable_B = torch.sigmoid(-beta * (chosen_divergence - rejected_B))
    return (desirable_B + undesirable_B) / 2
