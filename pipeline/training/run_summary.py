"""What a run has come to, as its folder tells: state, steps, held-out figures, bytes on disk.

Reads records and small tables, hashes no weights and changes nothing, so that a list of many large runs takes a moment.
"""

import datetime
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prefcache.pipeline.config_file import read_yaml
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.schema import EVALUATION, HELD_OUT, metric_prefix
from prefcache.pipeline.stored import artifact, claims, disk_usage
from prefcache.pipeline.stored.records import Before, Provenance, RunManifest
from prefcache.pipeline.training import alerts, checkpoints, existing_run
from prefcache.pipeline.training.run_log import BEFORE, PARTS, PROVENANCE, RunLog

State = Literal["finished", "stopped", "running", "unfinished", "damaged"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The figures of an evaluation that compare runs; None where a loss does not log one."""

    step: int
    reward_accuracy: float | None  # also None while there are no rewards
    reward_margin: float | None
    preference_accuracy: float | None
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class RunBytes:
    model: int
    checkpoints: int
    tables: int  # metrics, steps, events, throughput
    total: int  # of all files in the run's folder


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    run: str
    folder: Path
    state: State  # stopped: finished by a callback before its last step
    loss: str | None = None
    beta: float | None = None
    steps: int = 0  # of an unfinished run those that a checkpoint keeps, from which it resumes
    planned: int | None = None  # None: an earlier version did not record it
    evaluated: str | None = None  # the split of the figures: held_out, or a name of prepare.held_out_data
    before: HeldOut | None = None
    after: HeldOut | None = None  # of an unfinished run: its latest evaluation on disk
    alerts: dict[str, int] = field(default_factory=dict)  # by kind
    note: str | None = None  # where and why it was stopped, what ended it, what is damaged
    resume: str | None = None  # the command that resumes an unfinished run
    bytes: RunBytes
    changed: datetime.datetime | None  # when training last wrote to it


def summarize(folder: Path) -> RunSummary:
    """Summarize a run, finished or not; one whose records cannot be read is a damaged run with the reason."""
    is_running = claims.probe_holder(folder.parent, f"train-{folder.name}") is not None
    summary = RunSummary(
        run=folder.name,
        folder=folder,
        state="running" if is_running else "unfinished",
        bytes=_measure(folder),
        changed=_find_change(folder),
    )
    try:
        provenance = Provenance.read(folder / PROVENANCE, f"Move {folder} away.")
        summary = replace(summary, loss=provenance.loss, beta=provenance.beta, planned=provenance.steps)
        manifest = RunManifest.find(folder)
        return _describe_finished(summary, manifest) if manifest else _describe_unfinished(summary)
    except PrefcacheError as error:
        return replace(summary, state="running" if is_running else "damaged", note=str(error))


def _describe_finished(summary: RunSummary, manifest: RunManifest) -> RunSummary:
    split = HELD_OUT if manifest.held_out else min(manifest.evaluated, default=None)
    best, stopped = manifest.best, manifest.stopped
    note = stopped.describe() if stopped else f"the model is that of step {best.step:,}" if best else None
    damaged = _describe_damage(summary.folder / "model", manifest)
    return replace(
        summary,
        state="damaged" if damaged else "stopped" if stopped else "finished",
        steps=manifest.steps,
        planned=stopped.of if stopped else summary.planned,
        evaluated=split,
        before=_figures(0, manifest.before.evaluation, split),
        after=_figures(best.step if best else manifest.steps, manifest.after.evaluation, split),
        alerts=manifest.alerts,
        note=damaged or note,
    )


def _describe_damage(model: Path, manifest: RunManifest) -> str | None:
    """Name a file of the model that is missing or has another size; None if there is none. prefcache doctor reads the files."""
    for entry in manifest.model:
        if damage := artifact.damage(model, entry, every_byte=False):
            return f"{model / entry.file} {damage}"
    return None


def _describe_unfinished(summary: RunSummary) -> RunSummary:
    folder, is_running = summary.folder, summary.state == "running"
    log, skipped = RunLog(folder), list[str]()
    newest = checkpoints.find_newest(folder, skipped.append, every_byte=False)
    events = list(log.rows("events"))
    summary = replace(
        summary,
        steps=newest[1].step if newest else 0,
        alerts=dict(sorted(Counter(event["kind"] for event in events).items())),
        resume=None if is_running else existing_run.resume_command(folder),
        note=None if is_running else " ".join([*_explain_end(folder, events), *skipped]) or None,
    )
    if not (folder / BEFORE).exists():
        return summary
    before = Before.read(folder / BEFORE, f"Delete {folder} and train again.").evaluation
    split = _first_split(before)
    column = f"{EVALUATION}{metric_prefix(split)}loss" if split else None
    row = log.newest_row("metrics", column) if column else None
    after = {name.removeprefix(EVALUATION): value for name, value in (row or {}).items() if name.startswith(EVALUATION)}
    return replace(
        summary,
        evaluated=split,
        before=_figures(0, before, split),
        after=_figures(row["step"], after, split) if row else None,
    )


def _explain_end(folder: Path, events: list[dict[str, Any]]) -> list[str]:
    """Say what ended a run that is neither finished nor running, where an alert did."""
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    is_strict = isinstance(train := config.get("train"), dict) and train.get("alerts") == "strict"
    for event in events:
        if event["severity"] == alerts.ERROR or (is_strict and event["severity"] != alerts.NOTE):
            return [f"ended at step {event['step']:,} by the alert {event['kind']}: {event['seen']}."]
    return []


def _first_split(evaluation: Mapping[str, float]) -> str | None:
    """The split whose figures are shown: held_out, else the first by name of those that were evaluated."""
    if "loss" in evaluation:
        return HELD_OUT
    return min((name.removesuffix("_loss") for name in evaluation if name.endswith("_loss")), default=None)


def has_rewards(evaluation: Mapping[str, float], prefix: str) -> bool:
    """Tell whether the policy has left its reference: before, all rewards are 0, and their accuracy means nothing."""
    return abs(evaluation.get(f"{prefix}rewards/margins", math.inf)) >= 1e-4


def _figures(step: int, evaluation: Mapping[str, float], split: str | None) -> HeldOut | None:
    if split is None or not evaluation:
        return None
    prefix = metric_prefix(split)

    def find(name: str) -> float | None:
        value = evaluation.get(f"{prefix}{name}")
        return value if value is not None and math.isfinite(value) else None

    return HeldOut(
        step=step,
        reward_accuracy=find("rewards/accuracies") if has_rewards(evaluation, prefix) else None,
        reward_margin=find("rewards/margins"),
        preference_accuracy=find("preference_accuracy"),
        loss=find("loss"),
    )


def _measure(folder: Path) -> RunBytes:
    return RunBytes(
        model=disk_usage.measure(folder / "model"),
        checkpoints=disk_usage.measure(folder / checkpoints.FOLDER, folder / checkpoints.MOVING_REFERENCE),
        tables=disk_usage.measure(*(folder / table for table in PARTS)),
        total=disk_usage.measure(folder),
    )


def _find_change(folder: Path) -> datetime.datetime | None:
    """When training last wrote; a report or a merged model that was made later does not count."""
    names = (PROVENANCE, BEFORE, "model", checkpoints.FOLDER, *PARTS)
    changed = disk_usage.newest_change(folder / name for name in names)
    return None if changed is None else datetime.datetime.fromtimestamp(changed, datetime.UTC)
