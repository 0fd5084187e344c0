"""Losses for pairs that need no reference: they train from prepared data that has not been scored.

In the formulas: p = the policy's log-prob of an answer, w the chosen one and l the rejected, |y| the number of its tokens that count, s the sigmoid,
e label smoothing.
"""

from prefcache.pipeline.training.losses.lazy_torch import F, torch
from prefcache.pipeline.training.losses.pairs import box_cox, soft_labels, squared
from prefcache.pipeline.training.losses.registry import CHOSEN_RISES, Healthy, loss

_SURE = -1e-6  # above it, a log-prob per token has no odds in float32

_MARGIN_RISES = Healthy("rewards/margins", "rises", "from the model's own preference, which may lie below 0")
_ACCURACY_RISES = Healthy(
    "rewards/accuracies", "rises", "from how often the model prefers the chosen answer anyway, often not 0.5"
)
_SEPARATION = Healthy("rewards/margins", "rises", "log-probs per token times beta: beyond gamma the pair is won")
_CHOSEN_HELD = Healthy(
    "logps/chosen", "may fall", "some fall is normal; only the margin holds it, so stop when answers get worse"
)


@loss(
    "-log s(beta (p_w / |y_w| - p_l / |y_l|) - gamma)",
    when="No reference, answers of different lengths. Sensitive to the learning rate: try 3e-7 to 1e-6 first.",
    healthy=(_SEPARATION, _ACCURACY_RISES, _CHOSEN_HELD),
    ranges={"gamma": "[0, inf)"},
    per_token=True,
)
def simpo(
    chosen_logp, rejected_logp, n_chosen_counted, n_rejected_counted, *, beta=2.0, gamma=1.0, label_smoothing=0.0
):
    """Log-probs per token as rewards, which have to differ by a margin.

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, Eq. 6. gamma is the margin itself, as in the paper and in TRL
    (simpo_gamma); others take gamma / beta.
    """
    margin_B = chosen_logp / n_chosen_counted - rejected_logp / n_rejected_counted
    return soft_labels(beta * margin_B - gamma, label_smoothing)


@loss(
    "-log s(r_w - r_l - gamma), r = beta (1 - exp(-alpha p / |y|)) / alpha",
    when="Where the policy drifts under simpo: alpha bends the reward, so that likely answers are pushed less (above 0) or more.",
    healthy=(_SEPARATION, _ACCURACY_RISES, _CHOSEN_HELD),
    ranges={"gamma": "[0, inf)", "alpha": "(-inf, inf)"},
    per_token=True,
)
def alphapo(
    chosen_logp,
    rejected_logp,
    n_chosen_counted,
    n_rejected_counted,
    *,
    beta=2.0,
    gamma=1.0,
    alpha=0.25,
    label_smoothing=0.0,
):
    """SimPO with a reward that alpha bends; simpo itself where alpha is 0.

    Gupta et al. 2025, https://arxiv.org/abs/2501.03884, Eq. 5. The exponent is cut at 80 and the reward at 2e35, near
    where float32 ends.
    """
    margin_B = box_cox(chosen_logp / n_chosen_counted, -alpha) - box_cox(rejected_logp / n_rejected_counted, -alpha)
    return soft_labels(beta * margin_B - gamma, label_smoothing)


@loss(
    "-log s(beta (p_w - p_l)) - nll sum(p_w) / sum(|y_w|)",
    when="Translation and other tasks with one right answer, whose likelihood is trained along with the preference.",
    healthy=(_MARGIN_RISES, _ACCURACY_RISES, CHOSEN_RISES),
    ranges={"nll": "[0, inf)"},
)
def cpo(chosen_logp, rejected_logp, mean_n_chosen_counted, *, beta=0.1, label_smoothing=0.0, nll=1.0):
    """DPO with a uniform reference, and the chosen answers' likelihood.

    Xu et al. 2024, https://arxiv.org/abs/2401.08417, Eq. 7. nll is TRL's cpo_alpha; the likelihood is averaged over the
    batch's answer tokens.
    """
    preference_B = soft_labels(beta * (chosen_logp - rejected_logp), label_smoothing)
    return preference_B - nll * chosen_logp / mean_n_chosen_counted


@loss(
    "max(0, 1 - beta (p_w - p_l)) - nll sum(p_w) / sum(|y_w|)",
    when="Like cpo, but pairs stop counting once they are won.",
    healthy=(_MARGIN_RISES, _ACCURACY_RISES, CHOSEN_RISES),
    ranges={"nll": "[0, inf)"},
)
def cpo_hinge(chosen_logp, rejected_logp, mean_n_chosen_counted, *, beta=0.1, nll=1.0):
    """CPO with a hinge: TRL's loss_type hinge.

    Xu et al. 2024, https://arxiv.org/abs/2401.08417, with the hinge of https://arxiv.org/abs/2305.10425.
    """
    return torch.relu(1 - beta * (chosen_logp - rejected_logp)) - nll * chosen_logp / mean_n_chosen_counted


@loss(
    "(p_w / |y_w| - p_l / |y_l| - 1 / (2 beta))^2 - nll sum(p_w) / sum(|y_w|)",
    when="Like cpo, but with a target for the margin.",
    healthy=(_MARGIN_RISES, _ACCURACY_RISES, CHOSEN_RISES),
    ranges={"nll": "[0, inf)"},
    per_token=True,
)
def cpo_ipo(
    chosen_logp, rejected_logp, n_chosen_counted, n_rejected_counted, mean_n_chosen_counted, *, beta=0.1, nll=1.0
):
    """CPO with IPO's square on log-probs per token: TRL's loss_type ipo.

    Xu et al. 2024, https://arxiv.org/abs/2401.08417, with Eq. 17 of https://arxiv.org/abs/2310.12036.
    """
    margin_B = chosen_logp / n_chosen_counted - rejected_logp / n_rejected_counted
    return squared(margin_B - 1 / (2 * beta)) - nll * chosen_logp / mean_n_chosen_counted


@loss(
    "-sum(p_w) / sum(|y_w|) - beta log s(log odds(p_w / |y_w|) - log odds(p_l / |y_l|))",
    when="Straight from a base model: instruction and preference in one run, at a higher learning rate than DPO's.",
    healthy=(
        CHOSEN_RISES,
        _ACCURACY_RISES,
        Healthy("rewards/margins", "rises", "the odds term; if it stays at 0 while the likelihood rises, raise beta"),
    ),
    per_token=True,
)
def orpo(chosen_logp, rejected_logp, n_chosen_counted, n_rejected_counted, mean_n_chosen_counted, *, beta=0.1):
    """The chosen answer's likelihood, and how its odds compare with the rejected one's.

    Hong et al. 2024, https://arxiv.org/abs/2403.07691, Eq. 6 and 7; beta is the paper's lambda. The likelihood is of the answers'
    tokens; TRL's, like the authors' code, is of the prompts' as well. Log-probs per token above -1e-6 count as that.
    """
    chosen_B = (chosen_logp / n_chosen_counted).clamp(max=_SURE)
    rejected_B = (rejected_logp / n_rejected_counted).clamp(max=_SURE)
    log_odds_B = (chosen_B - rejected_B) - (_log1m_exp(chosen_B) - _log1m_exp(rejected_B))
    return -chosen_logp / mean_n_chosen_counted - beta * F.logsigmoid(log_odds_B)


def _log1m_exp(logp_B):
    """log(1 - p), by whichever formula keeps the digits."""
    return torch.where(logp_B < -0.7, torch.log1p(-torch.exp(logp_B)), torch.log(-torch.expm1(logp_B)))


@loss(
    "max(0, delta - p_w + p_l) - nll p_w",
    when="A plain margin between log-probs, regularized by the chosen answers' likelihood.",
    healthy=(_MARGIN_RISES, _ACCURACY_RISES, CHOSEN_RISES),
    ranges={"delta": "[0, inf)", "nll": "[0, inf)"},
)
def slic(chosen_logp, rejected_logp, *, delta=1.0, nll=0.1):
    """Rank calibration: the chosen answer should be likelier by delta nats.

    Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425, Eq. 1, with the chosen answer as the one to stay close to.
    """
    return torch.relu(delta - chosen_logp + rejected_logp) - nll * chosen_logp
