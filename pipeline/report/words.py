"""Numbers as a reader wants them, and what they come to in sentences."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.report.data import Data
from pipeline.report.intervals import Estimate
from pipeline.report.reference import Reference
from pipeline.report.runs import PREFERRED, Run
from pipeline.schema import HELD_OUT, TRAIN

NONE = "\N{EN DASH}"


def figure(estimate: Estimate, unit: str) -> str:
    return _number(estimate.value, unit)


def interval(estimate: Estimate, unit: str) -> str:
    return f"{_number(estimate.low, unit).removesuffix(' points')} to {_number(estimate.high, unit)}"


def _number(value: float, unit: str) -> str:
    """`unit` % is a share; with a + before it, a difference, which has a sign."""
    if unit.endswith("%"):
        return f"{value:.1%}" if unit == "%" else f"{_signed(100 * value, 1)} points"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return _signed(value, decimals) if unit.startswith("+") else _signed(value, decimals).removeprefix("+")


def _signed(value: float, decimals: int) -> str:
    # Adding 0.0 after rounding spares the reader a "-0.000".
    return f"{round(value, decimals) + 0.0:+,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def tiny(value: float) -> str:
    """A deviation, which may be of any size."""
    return f"{value:.1e}" if value else "0"


def summary(data: Data, reference: Reference | None, runs: Sequence[Run]) -> Iterator[str]:
    if len(runs) == 1:
        yield _how_far(runs[0])
        yield from _how_well(runs[0], data.kind)
    elif runs:
        yield from _compared(runs, data.kind)
    yield _of_data(data)
    if reference:
        yield from _of_reference(reference)
    if not runs:
        yield "Nothing has been trained yet." if reference else "Nothing has been scored or trained yet."


def _how_far(run: Run) -> str:
    manifest, facts = run.record.manifest, run.record.provenance
    with_loss = f"with loss {facts['loss']}, beta {facts['beta']:g}"
    if manifest:
        took = f"{manifest['seconds']:,.0f} s" if manifest["seconds"] >= 10 else f"{manifest['seconds']:.1f} s"
        return f"The run is finished: {manifest['steps']:,} steps in {took}, {with_loss}. {alerted(run)}"
    return f"The run is not finished: it has come to step {run.step:,}, {with_loss}. {alerted(run)}"


def alerted(run: Run) -> str:
    if not run.watched:
        return "It was not watched (train.alerts is off)."
    serious = [alert for alert in run.alerts if alert["severity"] != "note"]
    notes = len(run.alerts) - len(serious)
    also = f" {_counted(notes, 'note')} beside." if notes and serious else ""
    if serious:
        first = serious[0]
        return f"{_counted(len(serious), 'alert')}, the first at step {first['step']:,}: {first['seen']}.{also}"
    return f"No alert was raised, {_counted(notes, 'note')}." if notes else "No alert was raised."


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _how_well(run: Run, kind: str) -> Iterator[str]:
    preferred, accuracy, margin = (run.of(name) for name in (PREFERRED, "reward accuracy", "reward margin"))
    on = f"On {run.held_out:,} held-out {kind}"
    if preferred and preferred.before and preferred.after:
        now = f"{figure(preferred.after, '%')} of them (95% interval {interval(preferred.after, '%')})"
        yield f"{on}, the chosen answer is the likelier one in {now}; before training it was in {figure(preferred.before, '%')}."
    elif accuracy and accuracy.after:
        yield f"{on}, the reward accuracy is {figure(accuracy.after, '%')} (95% interval {interval(accuracy.after, '%')})."
    if margin and margin.after:
        yield f"The mean reward margin there is {figure(margin.after, '')} ({interval(margin.after, '')})."


def _compared(runs: Sequence[Run], kind: str) -> Iterator[str]:
    unfinished = [run.name for run in runs if not run.finished]
    yield f"{len(runs)} runs side by side: {', '.join(run.name for run in runs)}." + (
        f" Not finished: {', '.join(unfinished)}." if unfinished else ""
    )
    of_each = {run.name: found.after for run in runs if (found := run.of("reward accuracy")) and found.after}
    if of_each:
        highest = max(each.value for each in of_each.values())
        best = [name for name, each in of_each.items() if each.value == highest]
        sure = of_each[best[0]]
        near = [name for name, each in of_each.items() if name not in best and each.high >= sure.low]
        yield (
            f"On held-out {kind}, the highest reward accuracy is {figure(sure, '%')} (95% interval {interval(sure, '%')}), of "
            f"{_listed(best)}." + (f" The intervals of {_listed(near)} overlap with that." if near else "")
        )
    for run in runs:
        yield f"{run.name}: {alerted(run)}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _of_data(data: Data) -> str:
    left_out = sum(reason.n for reason in data.quarantined)
    where = {0: "none is in quarantine", 1: "1 is in quarantine"}.get(left_out, f"{left_out:,} are in quarantine")
    return f"{data.n[TRAIN]:,} training and {data.n[HELD_OUT]:,} held-out {data.kind} came of {data.records:,} records; {where}."


def _of_reference(reference: Reference) -> Iterator[str]:
    if reference.agreements:
        shares = [f"{figure(each.whole, '%')} of the {_SPLITS[each.split]} pairs" for each in reference.agreements]
        yield f"The reference itself finds the preferred answer likelier in {' and in '.join(shares)}."


_SPLITS = {TRAIN: "training", HELD_OUT: "held-out"}


# -- at a glance -----------------------------------------------------------------------------------------------------


def glance(data: Data, reference: Reference | None, runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    """A few numbers with their names: of the run where there is one, else of what there is."""
    if len(runs) == 1:
        yield from _of_run(runs[0])
    if not runs:
        yield {"name": "training / held out", "value": f"{data.n[TRAIN]:,} / {data.n[HELD_OUT]:,}", "note": data.kind}
        n = sum(reason.n for reason in data.quarantined)
        yield {"name": "quarantine", "value": f"{n:,}", "note": f"of {data.records:,} records"}
        if reference and reference.agreements:
            best = reference.agreements[0]
            yield {
                "name": "reference agrees with the data",
                "value": figure(best.whole, "%"),
                "note": f"of {best.pairs:,} {_SPLITS[best.split]} pairs",
            }


def _of_run(run: Run) -> Iterator[dict[str, str]]:
    for name, title in (
        (PREFERRED, "chosen answer likelier"),
        ("reward accuracy", "reward accuracy"),
        ("reward margin", "reward margin"),
    ):
        measured = run.of(name)
        if measured and measured.after:
            note = f"before: {figure(measured.before, measured.unit)}" if measured.before else "held out"
            yield {"name": title, "value": figure(measured.after, measured.unit), "note": note}
    n = len(run.alerts)
    yield {"name": "alerts", "value": f"{n:,}" if n else "none", "note": "below, by step" if n else "over the run"}
    if speed := median(run, "tokens_per_second"):
        yield {"name": "throughput", "value": f"{speed:,.0f}", "note": "tokens a second, median"}


def median(run: Run, metric: str) -> float | None:
    return float(np.median(run.series[metric][1])) if metric in run.series else None


def overview(run: Run) -> dict[str, Any]:
    """A run's row among the others."""
    facts, settings = run.record.provenance, run.record.provenance["inputs"]["train"]
    speed, memory = median(run, "tokens_per_second"), run.series.get("peak_memory_bytes")
    return {
        "name": run.name,
        "loss": facts["loss"],
        "beta": f"{facts['beta']:g}",
        "steps": f"{run.step:,}",
        "batch": f"{settings['batch_size']:,}",
        "rate": f"{settings['learning_rate']:g}",
        "speed": f"{speed:,.0f}" if speed else NONE,
        "memory": f"{memory[1].max() / 2**20:,.0f} MiB" if memory else NONE,
        "state": "finished" if run.finished else f"at step {run.step:,}",
    }
