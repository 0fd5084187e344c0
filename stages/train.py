"""train: the policy alone, against the cached log-probs of its reference."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import config as configuration
from pipeline import identity
from pipeline.config import Config, Train
from pipeline.errors import AlertError, DataError, IdentityError, IntegrityError, PrefcacheError, UsageError
from pipeline.progress import Progress
from pipeline.schema import HELD_OUT, SAMPLES, TRAIN
from pipeline.stored import artifact
from pipeline.stored.cache import Cache, identify, open_scored, vouched_for
from pipeline.stored.prepared import Prepared
from pipeline.training import (
    alerts,
    batches,
    best,
    checkpoints,
    columns,
    gains,
    metrics,
    modelcard,
    moving_reference,
    runfolder,
    samples,
    trackers,
)
from pipeline.training.batches import Examples
from pipeline.training.devices import accelerator
from pipeline.training.moving_reference import MovingReference
from pipeline.training.objective import Memory, Objective
from pipeline.training.optimizers import learning_rate, warmup_steps
from pipeline.training.policy import NotFinite, Policy, Visit, save_weights
from pipeline.training.runlog import PARTS, PROVENANCE, RunLog
from pipeline.training.selection import Selection

Report = Callable[[dict[str, Any]], None]
BEFORE = "before.json"
NOT_FINITE = "not-finite"  # the batches of steps that were not taken
PREFERENCE = "preference_accuracy"
# Mean deviation per token between the policy at its start and the cached reference that is still rounding.
START_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
START_SAMPLE = 32
TRIED = 12  # examples on which the ways to share a forward are tried
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


def _harmless(train: Train) -> set[str]:
    """And what is said elsewhere; and the size of micro-batches, unless statistics are taken over those. When it is evaluated
    matters where the best evaluation is looked for, and where a reference that moves scores what is to come."""
    of_others = {"loss", "loss_args", "beta"} | ({"micro_batch_size"} if train.scope == "batch" else set())
    return (_HARMLESS | of_others) - ({"eval_every"} if train.best or train.moving_reference else set())


@dataclass
class Session:
    """What every part of a run needs."""

    config: Config
    start: identity.Reference
    inputs: dict[str, Any]
    examples: dict[str, Examples]
    cache: Cache | None
    objective: Objective
    policy: Policy
    moving: MovingReference | None
    log: RunLog
    progress: Progress

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.policy.accelerator.is_main_process)

    @property
    def n_steps(self) -> int:
        train = self.config.train
        return batches.n_steps(len(self.examples[TRAIN]), train.batch_size, train.epochs)


@dataclass(frozen=True)
class Trained:
    """What a run's steps have led to."""

    steps: int
    seconds: float
    best: best.Found | None  # None: the last step's weights are the ones that count
    evaluation: dict[str, float]  # of the weights that count


def check(config: Config) -> None:
    """What can be refused without reading more than the config and the data's manifest."""
    _refuse(config, Objective(config.train), Prepared(config.prepared))


def run(config: Config, progress: Progress) -> dict[str, Any] | None:
    """The result, on the process that wrote it; None on the others."""
    objective = Objective(config.train)
    prepared = Prepared(config.prepared)
    _refuse(config, objective, prepared)
    selection = Selection(config.train, prepared.kind)
    reads_scores = objective.reference_answers or selection.reference_answers
    scored, cache = _scored(config, prepared, objective, selection) if reads_scores else (None, None)
    start = _start(config)
    inputs = _inputs(config, objective, prepared, scored, start, selection)
    moving_reference.refuse_another_start(config.train, inputs["policy"], inputs["reference"])
    devices = accelerator(config.train)
    progress = progress if devices.is_main_process else Progress(quiet=True)
    if devices.is_main_process:
        runfolder.make_room(config.run, inputs, progress)
    devices.wait_for_everyone()
    if (finished := runfolder.finished(config.run, progress)) is not None:
        _stop_if_strict(config, RunLog(config.run).rows("events"))
        progress.say(f"train: nothing to do, {config.run} is what this data, cache and config give")
        artifact.touch_manifest(config.run)
        return {**finished, "run": str(config.run), "changed": False} if devices.is_main_process else None

    examples = _examples(config, objective, prepared, scored, cache, selection, progress)
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


# -- before any model is loaded --------------------------------------------------------------------------------------


def _refuse(config: Config, objective: Objective, prepared: Prepared) -> None:
    columns.refuse_missing(objective, prepared)
    trackers.refuse_missing(config.train.report_to)
    if config.train.best:
        best.refuse_unknown(config.train, metrics.of_evaluations(objective), len(prepared.table(HELD_OUT)))


def _start(config: Config) -> identity.Reference:
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


def _scored(
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


def _inputs(
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


def _examples(
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
    for note in [*s.policy.notes, *([s.moving.said] if s.moving else [])]:
        s.progress.say(f"train: {note}")
    start = _start_metrics(s, scored)
    evaluation = _evaluate(s, 0, 0.0, {})
    best.refuse_unmeasured(s.config.train.best, evaluation)
    before = {"start": start, "evaluation": evaluation, "answers": _answers(s)}
    if s.main:
        row = {"step": 0, "epoch": 0.0, "num_tokens": 0, **start, **_eval_row(evaluation)}
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
    watch, over = _watch(s), best.is_given_up(train.best, found_best)
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
                evaluation = _evaluate(s, step, epoch, memory)
                row |= _eval_row(evaluation)
                found_best = best.after(train.best, found_best, step, evaluation)
            over = step == s.n_steps or best.is_given_up(train.best, found_best)
            row["num_tokens"] = n_tokens
            s.log.metrics(row)
            report(row)
            s.log.visit(step, epoch, TRAIN, examples.example_ids(indices), visit)
            stops = _alert(s, watch, row)
            if over or stops or step % train.checkpoint_every == 0 or best.is_of(found_best, step):
                _checkpoint(s, step, {"num_tokens": n_tokens, "memory": memory, "best": found_best})
            _stop_if_strict(s.config, stops)
            accuracy = f"  accuracy {found['rewards/accuracies']:.2f}" if "rewards/accuracies" in found else ""
            counter.add(1, f"loss {found['loss']:.4f}{accuracy}")
    seconds = time.monotonic() - began
    if found_best:
        evaluation = found_best["evaluation"]
    elif evaluation is None:  # resumed after the last step, there was none left to evaluate at
        evaluation = _evaluate(s, step, train.epochs, memory, log=False)
    return Trained(step, seconds, found_best, evaluation)


def _update(
    s: Session, step: int, indices: np.ndarray, memory: Memory, rate: float, epoch: int
) -> tuple[Visit, dict[str, float], Memory]:
    """A step, and how fast it was. Of one that cannot be taken the batch is kept."""
    examples, began = s.examples[TRAIN], time.monotonic()
    try:
        found = s.policy.update(examples, indices, s.objective, memory, rate, epoch)
    except NotFinite as error:
        raise _not_taken(s, step, indices, error) from None
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
    answers, tokens, state = _answers(s), _tokens(s, trained), s.policy.model_state()
    result = _commit_run(s, before, trained, answers, tokens, state) if s.main else None
    s.policy.accelerator.wait_for_everyone()
    return result


def _take(s: Session, found: best.Found) -> None:
    """The weights of the step that train.best has kept."""
    folder = checkpoints.at(s.config.run, found["step"])
    s.policy.restore(folder, checkpoints.optimizer(folder))
    s.progress.say(f"train: the model is that of step {found['step']:,}, the best by {found['metric']}")


def _commit_run(
    s: Session,
    before: dict[str, Any],
    trained: Trained,
    answers: list[str],
    tokens: pa.Table | None,
    state: dict[str, Any],
) -> dict[str, Any]:
    with artifact.commit_folder(s.config.run / "model") as folder:
        s.policy.save_model(folder, state)
        (folder / "README.md").write_text(_card(s, trained, before["evaluation"]), encoding="utf-8")
    answered = _samples(s, before["answers"], answers)
    artifact.commit_bytes(s.config.run / samples.FILE, artifact.parquet(pa.Table.from_pylist(answered, schema=SAMPLES)))
    kinds = s.config.train.kinds
    raised = Counter(event["kind"] for event in s.log.rows("events"))
    summary = {
        "steps": trained.steps,
        **best.described(trained.best),
        "kind": s.objective.kind,
        "examples": len(s.examples[TRAIN]),
        "held_out": len(s.examples[HELD_OUT]),
        "loss": s.objective.name,
        "seconds": round(trained.seconds, 3),
        "start": before["start"],
        "changed_answers": sum(sample["before"] != sample["after"] for sample in answered),
        "before": {"evaluation": before["evaluation"], "kinds": samples.count_kinds(before["answers"], kinds)},
        "after": {"evaluation": trained.evaluation, "kinds": samples.count_kinds(answers, kinds)},
        "samples": sorted(answered, key=samples.how_unchanged)[:5],
        "model": [artifact.describe(file) for file in sorted((s.config.run / "model").iterdir())],
        "tokens": artifact.commit_file(s.config.run / gains.FILE, artifact.parquet(tokens))
        if tokens is not None
        else None,
        "alerts": dict(sorted(raised.items())),
        **{
            key: [artifact.describe(part) for part in sorted((s.config.run / table).glob("to-*.parquet"))]
            for table, key in PARTS.items()
        },
    }
    _say_how_many(s, raised)
    weights = s.start.weight_files if s.config.train.model else []
    artifact.commit_make_inputs(s.config.run, weights)
    artifact.commit_manifest(s.config.run, summary)
    return {**summary, "run": str(s.config.run), "changed": True}


def _tokens(s: Session, trained: Trained) -> pa.Table | None:
    """What the run moved most, token by token; None where nothing held out has moved. Every process takes part."""
    examples, last = s.examples[HELD_OUT], trained.best["step"] if trained.best else trained.steps
    by_gain = s.policy.agreed(gains.gains(s.log, last) if s.main and len(examples) else {})
    if not by_gain:
        return None
    at = {example_id: i for i, example_id in enumerate(examples.example_ids(np.arange(len(examples))))}
    indices = np.array([at[example_id] for example_id in gains.ends(by_gain)], dtype=np.int64)
    answers = [name for name in s.objective.visited if name not in s.objective.without_gradient]
    found = examples.batch(indices, "cpu", answers).answers
    sequences = {name: [each for each in of_answer if each is not None] for name, of_answer in found.items()}
    logps = s.policy.score(examples, indices, answers, tokens=True).tokens
    return gains.rows(by_gain, sequences, s.policy.tokenizer, logps, _reference_tokens(s, sequences))


def _reference_tokens(s: Session, sequences: gains.Sequences) -> dict[str, list[np.ndarray]]:
    if s.cache is None or not s.objective.reference_answers:
        return {}
    try:
        return gains.reference_tokens(s.cache, sequences, s.inputs["numerics"])
    except PrefcacheError:  # It keeps sums only, or is gone since the run began, which needs it no more.
        s.progress.say(
            f"train: {s.cache.folder} has no log-probs of single tokens: {gains.FILE} has the policy's alone"
        )
        return {}


def _card(s: Session, trained: Trained, before: dict[str, float]) -> str:
    facts = artifact.unseal(s.config.run / PROVENANCE, f"Delete {s.config.run} and train again.")
    facts |= {"kind": s.objective.kind, **best.described(trained.best)}
    counts = {"examples": len(s.examples[TRAIN]), "held_out": len(s.examples[HELD_OUT]), "steps": trained.steps}
    return modelcard.text(facts, counts, before, trained.evaluation)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _watch(s: Session) -> alerts.Watch | None:
    """As far as the run has come: what it says next depends on the rows on disk, whoever computed those."""
    train = s.config.train
    if train.alerts == "off":
        return None
    _stop_if_strict(s.config, s.log.rows("events"))
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


def _alert(s: Session, watch: alerts.Watch | None, row: dict[str, Any]) -> list[dict[str, Any]]:
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


def _stop_if_strict(config: Config, events: Iterable[dict[str, Any]]) -> None:
    if found := next((event for event in events if _ends(config, event)), None):
        raise AlertError(
            f"{config.run} raised an alert at step {found['step']}, {found['kind']}: {found['seen']}. Try: {found['try']}. "
            "train.alerts is strict, so the run ends here; what it computed is kept. Set train.alerts=warn to go on with it."
        )


def _not_taken(s: Session, step: int, indices: np.ndarray, error: NotFinite) -> IntegrityError:
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


def _say_how_many(s: Session, raised: Counter[str]) -> None:
    if raised:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(raised.items()))
        s.progress.warn(
            f'{raised.total()} alerts: {kinds}. All of them: prefcache sql "select * from alerts" {s.config.out}'
        )
    elif s.config.train.alerts != "off":
        s.progress.say("train: no alerts")


# -- what is measured ------------------------------------------------------------------------------------------------


def _evaluate(s: Session, step: int, epoch: float, memory: Memory, *, log: bool = True) -> dict[str, float]:
    """Metrics on the held-out examples, and how often the policy prefers the chosen answer by its own log-prob."""
    examples = s.examples[HELD_OUT]
    if not len(examples):
        return {}
    everything = np.arange(len(examples))
    visit, logged = s.policy.evaluate(examples, everything, s.objective, memory)
    if log:
        s.log.visit(step, epoch, HELD_OUT, examples.example_ids(everything), visit)
    preferred = metrics.preference_accuracy(visit)
    more = {} if preferred is None else {PREFERENCE: preferred}
    return {**metrics.of_visit(visit, s.objective), **logged, **more}


def _eval_row(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in evaluation.items() if name != PREFERENCE}


def _sample_indices(s: Session) -> np.ndarray:
    return np.arange(min(s.config.train.samples, len(s.examples[HELD_OUT])))


def _answers(s: Session) -> list[str]:
    indices = _sample_indices(s)
    if not len(indices) or not (s.main or s.policy.sharded):
        return []
    return s.policy.answers(s.examples[HELD_OUT].prompts(indices)[1])


def _samples(s: Session, before: list[str], after: list[str]) -> list[dict[str, Any]]:
    examples, indices = s.examples[HELD_OUT], _sample_indices(s)
    if not len(indices):
        return []
    prompts, _ = examples.prompts(indices)
    return samples.rows(examples.example_ids(indices), prompts, before, after, s.config.train.kinds)
