"""Finish a run: write the model with its card, the samples, the tokens that moved most, and the manifest last.

Only then are the checkpoints removed: killed at any point, the run is finished, or resumes from the last of them.
"""

from collections import Counter
from typing import Any

import pyarrow as pa

from prefcache.pipeline.schema import HELD_OUT, SAMPLES, TRAIN
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import Before, Provenance, RunManifest
from prefcache.pipeline.training import (
    alert_handler,
    best_checkpoint,
    checkpoints,
    evaluate,
    existing_run,
    model_card,
    sample_answers,
    token_gains,
)
from prefcache.pipeline.training.run_context import Session, Trained
from prefcache.pipeline.training.run_log import PARTS, PROVENANCE


def finish(s: Session, before: Before, trained: Trained) -> RunManifest | None:
    """Write the run's results; return its manifest on the main process."""
    if trained.stopped:
        s.progress.say(f"train: {trained.stopped.describe()}")
    if trained.best:
        s.policy.load_weights(checkpoints.path(s.config.run, trained.best.step))
        s.progress.say(f"train: the model is that of step {trained.best.step:,}, the best by {trained.best.metric}")
    # All processes take part in these, also where only the main one writes.
    answers, tokens, state = evaluate.generate_samples(s), evaluate.token_table(s, trained), s.policy.model_state()
    manifest = _commit(s, before, trained, answers, tokens, state) if s.main else None
    if manifest is not None:
        existing_run.remove_checkpoints(s.config.run, manifest, s.progress)
    s.policy.accelerator.wait_for_everyone()
    return manifest


def _commit(
    s: Session,
    before: Before,
    trained: Trained,
    answers: list[str],
    tokens: pa.Table | None,
    state: dict[str, Any],
) -> RunManifest:
    run, kinds = s.config.run, s.config.train.kinds
    n_evaluated = {split: len(each) for split, each in s.evaluated.items()}
    provenance = Provenance.read(run / PROVENANCE, f"Delete {run} and train again.")
    card = model_card.render(
        provenance,
        kind=s.objective.kind,
        n_examples=len(s.examples[TRAIN]),
        n_steps=trained.steps,
        before=before.evaluation,
        after=trained.evaluation,
        n_evaluated=n_evaluated,
        best=trained.best,
        stopped=trained.stopped,
    )
    with artifact.commit_folder(run / "model") as folder:
        s.policy.save_model(folder, state)
        (folder / "README.md").write_text(card, encoding="utf-8")
    samples = evaluate.make_samples(s, before.answers, answers)
    table = pa.Table.from_pylist([sample.facts() for sample in samples], schema=SAMPLES)
    artifact.commit_bytes(run / sample_answers.FILE, artifact.parquet(table))
    n_by_kind = Counter(event["kind"] for event in s.log.rows("events"))
    manifest = RunManifest.make(
        steps=trained.steps,
        checkpoints=s.config.train.checkpoints_at_end,
        **({"stopped": trained.stopped} if trained.stopped else {}),
        **({"best": best_checkpoint.choose_step(trained.best)} if trained.best else {}),
        kind=s.objective.kind,
        examples=len(s.examples[TRAIN]),
        held_out=n_evaluated.pop(HELD_OUT, 0),
        evaluated=n_evaluated,
        loss=s.objective.name,
        seconds=round(trained.seconds, 3),
        start=before.start,
        changed_answers=sum(sample.before != sample.after for sample in samples),
        before={"evaluation": before.evaluation, "kinds": sample_answers.count_kinds(before.answers, kinds)},
        after={"evaluation": trained.evaluation, "kinds": sample_answers.count_kinds(answers, kinds)},
        samples=sorted(samples, key=sample_answers.how_unchanged)[:5],
        model=[artifact.describe(file) for file in sorted((run / "model").iterdir())],
        tokens=None if tokens is None else artifact.commit_file(run / token_gains.FILE, artifact.parquet(tokens)),
        alerts=dict(sorted(n_by_kind.items())),
        **{
            key: [artifact.describe(part) for part in sorted((run / table).glob("to-*.parquet"))]
            for table, key in PARTS.items()
        },
    )
    alert_handler.report_totals(s, n_by_kind)
    weights = s.start.weight_files if s.config.train.model else []
    artifact.commit_make_inputs(run, weights)
    manifest.commit(run / artifact.MANIFEST)
    return manifest
