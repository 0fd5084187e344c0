"""The runs of an experiment, and what of it can be removed."""

from collections.abc import Sequence

from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.schema import HELD_OUT
from prefcache.pipeline.training.removable import Removable
from prefcache.pipeline.training.run_summary import HeldOut, RunSummary
from prefcache.pipeline.visible_text import count, format_bytes, visible
from prefcache.row_layout import fits, print_table
from prefcache.terminal_output.console import open_console, say, wrap

_STATE_STYLES = {"running": "green", "unfinished": "yellow", "damaged": "bold red"}


def print_runs(result: command_results.RunsResult) -> None:
    """Print a table if it fits in the width, else some lines for each run; then what needs a sentence."""
    runs, console = result.runs, open_console()
    if not runs:
        print(wrap(f"{result.folder} has no runs yet. Train one (prefcache train CONFIG)."))
        return
    tables = map(_tabulate, (runs, runs), (True, False))
    table = next((table for table in tables if fits(console, *table)), None)
    if table is not None:
        print_table(console, *table)
    for run in runs:
        if table is None:
            _print_block(run)
        for line in _notes(run):
            print(wrap(f"{run.run}: {line}" if table is not None else f"  {line}", indent=2))
        if run.resume:  # whole, to be copied
            print(wrap(f"{run.run} resumes at step {run.steps:,}:"))
            say(f"  {run.resume}")
    n_bytes = sum(run.bytes.total for run in runs)
    n_checkpoints = sum(run.bytes.checkpoints for run in runs)
    can_go = (
        f", {format_bytes(n_checkpoints)} of it checkpoints (prefcache clean says what can go)" if n_checkpoints else ""
    )
    print(wrap(f"{count(len(runs), 'run')} of {result.folder}: {format_bytes(n_bytes)}{can_go}"))


def print_clean(result: command_results.CleanResult) -> None:
    """Print what goes, what goes only if it is named, and what is left alone."""
    if result.items:
        freed = f"Removed {format_bytes(result.bytes)}" if result.removed else f"{format_bytes(result.bytes)} can go"
        print(wrap(f"{freed} in {result.folder}:"))
        for each in result.items:
            _print_removable(each, "")
    elif not result.failed:
        print(wrap(f"{result.folder}: nothing to remove"))
    if result.optional:
        print("Kept unless named:")
    for each in result.optional:
        _print_removable(each, f" (--also {each.kind})")
    for left in result.left_alone:
        print(wrap(f"Left alone: {left.path} {left.why}", indent=2))
    if result.items and not result.removed:
        print("Nothing was removed. To remove it, add --yes.")


def _print_removable(each: Removable, option: str) -> None:
    print(wrap(f"  {format_bytes(each.bytes):>10}  {each.area}: {each.why}{option}", indent=14))
    for path in each.paths:
        print(wrap(f"              {path}", indent=14))


def _tabulate(runs: Sequence[RunSummary], is_wide: bool) -> tuple[list[str], list[list[str | Text]]]:
    """The held-out figures are those after training; a wide table has those before, the alerts and the last change as well."""
    columns = ["run", "state", ">steps", "loss", ">accuracy", ">margin", ">eval loss", ">disk"]
    columns += [">checkpoints", ">alerts", "last change"] if is_wide else []
    rows = []
    for run in runs:
        before, after = run.before, run.after
        row: list[str | Text] = [
            run.run,
            Text(run.state, style=_STATE_STYLES.get(run.state, "")),
            _steps(run),
            run.loss or "-",
            _share(after),
            _change(before if is_wide else None, after, "reward_margin", "{:.3f}"),
            _change(before if is_wide else None, after, "loss", "{:.4f}"),
            format_bytes(run.bytes.total),
        ]
        if is_wide:
            row += [
                format_bytes(run.bytes.checkpoints) if run.bytes.checkpoints else "-",
                f"{sum(run.alerts.values()):,}",
                _when(run),
            ]
        rows.append(row)
    return columns, rows


def _print_block(run: RunSummary) -> None:
    print(visible(run.run))
    steps = f"{_steps(run)} steps" + (f" with loss {run.loss}" if run.loss else "")
    print(wrap(f"  {run.state}, {steps}; last change {_when(run)}", indent=2))
    if run.after:
        margin = _change(run.before, run.after, "reward_margin", "{:.3f}")
        loss = _change(run.before, run.after, "loss", "{:.4f}")
        split = "held-out" if run.evaluated == HELD_OUT else run.evaluated
        print(wrap(f"  {split}: reward accuracy {_share(run.after)}, margin {margin}, loss {loss}", indent=2))
    parts = f"model {format_bytes(run.bytes.model)}, checkpoints {format_bytes(run.bytes.checkpoints)}"
    print(
        wrap(f"  {format_bytes(run.bytes.total)} on disk: {parts}, tables {format_bytes(run.bytes.tables)}", indent=2)
    )


def _notes(run: RunSummary) -> list[str]:
    notes = [run.note] if run.note else []
    if run.alerts:
        notes.append(
            f"{count(sum(run.alerts.values()), 'alert')}: {', '.join(f'{n} {kind}' for kind, n in run.alerts.items())}"
        )
    return notes


def _steps(run: RunSummary) -> str:
    return f"{run.steps:,}" if run.planned is None else f"{run.steps:,}/{run.planned:,}"


def _share(figures: HeldOut | None) -> str:
    return "-" if figures is None or figures.reward_accuracy is None else f"{figures.reward_accuracy:.1%}"


def _change(before: HeldOut | None, after: HeldOut | None, name: str, form: str) -> str:
    old, new = (getattr(each, name, None) for each in (before, after))
    # Adding 0.0 after rounding spares the reader a "-0.000".
    texts = [form.format(round(value, 6) + 0.0) for value in (old, new) if value is not None]
    return " to ".join(texts) or "-"


def _when(run: RunSummary) -> str:
    return f"{run.changed.astimezone():%Y-%m-%d %H:%M}" if run.changed else "-"
