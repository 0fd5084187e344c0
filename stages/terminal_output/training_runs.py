"""What came out of training: one run, the runs of a sweep, and what became of a model."""

import math

from rich.console import Console
from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.schema import HELD_OUT, metric_prefix
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training.run_summary import has_rewards
from prefcache.pipeline.visible_text import count, visible
from prefcache.row_layout import print_block, print_table
from prefcache.terminal_output.console import open_console, say

# Label, name among the metrics, format.
_HELD_OUT = (
    ("chosen answer more likely than rejected", "preference_accuracy", "{:.1%}"),
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def print_train(result: command_results.TrainResult) -> None:
    console, run = open_console(), result.manifest
    say(
        f"{result.run}: {run.examples:,} {run.kind}, {count(run.steps, 'step')} with loss {run.loss}, {run.seconds:.0f} s"
    )
    if run.stopped:
        say(run.stopped.describe())
    for split, n in _evaluated(run).items():
        _print_evaluation(console, run, split, n)
    shown = run.samples[:3]
    if shown:
        # Prompts of the user's own come first, whether their answers changed or not.
        some = "Among them:" if all(sample.before != sample.after for sample in shown) else "Some answers:"
        lead = some if run.changed_answers else "The answers are still:"
        console.print(f"{count(run.changed_answers, 'greedy answer')} changed. {lead}\n")
    for sample in shown:
        texts = (sample.prompt, sample.before, sample.after)
        print_block(console, ["asked", "before", "after"], [Text(visible(text) or "(nothing)") for text in texts])
        console.print()
    best = f", of step {run.best.step:,}, the best by {run.best.metric}" if run.best else ""
    say(f"model: {result.run}/model{best}")


def _evaluated(run: RunManifest) -> dict[str, int]:
    """The number of examples of each split that the run was evaluated on, held_out first, the others by name."""
    return {split: n for split, n in {HELD_OUT: run.held_out, **dict(sorted(run.evaluated.items()))}.items() if n}


def _evaluated_kind(run: RunManifest, split: str, n: int) -> str:
    return f"{n:,} held-out {run.kind}" if split == HELD_OUT else f"{n:,} {run.kind} of {split}"


def _print_evaluation(console: Console, run: RunManifest, split: str, n_examples: int) -> None:
    rows: list[tuple[str, str, str]] = []
    before, after, prefix = run.before, run.after, metric_prefix(split)
    # The answers are to prompts of the first split.
    is_first = split == next(iter(_evaluated(run)))
    if is_first and before.kinds and after.kinds and (n := sum(before.kinds.values())):
        for kind in before.kinds:
            label = f"greedy answers of {kind if kind == 'neither' else 'the ' + kind} kind (of {n:,})"
            rows.append((label, f"{before.kinds[kind] / n:.1%}", f"{after.kinds[kind] / n:.1%}"))
    for label, metric, form in _HELD_OUT:
        if (name := f"{prefix}{metric}") in after.evaluation:
            # Adding 0.0 after rounding spares the reader a "-0.000".
            old, new = (form.format(round(side.evaluation[name], 6) + 0.0) for side in (before, after))
            if metric == "rewards/accuracies" and not has_rewards(before.evaluation, prefix):
                old = "-"
            rows.append((label, old, new))
    print_table(console, [f"~{_evaluated_kind(run, split, n_examples)}", ">before", ">after"], rows)


# Label, name among the metrics, format, whether more is better in every loss.
_SWEEP = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}", True),
    ("reward margin", "rewards/margins", "{:.3f}", True),
    ("prefers chosen", "preference_accuracy", "{:.1%}", True),
    ("loss", "loss", "{:.4f}", False),
)


def print_sweep(result: command_results.SweepResult) -> None:
    """Compare the runs, the best of each column in bold. Values of different losses cannot be compared."""
    first = result.runs[0]
    held_out = [each.manifest.after.evaluation for each in result.runs]
    rows = [[Text(visible(each.run.name))] for each in result.runs]
    (split, n), *_ = _evaluated(first.manifest).items() or [(HELD_OUT, 0)]
    for _, metric, form, compares in _SWEEP:
        name = f"{metric_prefix(split)}{metric}"
        best = max(values.get(name, -math.inf) for values in held_out) if compares else math.inf
        for row, values in zip(rows, held_out, strict=True):
            text = form.format(values[name]) if name in values else "-"
            row.append(Text(text, style="bold" if values.get(name) == best else ""))
    print_table(
        open_console(), [_evaluated_kind(first.manifest, split, n), *(f">{label}" for label, *_ in _SWEEP)], rows
    )
    say(f"models: {first.run.parent}/RUN/model")


def print_merge(result: command_results.MergeResult) -> None:
    say(f"{result.output}: {result.adapter} merged into {result.base}, as {result.dtype}")
    say(
        f"{result.compared} answers' log-probs changed by {result.mean:.2g} nats a token on average, {result.largest:.2g} at most"
    )
    say(f"the adapter itself had changed them by {result.effect:.2g} on average")


def print_push(result: command_results.PushResult) -> None:
    say(f"{result.url}: {count(result.files, 'file')} of {result.run}/model, commit {result.commit}")
