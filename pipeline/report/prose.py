"""Write numbers and sentences as a reader wants them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefcache.pipeline.intervals import Estimate
from prefcache.pipeline.report.data_section import Data
from prefcache.pipeline.report.reference_section import Reference
from prefcache.pipeline.report.runs_section import PREFERRED, Run
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.visible_text import count

NONE = "\N{EN DASH}"
_SPLITS = {TRAIN: "training", HELD_OUT: "held-out"}


def name_split(split: str, kind: str) -> str:
    """Name a split's examples, as in `held-out pairs`."""
    return f"{_SPLITS[split]} {kind}" if split in _SPLITS else f"{kind} of {split}"


def figure(estimate: Estimate, unit: str) -> str:
    return _number(estimate.value, unit)


def interval(estimate: Estimate, unit: str) -> str:
    return f"{_number(estimate.low, unit).removesuffix(' points')} to {_number(estimate.high, unit)}"


def _number(value: float, unit: str) -> str:
    """Write a number. Unit % is a share; a + before the unit marks a difference, which keeps its sign."""
    if unit.endswith("%"):
        return f"{value:.1%}" if unit == "%" else f"{_format_signed(100 * value, 1)} points"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return (
        _format_signed(value, decimals) if unit.startswith("+") else _format_signed(value, decimals).removeprefix("+")
    )


def _format_signed(value: float, decimals: int) -> str:
    # Adding 0.0 after rounding spares the reader a "-0.000".
    return f"{round(value, decimals) + 0.0:+,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def tiny(value: float) -> str:
    """Write a deviation, which may be of any size."""
    return f"{value:.1e}" if value else "0"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# -- the summary -----------------------------------------------------------------------------------------------------


def summarize(data: Data, reference: Reference | None, runs: Sequence[Run]) -> Iterator[str]:
    if len(runs) == 1:
        yield from _describe_run(runs[0], data.kind)
    elif runs:
        yield from _compare_runs(runs, data.kind)
    quarantine = count(data.n_quarantined, "is", "are") if data.n_quarantined else "none is"
    yield (f"{count(data.records, 'record')} gave {count_by_split(data)}; {quarantine} in quarantine.")
    if reference and reference.agreements:
        shares = [
            f"{figure(each.summed, '%')} of the {name_split(each.split, 'pairs')}" for each in reference.agreements
        ]
        yield f"The reference itself prefers the chosen answer in {_join(shares)}."
    if not runs:
        yield "Nothing has been trained yet." if reference else "Nothing has been scored or trained yet."


def count_by_split(data: Data) -> str:
    """Count the examples of each split, as in `40 training and 8 held-out pairs`."""
    counts = [f"{n:,} {_SPLITS.get(split, split)}" for split, n in data.n.items()]
    return f"{_join(counts)} {data.kind}"


def _describe_run(run: Run, kind: str) -> Iterator[str]:
    manifest, facts = run.record.manifest, run.record.provenance
    loss = f"with loss {facts.loss}, beta {facts.beta:g}"
    if manifest:
        seconds = f"{manifest.seconds:,.0f} s" if manifest.seconds >= 10 else f"{manifest.seconds:.1f} s"
        state = manifest.stopped.describe() if manifest.stopped else "finished"
        yield f"The run is {state}: {count(manifest.steps, 'step')} in {seconds}, {loss}. {_describe_alerts(run)}"
    else:
        yield f"The run is not finished: it has reached step {run.step:,}, {loss}. {_describe_alerts(run)}"
    preferred, accuracy, margin = map(run.find_measure, (PREFERRED, "reward accuracy", "reward margin"))
    if preferred and preferred.before and preferred.after:
        yield (
            f"The policy finds the chosen answer likelier in {figure(preferred.after, '%')} of {run.shown.n:,} {name_split(run.shown.split, kind)} "
            f"(95% interval {interval(preferred.after, '%')}); before training, in {figure(preferred.before, '%')}."
        )
    elif accuracy and accuracy.after:
        yield (
            f"The reward accuracy on {run.shown.n:,} {name_split(run.shown.split, kind)} is {figure(accuracy.after, '%')} "
            f"(95% interval {interval(accuracy.after, '%')})."
        )
    if margin and margin.after:
        yield f"The mean reward margin is {figure(margin.after, '')} (95% interval {interval(margin.after, '')})."


def _describe_alerts(run: Run) -> str:
    if not run.record.watched:
        return "Alerts were off (train.alerts)."
    serious = [alert for alert in run.alerts if alert.severity != "note"]
    n_notes = len(run.alerts) - len(serious)
    notes = count(n_notes, "note") if n_notes else ""
    if serious:
        text = f"{count(len(serious), 'alert')}, the first at step {serious[0].step:,}: {serious[0].seen}."
        return f"{text} Also {notes}." if notes else text
    return f"No alerts were raised, only {notes}." if notes else "No alerts were raised."


def _compare_runs(runs: Sequence[Run], kind: str) -> Iterator[str]:
    unfinished = [run.name for run in runs if not run.finished]
    yield f"{len(runs)} runs compared: {', '.join(run.name for run in runs)}." + (
        f" Not finished: {', '.join(unfinished)}." if unfinished else ""
    )
    accuracies = {
        run.name: measured.after for run in runs if (measured := run.find_measure("reward accuracy")) and measured.after
    }
    if accuracies:
        highest = max(accuracies.values(), key=lambda estimate: estimate.value)
        best = [name for name, each in accuracies.items() if each.value == highest.value]
        near = [name for name, each in accuracies.items() if name not in best and each.high >= highest.low]
        overlap = f", which overlaps with that of {_join(near)}" if near else ""
        yield (
            f"{_join(best)} {'has' if len(best) == 1 else 'have'} the highest reward accuracy on {name_split(runs[0].shown.split, kind)}: "
            f"{figure(highest, '%')} (95% interval {interval(highest, '%')}){overlap}."
        )
    by_alerts: dict[str, list[str]] = {}
    for run in runs:
        by_alerts.setdefault(_describe_alerts(run), []).append(run.name)
    for text, names in by_alerts.items():
        yield f"{_join(names)}: {text}"


# -- key figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyFigure:
    """A number with its name."""

    name: str
    value: str
    note: str


_KEY_MEASURES = {
    PREFERRED: "chosen answer likelier",
    "reward accuracy": "reward accuracy",
    "reward margin": "reward margin",
}


def list_key_figures(data: Data, reference: Reference | None, runs: Sequence[Run]) -> Iterator[KeyFigure]:
    """Yield a few key numbers of a single run; without a run, of the data and the reference."""
    if len(runs) == 1:
        run = runs[0]
        for name, title in _KEY_MEASURES.items():
            measured = run.find_measure(name)
            if measured and measured.after:
                note = f"before: {figure(measured.before, measured.unit)}" if measured.before else "held out"
                yield KeyFigure(title, figure(measured.after, measured.unit), note)
        n = len(run.alerts)
        yield KeyFigure("alerts", f"{n:,}" if n else "none", "listed below" if n else "in the whole run")
        if "tokens_per_second" in run.series:
            speed = np.median(run.series["tokens_per_second"][1])
            yield KeyFigure("throughput", f"{speed:,.0f}", "tokens per second, median")
    elif not runs:
        n_evaluated = sum(n for split, n in data.n.items() if split != TRAIN)
        yield KeyFigure("training / held out", f"{data.n[TRAIN]:,} / {n_evaluated:,}", data.kind)
        yield KeyFigure("quarantine", f"{data.n_quarantined:,}", f"of {data.records:,} records")
        if reference and reference.agreements:
            best = reference.agreements[0]
            note = f"of {best.pairs:,} {name_split(best.split, 'pairs')}"
            yield KeyFigure("reference agrees with the data", figure(best.summed, "%"), note)
