"""The steps of a run, from the newest whole checkpoint to the last: update, evaluate, log, watch for trouble, checkpoint."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import EVALUATION, TRAIN
from prefcache.pipeline.training import alert_handler, alerts, best_checkpoint, checkpoints, dataset, evaluate, metrics
from prefcache.pipeline.training.callbacks import TrainCheckpoint, TrainEvaluation, TrainStep
from prefcache.pipeline.training.checkpoints import CheckpointState
from prefcache.pipeline.training.gradient_step import NotFinite
from prefcache.pipeline.training.objective import RunningStats
from prefcache.pipeline.training.optimizers import learning_rate
from prefcache.pipeline.training.policy import save_weights
from prefcache.pipeline.training.policy_logps import Visit
from prefcache.pipeline.training.run_context import Session, Trained

Report = Callable[[dict[str, Any]], None]


def resume(s: Session, *, continue_stopped: bool = False) -> CheckpointState:
    """Restore the newest whole checkpoint and discard what came after it; without one, start at step 0.

    A run that a callback stopped is over at its last checkpoint, unless it is to be continued.
    """
    more_files = s.moving.checkpoint_files if s.moving else lambda step: set[str]()
    newest = checkpoints.find_newest(s.config.run, s.progress.warn, more_files)
    folder, state = newest or (None, CheckpointState())
    if state.step > s.n_steps:
        raise IntegrityError(
            f"{folder} belongs to a step after the last, {s.n_steps}. Delete it, and the run resumes from the checkpoint before it."
        )
    if s.main:
        checkpoints.discard_after(s.config.run, state.step)
        s.log.discard_after(state.step)
        # Read only at the end of the run; refuse it now rather than after the last step.
        needed = [("metrics", 0), *([("steps", 0)] if s.evaluated else [])]
        needed += [("metrics", state.step), ("steps", state.step)] if folder else []
        needed += [("steps", state.best.step)] if state.best else []
        s.log.refuse_damaged(needed)
    s.policy.accelerator.wait_for_everyone()
    if folder:
        s.policy.restore(folder, checkpoints.read_optimizer(folder), state.step)
        s.progress.say(f"train: resuming from step {state.step}")
    if s.moving:
        s.moving.restore(folder)
    return replace(state, stopped=None) if continue_stopped else state


def take_steps(s: Session, state: CheckpointState, report: Report) -> Trained:
    """Take the remaining steps. `report` passes each row of metrics to the trackers."""
    train, examples = s.config.train, s.examples[TRAIN]
    began, evaluation = time.monotonic(), None
    watch = alert_handler.start_watch(s)
    is_over = state.stopped is not None or best_checkpoint.is_patience_exhausted(train.best, state.best)
    remaining = dataset.steps(
        len(examples), train.batch_size, train.epochs, train.seed, state.step, examples.ranks, train.max_steps
    )
    with s.progress.count("train", s.n_steps, "steps", done=state.step) as counter:
        while not is_over and (following := next(remaining, None)):
            step, epoch, indices = following
            if s.moving:
                s.moving.move_before(step)
            rate = learning_rate(step, s.n_steps, train)
            visit, logged, running_stats = _update(s, step, indices, state.running_stats, rate, math.ceil(epoch))
            num_tokens = state.num_tokens + examples.n_tokens(indices)
            state = replace(state, step=step, num_tokens=num_tokens, running_stats=running_stats)
            row = {"step": step, "epoch": epoch, **metrics.visit_metrics(visit, s.objective), **logged}
            row |= {"learning_rate": rate, "num_tokens": num_tokens}
            _call_after_step(s, step, epoch, row)
            # A run that a callback stops ends with an evaluation, as every run does.
            if dataset.evaluates(step, s.n_steps, train.eval_every) or s.callbacks.stop:
                evaluation = evaluate.evaluate(s, step, epoch, running_stats)
                row |= evaluate.eval_row(evaluation)
                state = replace(state, best=best_checkpoint.update(train.best, state.best, step, evaluation))
                _call_after_evaluation(s, step, epoch, row)
            s.log.add_metrics(row)
            report(row)
            s.log.add_visit(step, epoch, TRAIN, examples.example_ids(indices), visit)
            stops = alert_handler.report(s, watch, row)
            if step < s.n_steps:
                state = replace(state, stopped=s.callbacks.stop)
            is_over = step == s.n_steps or best_checkpoint.is_patience_exhausted(train.best, state.best)
            is_over = is_over or s.callbacks.ends_run
            is_best = state.best is not None and state.best.step == step
            if is_over or stops or is_best or step % train.checkpoint_every == 0:
                _save_checkpoint(s, state)
            s.callbacks.raise_failure(f"Train again to resume from step {step}, at which there is a checkpoint.")
            alerts.stop_if_strict(s.config, stops)
            accuracy = f"  accuracy {row['rewards/accuracies']:.2f}" if "rewards/accuracies" in row else ""
            counter.add(1, f"loss {row['loss']:.4f}{accuracy}")
    seconds = time.monotonic() - began
    if state.best:
        evaluation = state.best.evaluation
    elif evaluation is None:  # resumed after the last step
        evaluation = evaluate.evaluate(s, state.step, train.epochs, state.running_stats, log=False)
    return Trained(state.step, seconds, state.best, evaluation, state.stopped)


def _update(
    s: Session, step: int, indices: np.ndarray, running_stats: RunningStats, rate: float, epoch: int
) -> tuple[Visit, dict[str, float], RunningStats]:
    """Take a step and log its throughput; if it is not finite, keep its batch."""
    examples, began = s.examples[TRAIN], time.monotonic()
    try:
        result = s.policy.update(examples, indices, s.objective, running_stats, rate, epoch)
    except NotFinite as error:
        raise alert_handler.keep_batch(s, step, indices, error) from None
    seconds = time.monotonic() - began
    s.log.add_throughput(
        {
            "step": step,
            "seconds": seconds,
            "examples_per_second": len(indices) / seconds,
            "tokens_per_second": examples.n_tokens(indices) / seconds,
            "peak_memory_bytes": s.policy.peak_memory,
            "flops": s.policy.flops,
            "mfu": s.policy.flops / seconds / s.policy.peak_flops if s.policy.peak_flops else None,
        }
    )
    return result


def _call_after_step(s: Session, step: int, epoch: float, row: dict[str, Any]) -> None:
    metrics = {name: value for name, value in row.items() if name not in ("step", "epoch")}
    event = TrainStep(run=s.config.run.absolute(), step=step, n_steps=s.n_steps, epoch=epoch, metrics=metrics)
    s.callbacks.call("on_step", event)


def _call_after_evaluation(s: Session, step: int, epoch: float, row: dict[str, Any]) -> None:
    metrics = {name: value for name, value in row.items() if name.startswith(EVALUATION)}
    event = TrainEvaluation(run=s.config.run.absolute(), step=step, n_steps=s.n_steps, epoch=epoch, metrics=metrics)
    s.callbacks.call("on_evaluation", event)


def _save_checkpoint(s: Session, state: CheckpointState) -> None:
    weights, optimizer = s.policy.weights(), s.policy.optimizer_state()  # gathered by all processes

    def save(folder: Path) -> None:
        save_weights(folder, weights)
        if s.moving:
            s.moving.save(folder)

    if s.main:
        s.log.flush(state.step)
        checkpoints.save(s.config.run, save, optimizer, state, s.config.train.keep_checkpoints)
    s.policy.accelerator.wait_for_everyone()
    run = s.config.run.absolute()
    folder = checkpoints.path(run, state.step)
    s.callbacks.call("on_checkpoint", TrainCheckpoint(run=run, step=state.step, n_steps=s.n_steps, folder=folder))
