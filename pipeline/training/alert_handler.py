"""How a run responds to trouble: report and record alerts, end a strict run, and keep the batch of a step that was not taken."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import TRAIN
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.training import alerts, checkpoints
from prefcache.pipeline.training.gradient_step import NotFinite
from prefcache.pipeline.training.optimizers import warmup_steps
from prefcache.pipeline.training.run_context import Session
from prefcache.pipeline.visible_text import count

NOT_FINITE = "not-finite"  # the folder for batches of steps that were not taken


def start_watch(s: Session) -> alerts.Watch | None:
    """Return a watch that has seen the steps on disk; None if alerts are off."""
    train = s.config.train
    if train.alerts == "off":
        return None
    alerts.stop_if_strict(s.config, s.log.rows("events"))
    watch = alerts.Watch(
        (sign for term in s.objective.terms if term.weight for sign in term.loss.healthy),
        n_steps=s.n_steps,
        batch_size=train.batch_size,
        warmup=warmup_steps(s.n_steps, train),
        reference_moves_every=train.moving_reference.every if train.moving_reference else None,
    )
    for row in s.log.rows("metrics"):
        watch.feed(row)
    return watch


def report(s: Session, watch: alerts.Watch | None, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Print and log the alerts that a step raises; return the events that end a strict run."""
    raised = watch.feed(row) if watch else []
    for alert in raised:
        s.log.add_event(alert.row)
        if s.main:
            s.progress.warn(alert.line)
    stops = [alert.row for alert in raised if alerts.ends_run(s.config, alert.row)]
    # With train.scope micro, processes may see different numbers; they must all stop, or none.
    return s.policy.broadcast(stops) if s.config.train.alerts == "strict" else stops


def keep_batch(s: Session, step: int, indices: np.ndarray, error: NotFinite) -> IntegrityError:
    """Write the batch and the event of a step that is not finite; return the error to raise."""
    examples, file = s.examples[TRAIN], f"{NOT_FINITE}/step-{step:08}.parquet"
    ids, prompts = examples.example_ids(indices), examples.prompts(indices)[1]
    if s.main:
        data, n_prompt = examples.batch(indices).columns, [len(prompt) for prompt in prompts]
        columns = {"example_id": ids, "n_prompt": n_prompt, **data, **error.visit}
        artifact.commit_bytes(s.config.run / file, artifact.parquet(pa.table(columns)))
        s.log.add_event(alerts.not_finite(step, error.metric, error.value, file).row)
        s.log.flush(step)
    lost = ""
    if error.is_taken:
        more_files = [s.moving.checkpoint_files] if s.moving else []
        newest = checkpoints.find_newest(s.config.run, s.progress.warn, *more_files)
        lost = f"They are dropped; the run resumes from {newest[0] if newest else 'its start, as it has no checkpoint yet'}. "
    return IntegrityError(
        f"Step {step}: {error} {lost}Its batch, {len(ids)} {s.objective.kind} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}), "
        f"is in {s.config.run / file}. Lower train.learning_rate, or look at these examples."
    )


def report_totals(s: Session, n_by_kind: Counter[str]) -> None:
    if n_by_kind:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(n_by_kind.items()))
        s.progress.warn(
            f'{count(n_by_kind.total(), "alert")}: {kinds}. All of them: prefcache sql "select * from alerts" {s.config.out}'
        )
    elif s.config.train.alerts != "off":
        s.progress.say("train: no alerts")
