"""What a run is made from, found and checked before any model is loaded: data, scores, settings, and where the policy starts.

`made_from` is the identity of a run: where it is the same, the run is the same.
"""

from pathlib import Path
from typing import Any

from pipeline import identity
from pipeline.config import Config, Train
from pipeline.errors import DataError, IdentityError, UsageError
from pipeline.progress import Progress
from pipeline.schema import HELD_OUT, TRAIN
from pipeline.stored.cache import Cache, identify, open_scored, vouched_for
from pipeline.stored.prepared import Prepared
from pipeline.training import best, columns, metrics, optimizers, trackers
from pipeline.training.batches import Examples
from pipeline.training.objective import Objective
from pipeline.training.selection import Selection

# Keys that change neither the order of the data nor, but for rounding, the outcome of a step.
_HARMLESS = {
    "run",
    "tokens_per_micro_batch",
    "rows",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "alerts",
    "report_to",
    "kinds",
    "device",
    "shard",
    "gradient_checkpointing",
}


def refuse(config: Config, objective: Objective, prepared: Prepared) -> None:
    columns.refuse_missing(objective, prepared)
    optimizers.refuse_missing(config.train)
    trackers.refuse_missing(config.train.report_to)
    if config.train.best:
        best.refuse_unknown(config.train, metrics.of_evaluations(objective), len(prepared.table(HELD_OUT)))


def start(config: Config) -> identity.Reference:
    """What the policy starts from: a whole model, or one whose own weights stay as they are."""
    start = identity.find_start(config)
    found = "an adapter" if start.adapter else start.quantization and "quantised weights"
    if found and config.train.lora is None:
        raise UsageError(
            f"The policy would start from {start.adapter or start.folder}, which has {found}; training all weights starts from "
            "a whole model. Train an adapter (train.lora={}: one that exists is trained further), name a whole model "
            "(train.model), or merge the adapter (prefcache merge) and set model to the result."
        )
    return start


def scored(
    config: Config, prepared: Prepared, objective: Objective, selection: Selection
) -> tuple[dict[str, Any], Cache]:
    found = open_scored(config.scored, every_byte=False)
    if found is None:
        reader = "" if objective.reference_answers else f"{selection.reader}, which scoring gives: "
        raise UsageError(
            f"{reader}{config.prepared} has not been scored: there is no {config.scored}. Score first (make score)."
        )
    scored, cache = found
    if scored["inputs"]["prepared"] != prepared.id:
        raise IdentityError(
            f"{config.scored} belongs to other data than {config.prepared} holds now. Score it (make score)."
        )
    if config.train.model is None or Path(config.model).is_dir():
        named = identify(identity.find_reference(config), Path(config.cache))["model_id"]
        if named != scored["reference"]["model_id"]:
            raise IdentityError(
                f"{config.scored} was scored by {scored['reference']['name']}@{scored['reference']['model_id'][:8]}; this "
                f"run names {config.model}@{named[:8]}. Score with it (make score), or set model back."
            )
    return scored, cache


def _harmless(train: Train) -> set[str]:
    """And what is said elsewhere; and the size of micro-batches, unless statistics are taken over those. When it is evaluated
    matters where the best evaluation is looked for, and where a reference that moves scores what is to come."""
    of_others = {"loss", "loss_args", "beta"} | ({"micro_batch_size"} if train.scope == "batch" else set())
    return (_HARMLESS | of_others) - ({"eval_every"} if train.best or train.moving_reference else set())


def made_from(
    config: Config,
    objective: Objective,
    prepared: Prepared,
    scored: dict[str, Any] | None,
    start: identity.Reference,
    selection: Selection,
) -> dict[str, Any]:
    return {
        "prepared": prepared.id,
        "reference": scored["reference"]["model_id"] if scored else None,
        "numerics": scored["accepted_numerics"] if scored else None,
        "policy": identify(start, Path(config.cache))["model_id"],
        # As it is computed: a default that is said is no other run.
        "loss": objective.described,
        "rewards": {"beta": objective.beta, "per_token": objective.per_token},
        "train": config.train.model_dump(mode="json", exclude=_harmless(config.train)) | selection.identity,
    }


def examples(
    config: Config,
    objective: Objective,
    prepared: Prepared,
    scored: dict[str, Any] | None,
    cache: Cache | None,
    selection: Selection,
    progress: Progress,
) -> dict[str, Examples]:
    said: dict[str, Any] = {"density_ratio": config.train.density_ratio, "selection": selection}
    if scored is None:
        found = columns.examples(objective, prepared, None, [], **said)
    else:
        with vouched_for(config.scored):
            accepted = scored["accepted_numerics"]
            found = columns.examples(objective, prepared, cache, accepted, **said)
    for split, examples in found.items():
        for column, n in examples.left_out.items():
            why = (
                "the reference has no finite log-prob for them"
                if column.startswith("ref_")
                else f"they have no {column}"
            )
            progress.warn(f"{n:,} {split} examples are left out: {why}")
    for line in found[TRAIN].said:
        progress.say(line)
    if missing := found[TRAIN].missing_kind:
        progress.warn(
            f"none of the {len(found[TRAIN]):,} labels to train on is {missing}: nothing holds the policy against the other kind, and "
            "there are no margins and no accuracies"
        )
    if not len(found[TRAIN]):
        lacking = ", ".join(found[TRAIN].left_out)
        remedy = f"none has {lacking}; see the warnings above" if lacking else "lower prepare.held_out, or add data"
        raise DataError(f"{prepared.folder} has no example to train on: {remedy}.")
    return found
