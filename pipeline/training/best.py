"""Which evaluation of a run is the best so far, by the metric that train.best names.

What is known of it are plain numbers that every checkpoint carries, so a resumed run chooses as one that never stopped.
"""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.config import Best, Train
from pipeline.errors import UsageError, named
from pipeline.training.metrics import PREFERENCE

Evaluation = Mapping[str, float]
# As a checkpoint's JSON has it: the `metric`, the `step`, its `evaluation`, and how many have `waited` for a better one since.
Found = dict[str, Any]
PREFIX = "eval_"


def refuse_unknown(train: Train, measured: Evaluation, n_held_out: int) -> None:
    """`measured` has what an evaluation of this run logs, by its name there."""
    assert train.best is not None
    names = {f"{PREFIX}{name}": name for name in measured}
    named(names, train.best.metric, "train.best.metric", f"This run's evaluations log {', '.join(names)}.")
    if train.eval_every is None:
        raise UsageError(
            "train.best chooses among evaluations, and there is only the one after the last step. Say train.eval_every."
        )
    if not n_held_out:
        raise UsageError("train.best: no example is held out, so nothing is evaluated. Raise prepare.held_out.")


def notes(train: Train) -> list[str]:
    """For a person."""
    if not (train.best and train.moving_reference):
        return []
    if train.best.metric.startswith(f"{PREFIX}logps/") or train.best.metric == f"{PREFIX}{PREFERENCE}":
        return []
    return [
        f"train.best: {train.best.metric} is measured beside the reference of its step, and falls back where that moves: the best "
        "is likely to be an evaluation just before a move, and train.best.patience may end the run after one; "
        f"{PREFIX}{PREFERENCE} is of the policy alone"
    ]


def refuse_unmeasured(best: Best | None, evaluation: Evaluation) -> None:
    """The evaluation before the first step tells what these held-out examples can measure."""
    if best and best.metric.removeprefix(PREFIX) not in evaluation:
        raise UsageError(
            f"train.best.metric: {best.metric} has no value on these held-out examples. Those that have: "
            f"{', '.join(f'{PREFIX}{name}' for name in evaluation)}."
        )


def after(best: Best | None, found: Found | None, step: int, evaluation: Evaluation) -> Found | None:
    """What is the best after one more evaluation; of equal ones the earlier."""
    if best is None:
        return None
    if found is None or _rank(best, evaluation) > _rank(best, found["evaluation"]):
        return {"metric": best.metric, "step": step, "evaluation": dict(evaluation), "waited": 0}
    return {**found, "waited": found["waited"] + 1}


def is_of(found: Found | None, step: int) -> bool:
    return found is not None and found["step"] == step


def is_given_up(best: Best | None, found: Found | None) -> bool:
    """Whether train.best.patience is at its end."""
    return bool(best and best.patience and found and found["waited"] >= best.patience)


def described(found: Found | None) -> dict[str, Any]:
    """Which step it was and by what, for a manifest; empty where none was asked for."""
    if found is None:
        return {}
    value = found["evaluation"].get(found["metric"].removeprefix(PREFIX))
    return {"best": {"step": found["step"], "metric": found["metric"], "value": value}}


def _rank(best: Best, evaluation: Evaluation) -> float:
    value = evaluation.get(best.metric.removeprefix(PREFIX))
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if best.is_greater_better else -value
