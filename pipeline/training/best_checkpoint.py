"""Which evaluation of a run is the best so far, by the metric that train.best names.

The best entry is plain numbers, carried by every checkpoint, so a resumed run chooses as an uninterrupted one does.
"""

import math
import re
from collections.abc import Collection, Mapping

from prefcache.pipeline.config import Best, Train
from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.schema import EVALUATION as PREFIX
from prefcache.pipeline.schema import HELD_OUT, metric_prefix
from prefcache.pipeline.stored.records import BestEntry, ChosenStep
from prefcache.pipeline.training.metrics import PREFERENCE

Evaluation = Mapping[str, float]


def refuse_unknown(train: Train, evaluation: Evaluation, evaluated: Collection[str]) -> None:
    """Check train.best before the run. `evaluation` has the metrics of an evaluation, `evaluated` names the splits with examples."""
    assert train.best is not None
    splits = evaluated or (HELD_OUT,)
    names = {f"{PREFIX}{metric_prefix(split)}{name}": name for split in splits for name in evaluation}
    look_up(names, train.best.metric, "train.best.metric", f"This run's evaluations log {', '.join(names)}.")
    if train.eval_every is None:
        raise UsageError("train.best chooses among evaluations, and only the last step has one. Set train.eval_every.")
    if not evaluated:
        raise UsageError(
            "train.best: no example is held out, so nothing is evaluated. Raise prepare.held_out, or set prepare.held_out_data."
        )


def refuse_unmeasured(best: Best | None, evaluation: Evaluation) -> None:
    """Check train.best against the evaluation before the first step, which shows what these held-out examples can measure."""
    if best and best.metric.removeprefix(PREFIX) not in evaluation:
        raise UsageError(
            f"train.best.metric: {best.metric} has no value on these held-out examples. Those that have: "
            f"{', '.join(f'{PREFIX}{name}' for name in evaluation)}."
        )


def notes(train: Train) -> list[str]:
    if not (train.best and train.moving_reference):
        return []
    if re.fullmatch(rf"{PREFIX}(\w+_)?(logps/.*|{PREFERENCE})", train.best.metric):
        return []
    return [
        f"train.best: {train.best.metric} is measured against the reference of its step and falls back when the reference moves: the "
        "best is likely to be an evaluation just before a move, and train.best.patience may end the run after one; "
        f"{PREFIX}{PREFERENCE} depends on the policy alone"
    ]


def update(best: Best | None, entry: BestEntry | None, step: int, evaluation: Evaluation) -> BestEntry | None:
    """Return the best entry after one more evaluation; the earlier of two equal ones."""
    if best is None:
        return None
    if entry is None or _rank(best, evaluation) > _rank(best, entry.evaluation):
        return BestEntry(metric=best.metric, step=step, evaluation=dict(evaluation), waited=0)
    return entry.model_copy(update={"waited": entry.waited + 1})


def is_patience_exhausted(best: Best | None, entry: BestEntry | None) -> bool:
    return bool(best and best.patience and entry and entry.waited >= best.patience)


def choose_step(entry: BestEntry) -> ChosenStep:
    """Return the step whose weights the run keeps, for its manifest."""
    value = entry.evaluation.get(entry.metric.removeprefix(PREFIX))
    return ChosenStep(step=entry.step, metric=entry.metric, value=value)


def _rank(best: Best, evaluation: Evaluation) -> float:
    value = evaluation.get(best.metric.removeprefix(PREFIX))
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if best.is_greater_better else -value
