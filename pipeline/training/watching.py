"""What is done where a run goes wrong: alerts said, written and obeyed, and the batch of a step that was not taken kept."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import AlertError, IntegrityError
from pipeline.schema import TRAIN
from pipeline.stored import artifact
from pipeline.training import alerts
from pipeline.training.optimizers import warmup_steps
from pipeline.training.policy import NotFinite
from pipeline.training.session import Session

NOT_FINITE = "not-finite"  # the batches of steps that were not taken


def watch(s: Session) -> alerts.Watch | None:
    """As far as the run has come: what it says next depends on the rows on disk, whoever computed those."""
    train = s.config.train
    if train.alerts == "off":
        return None
    stop_if_strict(s.config, s.log.rows("events"))
    healthy = [sign for term in s.objective.terms if term.weight for sign in term.loss.healthy]
    watch = alerts.Watch(
        healthy,
        n_steps=s.n_steps,
        batch_size=train.batch_size,
        warmup=warmup_steps(s.n_steps, train),
        moves=train.moving_reference.every if train.moving_reference else None,
    )
    for row in s.log.rows("metrics"):
        watch.feed(row)
    return watch


def alert(s: Session, watch: alerts.Watch | None, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Say and write what a step's row raises; returns what ends a strict run."""
    found = watch.feed(row) if watch else []
    for alert in found:
        s.log.event(alert.row)
        if s.main:
            s.progress.warn(alert.line)
    stops = [row for row in (alert.row for alert in found) if _ends(s.config, row)]
    # With train.scope micro a process may see numbers of its own; all of them have to stop, or none.
    return s.policy.agreed(stops) if s.config.train.alerts == "strict" else stops


def _ends(config: Config, event: dict[str, Any]) -> bool:
    return config.train.alerts == "strict" and event["severity"] != alerts.NOTE


def stop_if_strict(config: Config, events: Iterable[dict[str, Any]]) -> None:
    if found := next((event for event in events if _ends(config, event)), None):
        raise AlertError(
            f"{config.run} raised an alert at step {found['step']}, {found['kind']}: {found['seen']}. Try: {found['try']}. "
            "train.alerts is strict, so the run ends here; what it computed is kept. Set train.alerts=warn to go on with it."
        )


def not_taken(s: Session, step: int, indices: np.ndarray, error: NotFinite) -> IntegrityError:
    """Keep the batch of a step that is not finite, and write what happened."""
    examples, file = s.examples[TRAIN], f"{NOT_FINITE}/step-{step:08}.parquet"
    ids, prompts = examples.example_ids(indices), examples.prompts(indices)[1]
    if s.main:
        known = {name: values.numpy() for name, values in examples.batch(indices, "cpu").columns.items()}
        columns = {"example_id": ids, "n_prompt": [len(prompt) for prompt in prompts], **known, **error.visit}
        artifact.commit_bytes(s.config.run / file, artifact.parquet(pa.table(columns)))
        s.log.event(alerts.not_finite(step, error.metric, error.value, file).row)
        s.log.flush(step)
    return IntegrityError(
        f"Step {step}: {error} Its batch, {len(ids)} {s.objective.kind} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}), "
        f"is in {s.config.run / file}. Lower train.learning_rate, or look at these examples."
    )


def say_how_many(s: Session, raised: Counter[str]) -> None:
    if raised:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(raised.items()))
        s.progress.warn(
            f'{raised.total()} alerts: {kinds}. All of them: prefcache sql "select * from alerts" {s.config.out}'
        )
    elif s.config.train.alerts != "off":
        s.progress.say("train: no alerts")
