"""train: the policy alone, against the cached log-probs of its reference."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import IdentityError, UsageError
from pipeline.progress import Progress
from pipeline.schema import TRAIN
from pipeline.stored import artifact
from pipeline.stored.prepared import Prepared
from pipeline.training import (
    batches,
    best,
    checkpoints,
    measuring,
    metrics,
    moving_reference,
    origins,
    outcome,
    runfolder,
    trackers,
    watching,
)
from pipeline.training.devices import accelerator
from pipeline.training.moving_reference import MovingReference
from pipeline.training.objective import Memory, Objective
from pipeline.training.optimizers import learning_rate
from pipeline.training.policy import NotFinite, Policy, Visit, save_weights
from pipeline.training.runlog import PROVENANCE, RunLog
from pipeline.training.selection import Selection
from pipeline.training.session import Session, Trained

Report = Callable[[dict[str, Any]], None]
BEFORE = "before.json"
# Mean deviation per token between the policy at its start and the cached reference that is still rounding.
START_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
START_SAMPLE = 32
TRIED = 12  # examples on which the ways to share a forward are tried


def check(config: Config) -> None:
    """What can be refused without reading more than the config and the data's manifest."""
    origins.refuse(config, Objective(config.train), Prepared(config.prepared))


def run(config: Config, progress: Progress) -> dict[str, Any] | None:
    """The result, on the process that wrote it; None on the others."""
    objective = Objective(config.train)
    prepared = Prepared(config.prepared)
    origins.refuse(config, objective, prepared)
    selection = Selection(config.train, prepared.kind)
    reads_scores = objective.reference_answers or selection.reference_answers
    scored, cache = origins.scored(config, prepared, objective, selection) if reads_scores else (None, None)
    start = origins.start(config)
    inputs = origins.made_from(config, objective, prepared, scored, start, selection)
    moving_reference.refuse_another_start(config.train, inputs["policy"], inputs["reference"])
    devices = accelerator(config.train)
    progress = progress if devices.is_main_process else Progress(quiet=True)
    if devices.is_main_process:
        runfolder.make_room(config.run, inputs, progress)
    devices.wait_for_everyone()
    if (finished := runfolder.finished(config.run, progress)) is not None:
        watching.stop_if_strict(config, RunLog(config.run).rows("events"))
        progress.say(f"train: nothing to do, {config.run} is what this data, cache and config give")
        artifact.touch_manifest(config.run)
        return {**finished, "run": str(config.run), "changed": False} if devices.is_main_process else None

    examples = origins.examples(config, objective, prepared, scored, cache, selection, progress)
    moving_reference.refuse_never(config.train, len(examples[TRAIN]))
    like, template = examples[TRAIN].longest(TRIED), prepared.manifest["template"]
    policy = Policy(start, template, config.train, devices, like, progress.say)
    moves = config.train.moving_reference
    moving = MovingReference(config.train, objective, examples, policy, config.run) if moves else None
    session = Session(config, start, inputs, examples, cache, objective, policy, moving, RunLog(config.run), progress)
    _write_provenance(session)
    before = _before(session, scored if objective.reference_answers else None)
    state = _go_back(session)
    with _reporting(session, state["step"]) as report:
        trained = _train(session, state, report)
    return _finish(session, before, trained)


# -- the run ---------------------------------------------------------------------------------------------------------


def _write_provenance(s: Session) -> None:
    if not s.main or (s.config.run / PROVENANCE).exists():
        return
    further = [
        *(["peft"] if s.config.train.lora else []),
        *(["torchao"] if s.config.train.optimizer != "adamw" else []),
    ]
    packages = ["prefcache", "torch", "transformers", "accelerate", *further]
    facts = {
        "inputs": s.inputs,
        "model": s.config.train.model or s.config.model,
        "loss": s.objective.name,
        "loss_arguments": s.objective.described,
        "beta": s.objective.beta,
        "per_token": s.objective.per_token,
        "moving_reference": s.moving and s.moving.said,
        "versions": {name: version(name) for name in packages},
        "precision": s.policy.precision,
        "quantization": s.start.quantization,
        "device": str(s.policy.accelerator.device),
        "processes": s.policy.accelerator.num_processes,
        "sharded": s.policy.sharded,
    }
    artifact.commit_bytes(s.config.run / PROVENANCE, artifact.seal(facts))
    artifact.commit_bytes(s.config.run / "config.yaml", configuration.to_yaml(s.config).encode())


def _before(s: Session, scored: dict[str, Any] | None) -> dict[str, Any]:
    """What the policy does before it learns. A resumed run reads it: its policy is no longer the one that started."""
    path = s.config.run / BEFORE
    if path.exists():
        return artifact.unseal(path, f"Delete {s.config.run} and train again.")
    s.progress.say(
        f"train: {len(s.examples[TRAIN]):,} {s.objective.kind}, {s.n_steps} steps of {s.config.train.batch_size}, loss {s.objective.name}"
    )
    if s.objective.said:
        s.progress.say(f"train: {s.objective.said}")
    s.progress.say(
        f"train: rows {s.policy.forward.way}" + (f"; {s.policy.forward.why}" if s.policy.forward.why else "")
    )
    for note in [*s.policy.notes, *([s.moving.said] if s.moving else []), *best.notes(s.config.train)]:
        s.progress.say(f"train: {note}")
    start = _start_metrics(s, scored)
    evaluation = measuring.evaluate(s, 0, 0.0, {})
    best.refuse_unmeasured(s.config.train.best, evaluation)
    before = {"start": start, "evaluation": evaluation, "answers": measuring.answers(s)}
    if s.main:
        row = {"step": 0, "epoch": 0.0, "num_tokens": 0, **start, **measuring.eval_row(evaluation)}
        s.log.metrics(row)
        s.log.flush(0)
        artifact.commit_bytes(path, artifact.seal(before))
    s.policy.accelerator.wait_for_everyone()
    return before


def _start_metrics(s: Session, scored: dict[str, Any] | None) -> dict[str, float]:
    """Where policy and reference are the same weights, the cache must hold what the policy computes."""
    examples = s.examples[TRAIN]
    sample = np.arange(min(START_SAMPLE, len(examples)))
    visit, logged = s.policy.evaluate(examples, sample, s.objective, {})
    found = {**metrics.of_visit(visit, s.objective), **logged}
    if scored is None:
        s.progress.say("train: no reference is read, so there is nothing to check the start against")
        return found
    if s.inputs["policy"] != s.inputs["reference"]:
        s.progress.say("train: policy and reference are different weights, so the margin need not start at 0")
        return found
    gaps = [
        np.abs(metrics.log_ratio(visit, answer)) / examples.n_answer_tokens(answer, sample)
        for answer in s.objective.answers
        if answer in s.objective.reference_answers
    ]
    worst, dtypes = float(np.max(gaps)), [record["dtype"] for record in scored["numerics"].values()]
    tolerance = max(START_TOLERANCE[name] for name in [s.policy.precision, *dtypes])
    if not worst <= tolerance:
        raise IdentityError(
            f"The policy is the cached reference, yet their log-probs differ by {worst:.3g} nats per token at the start; "
            f"{tolerance} is rounding. The policy computes in {s.policy.precision}; the cache was scored with "
            f"{'; '.join(str(record) for record in scored['numerics'].values())}. Set train.precision "
            f"to the cache's, or delete {scored['cache']} and score again in this environment (make score)."
        )
    if "loss" not in found:
        raise UsageError(
            f"Loss {s.objective.name!r} has no finite value where policy and reference agree, which is where training starts. "
            "Take another, or mend it."
        )
    margin = found.get("rewards/margins", 0.0)
    s.progress.say(
        f"train: start checked on {len(sample)} {s.objective.kind}: margin {round(margin, 6) + 0.0:.6f}, "
        f"{s.objective.name} loss {found['loss']:.6f}"
    )
    return found


def _go_back(s: Session) -> dict[str, Any]:
    """The state to go on from: the newest whole checkpoint's, or the beginning's."""
    found = checkpoints.newest(s.config.run, s.progress.warn)
    step = found[1]["step"] if found else 0
    if s.main:
        checkpoints.go_back(s.config.run, step)
        s.log.go_back(step)
    s.policy.accelerator.wait_for_everyone()
    folder, state = found or (None, {"step": 0, "num_tokens": 0, "memory": {}, "best": None})
    if folder:
        s.policy.restore(folder, checkpoints.optimizer(folder))
        s.progress.say(f"train: going on from step {step}")
    if s.moving:
        s.moving.begin(folder)
    return state


def _reporting(s: Session, step: int) -> AbstractContextManager[Report]:
    """To trackers, what a row of metrics is told to."""
    return trackers.reporting(s.config, s.log.rows("metrics"), step) if s.main else nullcontext(lambda row: None)


def _train(s: Session, state: dict[str, Any], report: Report) -> Trained:
    """All steps that are left."""
    train, examples = s.config.train, s.examples[TRAIN]
    step, n_tokens, memory, found_best = state["step"], state["num_tokens"], state["memory"], state.get("best")
    began, evaluation = time.monotonic(), None
    watch, over = watching.watch(s), best.is_given_up(train.best, found_best)
    left = batches.steps(len(examples), train.batch_size, train.epochs, train.seed, step, examples.ranks)
    with s.progress.count("train", s.n_steps - step, "steps") as counter:
        while not over and (following := next(left, None)):
            step, epoch, indices = following
            if s.moving:
                s.moving.before(step)
            rate = learning_rate(step, s.n_steps, train)
            visit, logged, memory = _update(s, step, indices, memory, rate, math.ceil(epoch))
            n_tokens += examples.n_tokens(indices)
            found = metrics.of_visit(visit, s.objective)
            row = {"step": step, "epoch": epoch, **found, **logged, "learning_rate": rate}
            if batches.evaluates(step, s.n_steps, train.eval_every):
                evaluation = measuring.evaluate(s, step, epoch, memory)
                row |= measuring.eval_row(evaluation)
                found_best = best.after(train.best, found_best, step, evaluation)
            over = step == s.n_steps or best.is_given_up(train.best, found_best)
            row["num_tokens"] = n_tokens
            s.log.metrics(row)
            report(row)
            s.log.visit(step, epoch, TRAIN, examples.example_ids(indices), visit)
            stops = watching.alert(s, watch, row)
            if over or stops or step % train.checkpoint_every == 0 or best.is_of(found_best, step):
                _checkpoint(s, step, {"num_tokens": n_tokens, "memory": memory, "best": found_best})
            watching.stop_if_strict(s.config, stops)
            accuracy = f"  accuracy {found['rewards/accuracies']:.2f}" if "rewards/accuracies" in found else ""
            counter.add(1, f"loss {found['loss']:.4f}{accuracy}")
    seconds = time.monotonic() - began
    if found_best:
        evaluation = found_best["evaluation"]
    elif evaluation is None:  # resumed after the last step, there was none left to evaluate at
        evaluation = measuring.evaluate(s, step, train.epochs, memory, log=False)
    return Trained(step, seconds, found_best, evaluation)


def _update(
    s: Session, step: int, indices: np.ndarray, memory: Memory, rate: float, epoch: int
) -> tuple[Visit, dict[str, float], Memory]:
    """A step, and how fast it was. Of one that cannot be taken the batch is kept."""
    examples, began = s.examples[TRAIN], time.monotonic()
    try:
        found = s.policy.update(examples, indices, s.objective, memory, rate, epoch)
    except NotFinite as error:
        raise watching.not_taken(s, step, indices, error) from None
    seconds = time.monotonic() - began
    s.log.throughput(
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
    return found


def _checkpoint(s: Session, step: int, state: dict[str, Any]) -> None:
    weights, optimizer = s.policy.weights(), s.policy.optimizer_state()
    if s.main:
        s.log.flush(step)
        keep = s.config.train.keep_checkpoints

        def save(folder: Path) -> None:
            save_weights(folder, weights)
            if s.moving:
                s.moving.save(folder)

        checkpoints.save(s.config.run, step, save, optimizer, state, keep)
    s.policy.accelerator.wait_for_everyone()


def _finish(s: Session, before: dict[str, Any], trained: Trained) -> dict[str, Any] | None:
    if trained.best:
        _take(s, trained.best)
    answers, tokens, state = measuring.answers(s), measuring.tokens(s, trained), s.policy.model_state()
    result = outcome.commit(s, before, trained, answers, tokens, state) if s.main else None
    s.policy.accelerator.wait_for_everyone()
    return result


def _take(s: Session, found: best.Found) -> None:
    """The weights of the step that train.best has kept."""
    s.policy.load_weights(checkpoints.at(s.config.run, found["step"]))
    s.progress.say(f"train: the model is that of step {found['step']:,}, the best by {found['metric']}")
