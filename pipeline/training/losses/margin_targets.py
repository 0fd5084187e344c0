"""Losses for pairs whose margin has a target: from grades, from lengths, from the reference.

In the formulas: a = policy minus reference log-prob of an answer, p the policy's alone, w the chosen one and l the rejected,
u = beta (a_w - a_l), g the chosen answer's grade minus the rejected one's, s the sigmoid, |y| the number of its tokens that count.
Grades beyond 1e9 in size count as 1e9.
"""

from prefcache.pipeline.training.losses.lazy_torch import F, torch
from prefcache.pipeline.training.losses.pairs import squared
from prefcache.pipeline.training.losses.registry import (
    ACCURACY_RISES,
    CHOSEN_MAY_FALL,
    MARGIN_RISES,
    Healthy,
    loss,
    statistic,
)

_LARGEST_GRADE = 1e9
_SMALLEST_DIFFERENCE = 1e-6  # of grades, before its logarithm is taken
_NO_SPREAD = 1e-3  # nats; rounding alone stays below it


def grade_difference(chosen_score, rejected_score):
    return chosen_score.clamp(-_LARGEST_GRADE, _LARGEST_GRADE) - rejected_score.clamp(-_LARGEST_GRADE, _LARGEST_GRADE)


def running_moments(values_B, running, momentum, learning):
    """Exponential moving mean and standard deviation over the steps so far, starting at the first batch's."""
    if running and not learning:
        return running
    ordered_B = values_B.sort().values  # the order of examples must not change the last digit
    mean = ordered_B.mean()
    if not running:
        return {"steps": 1.0, "mean": mean, "std": ordered_B.std() if len(values_B) > 1 else 0.0}
    std = ordered_B.std() if len(values_B) > 1 else running["std"]
    return {
        "steps": running["steps"] + 1,
        "mean": momentum * running["mean"] + (1 - momentum) * mean,
        "std": momentum * running["std"] + (1 - momentum) * std,
    }


def z_scores(values_B, moments):
    """Distance from the mean in standard deviations; 0 while there is no spread."""
    std = torch.zeros_like(values_B) + moments["std"]
    return torch.where(std < _NO_SPREAD, 0.0, (values_B - moments["mean"]) / std)


@loss(
    "-log s(u - beta penalty max(0, -a_w))",
    when="Pairs that differ in a few tokens, where sigmoid drags the chosen answer down with the rejected one.",
    healthy=(
        MARGIN_RISES,
        ACCURACY_RISES,
        Healthy(
            "logps/chosen", "holds", "at or above the reference's; a steady fall means that the penalty is too small"
        ),
    ),
    ranges={"penalty": "[0, inf)"},
)
def dpop(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.3, penalty=50.0):
    """DPO-Positive: making a chosen answer less likely than the reference does costs a penalty.

    Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228, Eq. 3, with their beta of 0.3 and lambda of 50. There the penalty
    stands inside of the sigmoid and is scaled by beta; several implementations put it outside and unscaled, where 50 is too much.
    """
    chosen_B, rejected_B = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    return -F.logsigmoid(beta * (chosen_B - rejected_B - penalty * torch.relu(-chosen_B)))


@loss(
    "squared: (u - eta g)^2, backward: KL( s(eta g) || s(u) ), forward: KL( s(u) || s(eta g) )",
    when="Graded answers: a narrow win should stay narrow, so margins end at eta times the grades' difference.",
    healthy=(
        MARGIN_RISES,
        ACCURACY_RISES,
        Healthy("loss", "falls", "towards 0, which it has where each margin is eta times the grades' difference"),
    ),
    ranges={"eta": "[0, inf)", "distance": ("squared", "backward", "forward")},
)
def rpo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    chosen_score,
    rejected_score,
    *,
    beta=0.1,
    eta=1.0,
    distance="backward",
):
    """Reward-aware preference optimization: the margin is drawn to the difference of the grades.

    Sun et al. 2025, https://arxiv.org/abs/2502.00203; backward is the one of Nemotron-4, https://arxiv.org/abs/2406.11704.
    Directions are named as in NeMo, where backward is KL(grades || policy): most texts call that one forward. The square has no
    factor 1/2, as in NeMo. TRL's rpo_alpha is something else: a weight of sft here.
    """
    margin_B = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    target_B = eta * grade_difference(chosen_score, rejected_score)
    if distance == "squared":
        return squared(margin_B - target_B)
    if distance == "backward":
        return _bernoulli_kl(target_B, margin_B)
    assert distance == "forward"
    return _bernoulli_kl(margin_B, target_B)


def _bernoulli_kl(of_B, to_B):
    """KL( s(of) || s(to) ), from log-odds."""
    yes_B, no_B = F.logsigmoid(of_B), F.logsigmoid(-of_B)
    return yes_B.exp() * (yes_B - F.logsigmoid(to_B)) + no_B.exp() * (no_B - F.logsigmoid(-to_B))


@loss(
    "-log s(u - alpha f(g)), f(g) = log g or g",
    when="Graded answers: the clearer the win, the larger the target margin.",
    ranges={"alpha": "[0, inf)", "offset": ("log", "difference")},
)
def odpo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    chosen_score,
    rejected_score,
    *,
    beta=0.1,
    alpha=1.0,
    offset="log",
):
    """DPO with an offset: the margin has to exceed what the grades' difference asks for.

    Amini et al. 2024, https://arxiv.org/abs/2402.10571, with log as the offset's form and an alpha of 1, as in their code. That
    code has no value for equal or contradicting grades; here a difference below 1e-6 counts as 1e-6, so log asks for a margin
    of -13.8 alpha nats, which all but leaves the pair out.
    """
    margin_B = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    difference_B = grade_difference(chosen_score, rejected_score)
    if offset == "log":
        difference_B = difference_B.clamp(min=_SMALLEST_DIFFERENCE).log()
    return -F.logsigmoid(margin_B - alpha * difference_B)


@loss(
    "-log s(u + alpha (|y_w| - |y_l|))",
    when="Chosen answers are mostly the longer ones, so the policy learns to ramble.",
    ranges={"alpha": "[0, inf)"},
)
def r_dpo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    *,
    beta=0.1,
    alpha=0.01,
):
    """DPO whose reward is charged alpha for each token of an answer.

    Park et al. 2024, https://arxiv.org/abs/2403.19159. A pair that is won by length counts as won already and teaches little, hence
    the plus: the charge on what the policy may earn. Some implementations subtract the term, which pays for length.
    """
    margin_B = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return -F.logsigmoid(margin_B + alpha * (n_chosen_counted - n_rejected_counted))


@loss(
    "-log s(a_w - a_l) + (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2",
    when="Rewards should have an absolute scale: chosen answers rise to 1/(2 beta) and stop there.",
    healthy=(
        MARGIN_RISES,
        ACCURACY_RISES,
        Healthy("loss", "falls", "towards 0, from 0.69 + 1 / (2 beta^2); losses of different beta do not compare"),
    ),
)
def cal_dpo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """DPO plus a square that calibrates each answer's log-ratio.

    Xiao et al. 2024, https://arxiv.org/abs/2412.14516, Algorithm 1: beta is in the targets, not in the logistic term. It is
    sppo_hard plus that term. The targets are nats of whole answers: 5 at a beta of 0.1, 250 at the 0.002 of the authors' config.
    """
    chosen_B, rejected_B = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    calibration_B = (chosen_B - 0.5 / beta) ** 2 + (rejected_B + 0.5 / beta) ** 2
    return -F.logsigmoid(chosen_B - rejected_B) + calibration_B


@statistic
def relative_margin(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    *,
    momentum=0.9,
    running=None,
    learning=True,
):
    """How far a pair's margin of log-ratios per token lies from the mean of recent steps, in standard deviations."""
    margin_B = (chosen_logp - ref_chosen_logp) / n_chosen_counted - (
        rejected_logp - ref_rejected_logp
    ) / n_rejected_counted
    moments = running_moments(margin_B.detach().double(), running, momentum, learning)
    return z_scores(margin_B.detach(), moments), moments


@loss(
    "-log s(beta (p_w / |y_w| - p_l / |y_l|) - gamma - alpha z), z: a_w / |y_w| - a_l / |y_l| in standard deviations",
    when="Like simpo, but with a reference: pairs that the policy already separates better than others get a larger target margin.",
    healthy=(MARGIN_RISES, ACCURACY_RISES, CHOSEN_MAY_FALL),
    ranges={"gamma": "[0, inf)", "alpha": "[0, inf)", "momentum": "[0, 1)"},
)
def alpha_dpo(
    chosen_logp,
    rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    relative_margin,
    *,
    beta=2.5,
    gamma=1.5,
    alpha=0.5,
    momentum=0.9,
):
    """SimPO with a target margin per pair: what the policy has gained on the reference, normalized and without gradient.

    Wu et al. 2024, https://arxiv.org/abs/2410.10148. The paper adds alpha z to gamma; the authors' code multiplies it by beta as
    well, so its alpha of 0.2 is the 0.5 here. Mean and deviation are over recent steps as in that code, whose own start at 0
    makes the first z tenfold; here they start at the first batch's. z is 0 where that has no spread.
    """
    margin_B = chosen_logp / n_chosen_counted - rejected_logp / n_rejected_counted
    return -F.logsigmoid(beta * margin_B - gamma - alpha * relative_margin)
