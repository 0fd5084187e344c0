"""The plan of a run (`train --dry-run`): its size, its memory, and the time it needs."""

from collections.abc import Sequence

from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.visible_text import count
from prefcache.row_layout import print_table
from prefcache.terminal_output.console import open_console, say

_GIB = 1 << 30


def print_train_plan(plan: command_results.TrainPlan) -> None:
    n, m = plan.parameters, plan.trained_parameters
    trained = "all trained" if n == m else f"{m:,} trained"
    several = f" on {plan.processes} processes" if plan.processes > 1 else ""
    say(
        f"{plan.run}: {plan.examples:,} {plan.kind}, {count(plan.steps, 'step')} of {plan.batch_size}{several}, loss {plan.loss}"
    )
    say(f"{plan.model}: {n:,} parameters, {trained}")
    say(
        f"rows {plan.layout}; {plan.tokens_per_step:,} tokens a step in {plan.micro_batches_per_step:.3g} micro-batches; "
        f"longest example {plan.longest:,}"
    )
    _print_plan_memory(plan)
    say(f"arithmetic: {plan.flops / 1e15:,.3g} PFLOPs forward and backward")
    for what, flops in plan.flops_without_gradients.items():
        say(f"  {flops / 1e15:,.3g} PFLOPs forward only, for {what}")
    if plan.duration is None:
        say("time: name a GPU, as in --gpu H100 --processes 8")
    else:
        times, processes = plan.duration, f"{plan.processes} x " if plan.processes > 1 else ""
        say(f"time on {processes}{times.gpu}: at least {_duration(times.at_least_seconds)}, by its data sheet's rates")
        say(f"  {_duration(times.seconds)} at {times.mfu:.0%} of its peak (MFU), which is assumed, not measured")
    for note in plan.notes:
        say(f"not covered: {note}")


def _print_plan_memory(plan: command_results.TrainPlan) -> None:
    console = open_console()
    parts: list[Sequence[str | Text]] = [(part, f"{n_bytes / _GIB:.1f}") for part, n_bytes in plan.memory.items()]
    parts.append((Text("at its peak", style="bold"), Text(f"{plan.peak_bytes / _GIB:.1f}", style="bold")))
    print_table(console, [f"~a step with {plan.micro_batch_tokens:,} tokens a micro-batch", ">GiB"], parts)
    rows: list[Sequence[str]] = []
    for fit in plan.fits:
        size = f"{fit.memory_bytes / 1e9:.0f} GB" + (f" (here: {fit.gpu})" if fit.gpu else "")
        note = " or more" if fit.tokens == plan.most_tokens else ""
        note = ", less than the longest example" if 0 < fit.tokens < plan.longest else note
        rows.append((size, f"{fit.tokens:,}{note}" if fit.tokens else "none"))
    print_table(console, ["on a GPU of", ">tokens of a micro-batch that fit"], rows)
    rows = []
    for saving in plan.savings:
        lead = "+ " if len(saving.added) < len(saving.settings) else ""
        several = f" on {saving.processes} processes" if saving.processes > plan.processes else ""
        several += f" ({saving.tokens:,} tokens at once)" if saving.tokens != plan.micro_batch_tokens else ""
        fits = f"{saving.fits_gb} GB" if saving.fits_gb else "none"
        rows.append((f"{lead}{' '.join(saving.added)}{several}", f"{saving.peak_bytes / _GIB:.1f}", fits))
    print_table(console, ["~to need less", ">GiB", ">fits"], rows)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 172_800), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / (86_400 if unit == 'days' else size):.1f} {unit}"
    return f"{seconds:.1f} s"
