"""train: the policy alone, against the cached log-probs of its reference."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from prefcache.command_results import Duration, GpuFit, Saving, TrainPlan, TrainResult
from prefcache.pipeline import model_files
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import PrefcacheError, UsageError
from prefcache.pipeline.preparing import prepared_inputs, sample_prompts
from prefcache.pipeline.process_pool import rank_and_world
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.schema import EVALUATION, TRAIN
from prefcache.pipeline.stored import artifact, claims
from prefcache.pipeline.stored.gguf_conversion import convert_models
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Before, RunManifest
from prefcache.pipeline.training import alerts, existing_run, loss_columns, run_inputs
from prefcache.pipeline.training.callbacks import Callbacks, TrainCallback, TrainEnd, TrainStart, refuse_others
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.run_log import RunLog
from prefcache.pipeline.training.sample_answers import Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from prefcache.pipeline.training.checkpoints import CheckpointState
    from prefcache.pipeline.training.run_context import Session, Trained

TRIED = 12  # examples on which the ways to share a forward are tried


def check(config: Config) -> None:
    """Refuse what the config, the installed packages and the data's manifest alone show to be wrong."""
    from prefcache.pipeline.training import best_checkpoint, metrics, optimizers, trackers

    objective, prepared = Objective(config.train), Prepared(config.prepared)
    loss_columns.refuse_missing(objective, prepared)
    if config.train.samples_from is not None:
        sample_prompts.read_prompts(Path(config.train.samples_from))
    optimizers.refuse_missing(config.train)
    trackers.refuse_missing(config.train.report_to)
    if config.train.best:
        evaluation = metrics.example_evaluation(objective)
        evaluated = [split for split in prepared.manifest.splits if split != TRAIN and len(prepared.table(split))]
        best_checkpoint.refuse_unknown(config.train, evaluation, evaluated)


def estimate(config: Config, progress: Progress, gpu: str | None, processes: int) -> TrainPlan:
    """Say what the run would take, without scores, weights or a GPU, and change nothing."""
    from prefcache.pipeline.training import run_estimate

    check(config)
    chosen = run_estimate.choose_gpu(gpu)
    progress.say("train: tracing a step of this model as on a GPU; nothing is trained")
    with working("trace a step"):
        found = run_estimate.RunEstimate(config, chosen, processes)
    plan, (parameters, trained), (flops, passes) = found.plan, found.parameters, found.flops
    sizes: list[tuple[str | None, int]] = [(None, size * 10**9) for size in run_estimate.SIZES]
    sizes += [(here.name, here.total_memory) for here in run_estimate.find_gpus_here()]
    times = found.times()
    return TrainPlan(
        run=config.run,
        model=config.train.model or config.model,
        parameters=parameters,
        trained_parameters=trained,
        loss=plan.objective.name,
        kind=plan.objective.kind,
        examples=len(plan.examples),
        steps=plan.steps,
        batch_size=config.train.batch_size,
        layout=plan.layout,
        processes=processes,
        longest=plan.longest,
        tokens_per_step=round(plan.step.tokens),
        micro_batches_per_step=plan.step.micro_batches,
        micro_batch_tokens=plan.step.largest_micro_batch,
        memory=vars(found.step.parts),
        peak_bytes=found.step.peak_bytes,
        most_tokens=found.most_tokens,
        fits=[GpuFit(name, int(size), found.tokens_that_fit(size)) for name, size in sizes],
        savings=[Saving(**vars(saving)) for saving in found.savings()],
        flops=flops,
        flops_without_gradients=passes,
        duration=Duration(times.gpu.name, times.at_least_seconds, times.mfu, times.seconds) if times else None,
        notes=found.notes,
    )


def run(
    config: Config,
    progress: Progress,
    callbacks: Sequence[TrainCallback] = (),
    *,
    continue_stopped: bool = False,
) -> TrainResult | None:
    """Return the result on the process that wrote it, None on the others.

    `continue_stopped` takes the remaining steps of a run that a callback stopped.
    """
    refuse_others(callbacks)
    rank, world = rank_and_world()
    is_main = rank == 0
    if is_main:
        prepared_inputs.warn_if_stale(config, progress)
    convert_models(config, progress)
    # Several processes may each see another folder: only together they know whether the run is finished.
    finished = _find_finished(config) if world == 1 else None
    if finished is not None and not (continue_stopped and finished.stopped):
        return _report_finished(config, finished, progress, is_main=is_main)
    # Imported only now: a finished run is recognized without accelerate and transformers, which take seconds.
    with working("load PyTorch and Transformers"):
        from prefcache.pipeline.training.distributed import make_accelerator

        devices = make_accelerator(config.train)
    if not devices.is_main_process:
        with Progress(silent=True) as silent:
            return _train(config, devices, silent, callbacks, continue_stopped)
    # The main process outlasts the others' work and claims the run for all of them.
    remedy = "name another run (--set train.run=NAME)"
    with claims.claim_stage(config.run.parent, f"train-{config.run.name}", remedy):
        return _train(config, devices, progress, callbacks, continue_stopped)


def _find_finished(config: Config) -> RunManifest | None:
    """Return the manifest of the run if it is finished, undamaged and what data, cache and config give now.

    Not if checkpoints wait to be removed: that is done under the claim.
    """
    if not (config.run / artifact.MANIFEST).exists():
        return None
    try:
        inputs = run_inputs.collect(config).inputs
        manifest = RunManifest.find(config.run) if existing_run.check(config.run, inputs).is_fresh else None
        return None if manifest and existing_run.is_removal_unfinished(config.run, manifest) else manifest
    except PrefcacheError:
        return None  # reported under the claim, where no other command is at work on the experiment


def _report_finished(config: Config, finished: RunManifest, progress: Progress, *, is_main: bool) -> TrainResult | None:
    alerts.stop_if_strict(config, RunLog(config.run).rows("events"))
    if not is_main:
        return None
    artifact.touch_manifest(config.run)
    progress.say(f"train: nothing to do, {config.run} is what this data, cache and config give")
    if finished.stopped:
        remedy = "Take the remaining steps with prefcache.train(..., continue_stopped=True)."
        remedy = remedy if existing_run.has_checkpoint(config.run) else "It has no checkpoint to be continued from."
        progress.say(f"train: it was {finished.stopped.describe()}. {remedy}")
    return TrainResult(manifest=finished, run=config.run, changed=False)


def _train(
    config: Config,
    devices: "Accelerator",
    progress: Progress,
    callbacks: Sequence[TrainCallback],
    continue_stopped: bool,
) -> TrainResult | None:
    with working("load PyTorch and Transformers"):
        from prefcache.pipeline.training import (
            cache_join,
            finalize_run,
            moving_reference,
            process_agreement,
            run_images,
            start_check,
            trackers,
            train_loop,
        )
        from prefcache.pipeline.training.policy import Policy
        from prefcache.pipeline.training.run_context import Session

    check(config)
    setup = run_inputs.collect(config)
    objective = setup.objective

    def open_folder() -> None:
        existing_run.make_room(config.run, setup.inputs, progress)
        if continue_stopped:
            existing_run.reopen_stopped(config.run)

    process_agreement.call_on_main(devices, open_folder)
    existing_run.retract_damaged(config.run, progress)
    # Another process may have finished the run before this one had the claim.
    if (finished := process_agreement.share(devices, RunManifest.find(config.run))) is not None:
        if devices.is_main_process:
            existing_run.remove_checkpoints(config.run, finished, progress)
        return _report_finished(config, finished, progress, is_main=devices.is_main_process)
    process_agreement.refuse_disagreement(config, setup.inputs, devices, progress)
    own_prompts = _read_own_prompts(config, setup)
    examples = cache_join.load_examples(setup, progress)
    moving_reference.refuse_never(config.train, len(examples[TRAIN]))
    images = run_images.find(
        setup.start, config.train, setup.prepared, examples, devices, config.cache_folder, progress
    )
    longest, template = examples[TRAIN].longest(TRIED), setup.prepared.manifest.template
    with working("set up the policy"):
        policy = Policy(setup.start, template, config.train, devices, longest, progress.say, images)
    moving = None
    if config.train.moving_reference:
        moving = moving_reference.MovingReference(config.train, objective, examples, policy, config.run)
    log = RunLog(config.run)
    s = Session(
        *(config, setup.start, setup.inputs, examples, setup.cache, objective, policy, moving, log, progress),
        callbacks=Callbacks(callbacks, devices.is_main_process, policy.broadcast),
        own_prompts=own_prompts,
    )
    start_check.write_provenance(s)
    before = start_check.measure_start(s, setup.scored if objective.reference_answers else None)
    state = train_loop.resume(s, continue_stopped=continue_stopped)
    _call_at_start(s, state, before)
    tracking = trackers.reporting(config, log.rows("metrics"), state.step) if s.main else nullcontext(lambda row: None)
    with tracking as report:
        trained = train_loop.take_steps(s, state, report)
    manifest = finalize_run.finish(s, before, trained)
    _call_at_end(s, trained)
    return TrainResult(manifest=manifest, run=config.run, changed=True) if manifest else None


def _call_at_start(s: "Session", state: "CheckpointState", before: Before) -> None:
    metrics = {f"{EVALUATION}{name}": value for name, value in before.evaluation.items()}
    event = TrainStart(run=s.config.run.absolute(), step=state.step, n_steps=s.n_steps, metrics=metrics)
    s.callbacks.call("on_start", event)
    s.callbacks.raise_failure("No step was taken. Train again to start from there.")


def _call_at_end(s: "Session", trained: "Trained") -> None:
    event = TrainEnd(
        run=s.config.run.absolute(),
        step=trained.steps,
        n_steps=s.n_steps,
        metrics={f"{EVALUATION}{name}": value for name, value in trained.evaluation.items()},
        model=s.config.run.absolute() / "model",
        stopped=trained.stopped is not None,
    )
    s.callbacks.call("on_end", event)
    s.callbacks.raise_failure(f"The run is finished, and its model is in {event.model}.")


def _read_own_prompts(config: Config, setup: run_inputs.RunSetup) -> list[Prompt]:
    """Encode the prompts of train.samples_from as those of the data are. The stage does it: training knows no templates."""
    if config.train.samples_from is None:
        return []
    encoded = sample_prompts.encode_prompts(
        Path(config.train.samples_from), setup.start.tokenizer, setup.prepared.manifest
    )
    most = model_files.longest_sequence(setup.start.folder)
    for number, (_, ids) in enumerate(encoded, start=1):
        if len(ids) >= most:
            raise UsageError(
                f"train.samples_from: {config.train.samples_from}, prompt {number} has {len(ids):,} tokens, and the model takes "
                f"{most:,} with the answer. Shorten it."
            )
    return [Prompt.make_own(text, ids) for text, ids in encoded]
