"""What a visit of examples says in numbers, under TRL's names where it has one. Rewards are beta times policy minus reference.

A loss without a reference has a reference of 0, and rewards per token where its formula has. Of labels, chosen are the desirable answers and rejected the undesirable ones.
"""

import numpy as np
import torch

from pipeline.training.losses.registry import COLUMNS
from pipeline.training.objective import WITHOUT_GRADIENT, Objective
from pipeline.training.policy import Visit

PREFERENCE = "preference_accuracy"


def of_visit(visit: Visit, objective: Objective) -> dict[str, float]:
    found = _of_labels(visit, objective) if "completion_logp" in visit else _of_pairs(visit, objective)
    losses = {name: visit[name].mean() for name in visit if name == "loss" or name.startswith("loss/")}
    found |= _of_reference(visit, objective)
    return {name: float(value) for name, value in (losses | found).items() if np.isfinite(value)}


def of_evaluations(objective: Objective) -> dict[str, float]:
    """Under its names what evaluations have, told before there is one: of two imagined examples, one of each kind."""
    two, answers = np.ones(2), [name for name in objective.visited if name not in WITHOUT_GRADIENT]
    visit = {"label": np.array([1.0, 0.0]), "loss": two}
    visit |= {name: two for answer in answers for name in (f"{answer}_logp", f"n_{answer}")}
    visit |= {f"ref_{answer}_logp": two for answer in objective.reference_answers}
    visit |= {f"loss/{term.loss.name}": two for term in objective.terms if len(objective.terms) > 1}
    columns = {name: torch.ones(2, dtype=torch.float64) for name in COLUMNS}
    return {**of_evaluation(visit, objective), **objective.with_statistics(columns, {}, learning=False)[2]}


def of_evaluation(visit: Visit, objective: Objective) -> dict[str, float]:
    """What is said of any visit, and how often the policy finds the chosen answer likelier, by its own log-prob alone."""
    found = of_visit(visit, objective)
    if "completion_logp" not in visit:
        found[PREFERENCE] = float((visit["chosen_logp"] > visit["rejected_logp"]).mean())
    return found


def log_ratio(visit: Visit, answer: str) -> np.ndarray:
    logp = visit[f"{answer}_logp"]
    found: np.ndarray = logp - visit.get(f"ref_{answer}_logp", np.zeros_like(logp))
    return found


def _of_reference(visit: Visit, objective: Objective) -> dict[str, np.floating]:
    """How far the answers' log-probs have moved from the reference's, in nats per token.

    An estimate of the KL divergence only where the policy would write these answers: they are the data's, not its own.
    """
    found: dict[str, np.floating] = {}
    if not objective.reference_answers:
        return found
    if "completion_logp" in visit:
        ratio, n, is_good = log_ratio(visit, "completion"), visit["n_completion"], visit["label"] > 0
        kinds = {"chosen": (ratio[is_good], n[is_good]), "rejected": (ratio[~is_good], n[~is_good])}
    else:
        names = [name for name in ("chosen", "rejected") if f"ref_{name}_logp" in visit and f"{name}_logp" in visit]
        kinds = {name: (log_ratio(visit, name), visit[f"n_{name}"]) for name in names}
    return {f"log_ratios/{name}": ratio.sum() / n.sum() for name, (ratio, n) in kinds.items() if len(n)}


def _rewards(visit: Visit, answer: str, objective: Objective) -> np.ndarray:
    rewards = objective.beta * log_ratio(visit, answer)
    return rewards / visit[f"n_{answer}"] if objective.per_token else rewards


def _of_pairs(visit: Visit, objective: Objective) -> dict[str, np.floating]:
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


def _of_labels(visit: Visit, objective: Objective) -> dict[str, np.floating]:
    """A batch may lack one of the kinds: what would be about it is then not there."""
    reward, is_good = _rewards(visit, "completion", objective), visit["label"] > 0
    good, bad = reward[is_good], reward[~is_good]
    logps = visit["completion_logp"]
    found: dict[str, np.floating] = {}
    if len(good):
        found |= {"rewards/chosen": good.mean(), "logps/chosen": logps[is_good].mean()}
    if len(bad):
        found |= {"rewards/rejected": bad.mean(), "logps/rejected": logps[~is_good].mean()}
    if len(good) and len(bad):
        found |= {"rewards/margins": good.mean() - bad.mean(), "rewards/accuracies": _how_often_higher(good, bad)}
    return found


def _how_often_higher(good: np.ndarray, bad: np.ndarray) -> np.floating:
    """Of all desirable answers beside all undesirable ones, how often the first has the higher reward."""
    below: np.floating = np.searchsorted(np.sort(bad), good, side="left").mean() / len(bad)
    return below
