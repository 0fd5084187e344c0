"""What a run records and checks before its first step: its provenance, and that the policy starts where the cache says."""

from collections.abc import Iterable
from importlib.metadata import version

import numpy as np

from prefcache.pipeline import config_file, identity
from prefcache.pipeline.errors import IdentityError, UsageError
from prefcache.pipeline.schema import TRAIN
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import Before, Provenance, ScoredManifest
from prefcache.pipeline.training import best_checkpoint, evaluate, metrics, optimizers
from prefcache.pipeline.training.run_context import Session
from prefcache.pipeline.training.run_log import BEFORE, PROVENANCE

# Mean deviation per token, between the policy at its start and the cached reference, that rounding explains.
START_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
START_SAMPLE = 32


def start_tolerance(dtypes: Iterable[str | None]) -> float:
    """Return the deviation that rounding explains between values that were computed in these dtypes.

    Numerics without a dtype that we know, such as imported ones, may be as coarse as any.
    """
    coarsest = max(START_TOLERANCE.values())
    return max(START_TOLERANCE.get(name or "", coarsest) for name in dtypes)


def write_provenance(s: Session) -> None:
    if not s.main or (s.config.run / PROVENANCE).exists():
        return
    packages = ["prefcache", "torch", "transformers", "accelerate"]
    packages += ["peft"] if s.config.train.lora else []
    packages += ["torchao"] if s.config.train.optimizer != "adamw" else []
    Provenance.make(
        inputs=s.inputs,
        model=s.config.train.model or s.config.model,
        loss=s.objective.name,
        loss_arguments=s.objective.loss_arguments,
        beta=s.objective.beta,
        per_token=s.objective.per_token,
        moving_reference=s.moving and s.moving.description,
        versions={name: version(name) for name in packages},
        precision=s.policy.precision,
        head_dtype=s.policy.head_dtype,
        quantization=s.start.quantization,
        device=str(s.policy.accelerator.device),
        processes=s.policy.accelerator.num_processes,
        steps=s.n_steps,
        sharded=s.policy.sharded,
    ).commit(s.config.run / PROVENANCE)
    artifact.commit_bytes(s.config.run / "config.yaml", config_file.to_yaml(s.config).encode())


def measure_start(s: Session, scored: ScoredManifest | None) -> Before:
    """Measure the policy before the first step and record it; a resumed run reads the record."""
    path = s.config.run / BEFORE
    if path.exists():
        remedy = f"Delete {s.config.run} and train again."
        before = Before.read(path, remedy)
        evaluate.refuse_other_examples(s, before, path, remedy)
        return before
    forward, notes = s.policy.forward, [*s.policy.notes, *([s.moving.description] if s.moving else [])]
    for line in (
        f"{len(s.examples[TRAIN]):,} {s.objective.kind}, {s.n_steps} steps of {s.config.train.batch_size}, loss {s.objective.name}",
        *_warm_up_notes(s),
        *([s.objective.overrides] if s.objective.overrides else []),
        f"rows {forward.layout}" + (f"; {forward.layout_reason}" if forward.layout_reason else ""),
        *notes,
        *best_checkpoint.notes(s.config.train),
    ):
        s.progress.say(f"train: {line}")
    start = _check_start(s, scored)
    evaluation = evaluate.evaluate(s, 0, 0.0, {})
    best_checkpoint.refuse_unmeasured(s.config.train.best, evaluation)
    before = Before.make(start=start, evaluation=evaluation, answers=evaluate.generate_samples(s))
    if s.main:
        s.log.add_metrics({"step": 0, "epoch": 0.0, "num_tokens": 0, **start, **evaluate.eval_row(evaluation)})
        s.log.flush(0)
        before.commit(path)
    s.policy.accelerator.wait_for_everyone()
    return before


def _warm_up_notes(s: Session) -> list[str]:
    n_warmup = optimizers.warmup_steps(s.n_steps, s.config.train)
    if n_warmup < s.n_steps:
        return []
    highest = optimizers.learning_rate(s.n_steps, s.n_steps, s.config.train)
    return [
        f"train.warmup_steps is {n_warmup:,} and the run has {s.n_steps:,} steps: the learning rate rises to {highest:.3g} only"
    ]


def _check_start(s: Session, scored: ScoredManifest | None) -> dict[str, float]:
    """Measure a sample with the initial policy; if it is the reference, refuse a cache that holds other log-probs."""
    examples = s.examples[TRAIN]
    sample = np.arange(min(START_SAMPLE, len(examples)))
    visit, logged = s.policy.evaluate(examples, sample, s.objective, {}, "check the start")
    start = {**metrics.visit_metrics(visit, s.objective), **logged}
    if scored is None:
        s.progress.say("train: no reference is read, so there is nothing to check the start against")
        return start
    if s.inputs.policy != s.inputs.reference:
        s.progress.say("train: policy and reference are different weights, so the margin need not start at 0")
        return start
    gaps = [
        np.abs(metrics.log_ratio(visit, answer)) / examples.n_counted_tokens(answer, sample)
        for answer in s.objective.answers
        if answer in s.objective.reference_answers
    ]
    worst, dtypes = float(np.max(gaps)), list(map(identity.coarsest_dtype, scored.numerics.values()))
    tolerance = start_tolerance([s.policy.precision, s.policy.head_dtype, *dtypes])
    if not worst <= tolerance:
        raise IdentityError(
            f"The policy is the cached reference, yet their log-probs differ by {worst:.3g} nats per token at the start; "
            f"{tolerance} is rounding. The policy computes in {s.policy.precision}; the cache was scored with "
            f"{'; '.join(str(record) for record in scored.numerics.values())}. Set train.precision "
            f"to the cache's, or delete {scored.cache} and score again in this environment (prefcache score CONFIG)."
        )
    if "loss" not in start:
        raise UsageError(
            f"Loss {s.objective.name!r} has no finite value where policy and reference agree, which is where training starts. "
            "Choose another loss, or fix this one."
        )
    if other := next((dtype for dtype in dtypes if dtype and dtype != s.policy.precision), None):
        s.progress.say(
            f"train: the policy computes in {s.policy.precision}, and the cache was scored in {other}: they differ by up "
            f"to {worst:.2g} nats per token ({tolerance} is allowed), so the margin need not start at 0"
        )
    margin = start.get("rewards/margins", 0.0)
    s.progress.say(
        f"train: start checked on {len(sample)} {s.objective.kind}: margin {round(margin, 6) + 0.0:.6f}, "
        f"{s.objective.name} loss {start['loss']:.6f}"
    )
    return start
