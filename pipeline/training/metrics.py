"""Metrics of a visit of examples, under TRL's names where it has one. Rewards are beta times policy minus reference.

For a loss without a reference, the reference counts as 0, and rewards are per token if they are in its formula. For labels, chosen
means the desirable answers and rejected the undesirable ones.
"""

import numpy as np
import torch

from prefcache.pipeline.training.losses.registry import COLUMNS
from prefcache.pipeline.training.objective import WITHOUT_GRADIENT, Objective
from prefcache.pipeline.training.policy_logps import Visit

PREFERENCE = "preference_accuracy"


def visit_metrics(visit: Visit, objective: Objective) -> dict[str, float]:
    metrics = {name: visit[name].mean() for name in visit if name == "loss" or name.startswith("loss/")}
    metrics |= _label_metrics(visit, objective) if "completion_logp" in visit else _pair_metrics(visit, objective)
    metrics |= _log_ratio_metrics(visit, objective)
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def evaluation_metrics(visit: Visit, objective: Objective) -> dict[str, float]:
    """The metrics of any visit, and how often the policy's own log-prob prefers the chosen answer."""
    metrics = visit_metrics(visit, objective)
    if "completion_logp" not in visit:
        metrics[PREFERENCE] = float((visit["chosen_logp"] > visit["rejected_logp"]).mean())
    return metrics


def example_evaluation(objective: Objective) -> dict[str, float]:
    """The metrics that evaluations of this objective will log, computed on two imaginary examples, one of each kind."""
    ones, answers = np.ones(2), [name for name in objective.visited if name not in WITHOUT_GRADIENT]
    visit = {"label": np.array([1.0, 0.0]), "loss": ones}
    visit |= {name: ones for answer in answers for name in (f"{answer}_logp", f"n_{answer}_counted")}
    visit |= {f"ref_{answer}_logp": ones for answer in objective.reference_answers}
    visit |= {f"loss/{term.loss.name}": ones for term in objective.terms if len(objective.terms) > 1}
    columns = {name: torch.ones(2, dtype=torch.float64) for name in COLUMNS}
    logged = objective.compute_statistics(columns, {}, learning=False).logged
    return {**evaluation_metrics(visit, objective), **{name: float(value) for name, value in logged.items()}}


def log_ratio(visit: Visit, answer: str) -> np.ndarray:
    logp = visit[f"{answer}_logp"]
    ratio: np.ndarray = logp - visit.get(f"ref_{answer}_logp", np.zeros_like(logp))
    return ratio


def _rewards(visit: Visit, answer: str, objective: Objective) -> np.ndarray:
    rewards = objective.beta * log_ratio(visit, answer)
    return rewards / visit[f"n_{answer}_counted"] if objective.per_token else rewards


def _pair_metrics(visit: Visit, objective: Objective) -> dict[str, np.floating]:
    if "rejected_logp" not in visit:  # a step of sft
        return {"logps/chosen": visit["chosen_logp"].mean()}
    chosen, rejected = (_rewards(visit, answer, objective) for answer in ("chosen", "rejected"))
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": visit["chosen_logp"].mean(),
        "logps/rejected": visit["rejected_logp"].mean(),
    }


def _label_metrics(visit: Visit, objective: Objective) -> dict[str, np.floating]:
    """Metrics of labelled answers; those of a kind that the batch lacks are omitted."""
    reward, is_desirable, logps = _rewards(visit, "completion", objective), visit["label"] > 0, visit["completion_logp"]
    chosen, rejected = reward[is_desirable], reward[~is_desirable]
    metrics: dict[str, np.floating] = {}
    if len(chosen):
        metrics |= {"rewards/chosen": chosen.mean(), "logps/chosen": logps[is_desirable].mean()}
    if len(rejected):
        metrics |= {"rewards/rejected": rejected.mean(), "logps/rejected": logps[~is_desirable].mean()}
    if len(chosen) and len(rejected):
        # Over all pairs of a desirable and an undesirable answer, the share in which the desirable one has the higher reward.
        n_below = np.searchsorted(np.sort(rejected), chosen, side="left")
        metrics["rewards/margins"] = chosen.mean() - rejected.mean()
        metrics["rewards/accuracies"] = n_below.mean() / len(rejected)
    return metrics


def _log_ratio_metrics(visit: Visit, objective: Objective) -> dict[str, np.floating]:
    """How far the answers' log-probs have moved from the reference's, in nats per token.

    An estimate of the KL divergence only where the policy would write these answers: they are the data's, not its own.
    """
    if not objective.reference_answers:
        return {}
    if "completion_logp" in visit:
        ratio, n, is_desirable = log_ratio(visit, "completion"), visit["n_completion_counted"], visit["label"] > 0
        parts = {"chosen": (ratio[is_desirable], n[is_desirable]), "rejected": (ratio[~is_desirable], n[~is_desirable])}
    else:
        names = [name for name in ("chosen", "rejected") if f"ref_{name}_logp" in visit and f"{name}_logp" in visit]
        parts = {name: (log_ratio(visit, name), visit[f"n_{name}_counted"]) for name in names}
    return {f"log_ratios/{name}": ratio.sum() / n.sum() for name, (ratio, n) in parts.items() if len(n)}
