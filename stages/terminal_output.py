"""What a person reads at the end of a command, on stdout: `print_result` for what a stage returned, the rest for lists."""

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import singledispatch
from itertools import islice
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefcache import command_results, row_layout
from prefcache.pipeline.config_settings import Setting
from prefcache.pipeline.schema import HELD_OUT, metric_prefix
from prefcache.pipeline.stored.prepared import DONE
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.visible_text import count, visible, visible_pieces
from prefcache.row_layout import start_table

if TYPE_CHECKING:
    from prefcache.pipeline.model.architectures import Table as Architectures
    from prefcache.pipeline.preparing.formats import Format
    from prefcache.pipeline.questions import Question
    from prefcache.pipeline.training.losses import Loss

_PIPE_WIDTH = 100
_GIB = 1 << 30


@singledispatch
def print_result(result: Any) -> None:
    raise TypeError(f"no table for a {type(result).__name__}")


# -- before the stages -----------------------------------------------------------------------------------------------


@print_result.register
def _print_converted(result: command_results.ConvertResult) -> None:
    """Print the config on stdout unless it went to a file, and what became of each key on stderr."""
    titles = {"": result.became, "has no meaning here: ": result.ignored, "DIFFERS: ": result.differs}
    for title, entries in titles.items():
        for theirs, ours in entries.items():
            print(visible(f"{theirs}: {title}{ours}"), file=sys.stderr)
    if result.output is None:
        print(result.config_text(), end="")


# -- from data to a model --------------------------------------------------------------------------------------------


@print_result.register
def _print_waiting(result: command_results.PrepareWaiting) -> None:
    _say(
        f"{result.prepared}: {result.finished:,} of {result.parts:,} parts are finished. The other machines (RANK, WORLD_SIZE) "
        "prepare the rest; whichever finishes last assembles the parts"
    )


@print_result.register
def _print_prepare(result: command_results.PrepareResult) -> None:
    counts = {"training": result.train, "held-out": result.held_out} | result.evaluation
    *others, last = (f"{n:,} {name}" for name, n in counts.items())
    _say(
        f"{result.prepared}: {', '.join(others)} and {last} {result.kind} "
        f"of {result.records:,} records, {sum(result.quarantined.values()):,} in quarantine"
    )
    for reason, n in result.quarantined.items():
        _say(f"  {n:,} {reason}")
    for name, n in result.done.items():
        if name in DONE:
            _say(f"  {n:,} {DONE[name]}")
    if split := result.boundaries.get("split"):
        _say(f"  {split:,} where the tokenizer would merge prompt and answer; the text was cut there (boundary: split)")
    if result.date:
        _say(f"  the template prints the date: always {result.date} (prepare.date)")


def _cache_line(result: command_results.ScoreResult | command_results.ScorePlan) -> str:
    line = f"{result.cache}: {count(result.sequences, 'sequence')}, {result.cached_before:,} already cached"
    return line + (f" ({result.cut_from_longer:,} cut from longer ones)" if result.cut_from_longer else "")


@print_result.register
def _print_score(result: command_results.ScoreResult) -> None:
    _say(f"{_cache_line(result)}, {result.scored:,} scored now ({count(result.tokens, 'token')})")
    if result.failed:
        _say(f"  {result.failed:,} have no finite log-prob; pairs with them are left out of training")


@print_result.register
def _print_score_plan(plan: command_results.ScorePlan) -> None:
    tokens = f"{count(plan.tokens, 'token')}, at most {plan.bytes:,} bytes"
    _say(f"{_cache_line(plan)}, {plan.to_score:,} to score ({tokens})")
    for numerics_id, n in plan.other_numerics.items():
        _say(f"  {n:,} of these are cached under other numerics, {numerics_id}")


@print_result.register
def _print_score_files(result: command_results.ScoreFilesResult) -> None:
    print_result(result.scored)
    print_result(result.exported)


# Label, name among the metrics, format.
_HELD_OUT = (
    ("chosen answer more likely than rejected", "preference_accuracy", "{:.1%}"),
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


@print_result.register
def _print_train(result: command_results.TrainResult) -> None:
    console, run = _console(), result.manifest
    _say(
        f"{result.run}: {run.examples:,} {run.kind}, {count(run.steps, 'step')} with loss {run.loss}, {run.seconds:.0f} s"
    )
    if run.stopped:
        _say(run.stopped.describe())
    for split, n in _evaluated(run).items():
        console.print(_evaluation_table(run, split, n))
    shown = run.samples[:3]
    if shown:
        # Prompts of the user's own come first, whether their answers changed or not.
        some = "Among them:" if all(sample.before != sample.after for sample in shown) else "Some answers:"
        lead = some if run.changed_answers else "The answers are still:"
        console.print(f"{count(run.changed_answers, 'greedy answer')} changed. {lead}\n")
    for sample in shown:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for label, text in (("asked", sample.prompt), ("before", sample.before), ("after", sample.after), ("", "")):
            table.add_row(label, Text(visible(text) or ("(nothing)" if label else "")))
        console.print(table)
    best = f", of step {run.best.step:,}, the best by {run.best.metric}" if run.best else ""
    _say(f"model: {result.run}/model{best}")


@print_result.register
def _print_train_plan(plan: command_results.TrainPlan) -> None:
    n, m = plan.parameters, plan.trained_parameters
    trained = "all trained" if n == m else f"{m:,} trained"
    several = f" on {plan.processes} processes" if plan.processes > 1 else ""
    _say(
        f"{plan.run}: {plan.examples:,} {plan.kind}, {count(plan.steps, 'step')} of {plan.batch_size}{several}, loss {plan.loss}"
    )
    _say(f"{plan.model}: {n:,} parameters, {trained}")
    _say(
        f"rows {plan.layout}; {plan.tokens_per_step:,} tokens a step in {plan.micro_batches_per_step:.3g} micro-batches; "
        f"longest example {plan.longest:,}"
    )
    _print_plan_memory(plan)
    _say(f"arithmetic: {plan.flops / 1e15:,.3g} PFLOPs forward and backward")
    for what, flops in plan.flops_without_gradients.items():
        _say(f"  {flops / 1e15:,.3g} PFLOPs forward only, for {what}")
    if plan.duration is None:
        _say("time: name a GPU, as in --gpu H100 --processes 8")
    else:
        times, processes = plan.duration, f"{plan.processes} x " if plan.processes > 1 else ""
        _say(f"time on {processes}{times.gpu}: at least {_duration(times.at_least_seconds)}, by its data sheet's rates")
        _say(f"  {_duration(times.seconds)} at {times.mfu:.0%} of its peak (MFU), which is assumed, not measured")
    for note in plan.notes:
        _say(f"not covered: {note}")


def _print_plan_memory(plan: command_results.TrainPlan) -> None:
    console = _console()
    table = start_table(f"a step with {plan.micro_batch_tokens:,} tokens a micro-batch", ">GiB")
    for part, n_bytes in plan.memory.items():
        table.add_row(part, f"{n_bytes / _GIB:.1f}")
    table.add_row(Text("at its peak", style="bold"), Text(f"{plan.peak_bytes / _GIB:.1f}", style="bold"))
    console.print(table)
    table = start_table("on a GPU of", ">tokens of a micro-batch that fit")
    for fit in plan.fits:
        size = f"{fit.memory_bytes / 1e9:.0f} GB" + (f" (here: {fit.gpu})" if fit.gpu else "")
        note = " or more" if fit.tokens == plan.most_tokens else ""
        note = ", less than the longest example" if 0 < fit.tokens < plan.longest else note
        table.add_row(size, f"{fit.tokens:,}{note}" if fit.tokens else "none")
    console.print(table)
    table = start_table("to need less", ">GiB", ">fits")
    for saving in plan.savings:
        lead = "+ " if len(saving.added) < len(saving.settings) else ""
        several = f" on {saving.processes} processes" if saving.processes > plan.processes else ""
        several += f" ({saving.tokens:,} tokens at once)" if saving.tokens != plan.micro_batch_tokens else ""
        fits = f"{saving.fits_gb} GB" if saving.fits_gb else "none"
        table.add_row(f"{lead}{' '.join(saving.added)}{several}", f"{saving.peak_bytes / _GIB:.1f}", fits)
    console.print(table)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 172_800), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / (86_400 if unit == 'days' else size):.1f} {unit}"
    return f"{seconds:.1f} s"


def _evaluated(run: RunManifest) -> dict[str, int]:
    """The number of examples of each split that the run was evaluated on, held_out first, the others by name."""
    return {split: n for split, n in {HELD_OUT: run.held_out, **dict(sorted(run.evaluated.items()))}.items() if n}


def _evaluated_kind(run: RunManifest, split: str, n: int) -> str:
    return f"{n:,} held-out {run.kind}" if split == HELD_OUT else f"{n:,} {run.kind} of {split}"


def _evaluation_table(run: RunManifest, split: str, n_examples: int) -> Table:
    table = start_table(_evaluated_kind(run, split, n_examples), ">before", ">after")
    before, after, prefix = run.before, run.after, metric_prefix(split)
    # The answers are to prompts of the first split.
    is_first = split == next(iter(_evaluated(run)))
    if is_first and before.kinds and after.kinds and (n := sum(before.kinds.values())):
        for kind in before.kinds:
            label = f"greedy answers of {kind if kind == 'neither' else 'the ' + kind} kind (of {n:,})"
            table.add_row(label, f"{before.kinds[kind] / n:.1%}", f"{after.kinds[kind] / n:.1%}")
    for label, metric, form in _HELD_OUT:
        if (name := f"{prefix}{metric}") in after.evaluation:
            # Adding 0.0 after rounding spares the reader a "-0.000".
            old, new = (form.format(round(side.evaluation[name], 6) + 0.0) for side in (before, after))
            # Before the first step all rewards are 0, so their accuracy means nothing.
            if metric == "rewards/accuracies" and abs(before.evaluation[f"{prefix}rewards/margins"]) < 1e-4:
                old = "-"
            table.add_row(label, old, new)
    return table


# Label, name among the metrics, format, whether more is better in every loss.
_SWEEP = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}", True),
    ("reward margin", "rewards/margins", "{:.3f}", True),
    ("prefers chosen", "preference_accuracy", "{:.1%}", True),
    ("loss", "loss", "{:.4f}", False),
)


@print_result.register
def _print_sweep(result: command_results.SweepResult) -> None:
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
    table = start_table(_evaluated_kind(first.manifest, split, n), *(f">{label}" for label, *_ in _SWEEP))
    for row in rows:
        table.add_row(*row)
    _console().print(table)
    _say(f"models: {first.run.parent}/RUN/model")


@print_result.register
def _print_merge(result: command_results.MergeResult) -> None:
    _say(f"{result.output}: {result.adapter} merged into {result.base}, as {result.dtype}")
    _say(
        f"{result.compared} answers' log-probs changed by {result.mean:.2g} nats a token on average, {result.largest:.2g} at most"
    )
    _say(f"the adapter itself had changed them by {result.effect:.2g} on average")


@print_result.register
def _print_push(result: command_results.PushResult) -> None:
    _say(f"{result.url}: {count(result.files, 'file')} of {result.run}/model, commit {result.commit}")


# -- what is in it ---------------------------------------------------------------------------------------------------

_CUT_STYLE = "strike red"
# Adjacent tokens alternate between two colours.
_TOKEN_COLOURS = {"prompt": ("blue", "cyan"), "rejected": ("yellow", "bright_yellow")}
_ANSWER_COLOURS = ("green", "bright_green")


def print_preview(result: command_results.PreviewResult, ids: bool) -> None:
    """Print tokens in alternating colours, with special and cut ones in colours of their own, and dim what does not count."""
    console = _console()
    for example in result.examples:
        console.print(Text(visible(f"{example.source}, line {example.line}"), style="bold"))
        if isinstance(example, command_results.PreviewUnusable):
            reason = f"{example.reason}: {example.detail}" if example.detail else example.reason
            console.print(Text(visible(f"  to quarantine: {reason}\n"), style="red"))
            continue
        facts = [f"boundary {example.boundary}"]
        facts += ["plain text as one turn of the chat template (prepare.template)"] if example.plain_text else []
        facts += [f"label {str(example.label).lower()}"] if example.label is not None else []
        facts += [f"{example.cut_prompt:,} tokens of its oldest turns left out"] if example.cut_prompt else []
        console.print(Text("  " + ", ".join(facts), style="dim"))
        for part in example.parts:
            facts = [f"{part.n_tokens:,} tokens"]
            facts += (
                [f"{part.n_counted:,} of them count"]
                if part.name != "prompt" and part.n_counted < part.n_tokens
                else []
            )
            facts += [f"{part.n_cut:,} more cut"] if part.n_cut else []
            console.print(Text(f"  {part.name} ({', '.join(facts)})", style="bold"))
            if part.cut_turns:
                console.print(Text(visible(part.cut_turns), style=_CUT_STYLE))
            console.print(_preview_text(part))
            if ids:
                console.print(Text(" ".join(str(token.id) for token in part.tokens if not token.cut), style="dim"))
        console.print()


def _preview_text(part: command_results.PreviewPart) -> Text:
    text = Text()
    colours = _TOKEN_COLOURS.get(part.name, _ANSWER_COLOURS)
    for n, (token, piece) in enumerate(zip(part.tokens, _visible_tokens(part.tokens), strict=True)):
        if n == part.n_tokens:
            text.append("[cut here]", style="bold red")
        style = _CUT_STYLE if token.cut else "reverse magenta" if token.special else colours[n % 2]
        style = style if token.counts or token.cut or part.name == "prompt" else f"dim {style}"
        text.append(piece, style=style)
    return text


def _visible_tokens(tokens: Sequence[command_results.PreviewToken | command_results.ShowToken]) -> list[str]:
    """Mark line ends and tabs as well, which take part in the layout."""
    pieces = visible_pieces([token.text for token in tokens])
    return [piece.replace("\n", "\u23ce\n").replace("\t", "\u21e5\t") for piece in pieces]


# What colours a token: the first of these that every token has. With one model only, how surprised that model was.
_COLOURED_BY = {
    "log_ratio": "green: the policy finds the token likelier than the reference does; red: less likely",
    "reference": "red: the reference did not expect the token",
    "policy": "red: the policy does not expect the token",
}
_N_LISTED = 5


@print_result.register
def _print_show(result: command_results.ShowResult) -> None:
    """Colour the tokens, and list those that differ most: pipes and some readers lack colours."""
    console = _console()
    label = "" if result.label is None else f", label {str(result.label).lower()}"
    where = f"{result.example_id}, {result.split}: {result.source}, line {result.line}{label}"
    console.print(Text(visible(where), style="bold"))
    console.print(Text(f"{visible(result.prompt)}\n", style="dim"))
    tokens = [token for answer in result.answers for token in answer.tokens if token.counts]
    name = next((name for name in _COLOURED_BY if all(getattr(token, name) is not None for token in tokens)), None)
    full = max((abs(getattr(token, name)) for token in tokens), default=0.0) if name else 0.0
    for answer in result.answers:
        sums = {"policy": answer.policy_sum, "reference": answer.reference_sum, "log-ratio": answer.log_ratio_sum}
        facts = ", ".join(f"{label} {value:.3f}" for label, value in sums.items() if value is not None)
        count = f", of which {answer.n_counted:,} count" if answer.n_counted < answer.n_tokens else ""
        title = f"{answer.name} ({answer.n_tokens:,} tokens{count}{f': {facts}' if facts else ''})"
        console.print(Text(title, style="bold"))
        values = [getattr(token, name) if name and token.counts else 0.0 for token in answer.tokens]
        console.print(_coloured_text(answer.tokens, values, full))
        if name:
            form = "{:+.2f}" if name == "log_ratio" else "{:.2f}"
            counted = [pair for pair in zip(answer.tokens, values, strict=True) if pair[0].counts]
            most = sorted(counted, key=lambda pair: -abs(pair[1]))[:_N_LISTED]
            listed = ", ".join(f"{visible(repr(token.text))} {form.format(value)}" for token, value in most)
            console.print(Text(f"most: {listed}", style="dim"))
        console.print()
    legend = [f"{_COLOURED_BY[name]}; full colour at {full:.2f} nats."] if name else []
    legend += [] if result.scored else ["The reference has not been scored (prefcache score CONFIG)."]
    legend += ["No run of that name has a model yet (prefcache train CONFIG)."] if result.run is None else []
    for line in legend:
        console.print(Text(line, style="dim"))


def _coloured_text(tokens: Sequence[command_results.ShowToken], values: Sequence[float], full: float) -> Text:
    """Print black on a coloured ground, which is readable on a dark and on a light terminal."""
    text = Text()
    for token, piece, value in zip(tokens, _visible_tokens(tokens), values, strict=True):
        strength = min(abs(value) / full, 1.0) if full else 0.0
        pale, strong = round(235 - 125 * strength), round(255 - 50 * strength)
        ground = f"rgb({pale},{strong},{pale})" if value > 0 else f"rgb({strong},{pale},{pale})"
        text.append(piece, style=f"black on {ground}" if strength > 0.02 else "" if token.counts else "dim")
    return text


@print_result.register
def _print_report(result: command_results.ReportResult) -> None:
    _say(f"{result.report}: {result.bytes:,} bytes")


# -- the cache -------------------------------------------------------------------------------------------------------


@print_result.register
def _print_export(result: command_results.ExportResult) -> None:
    _say(f"{result.output}: {count(result.rows, 'row')}, {result.scored:,} with all log-probs")
    for reason, n in result.without.items():
        _say(f"  {n:,} {reason}")


@print_result.register
def _print_trl_export(result: command_results.TrlExportResult) -> None:
    _say(f"{result.output}: {count(result.rows, 'row')}, of which TRL makes the ids that were scored")
    for reason, n in result.left_out.items():
        first = f" (the first: {result.first[reason]})" if reason in result.first else ""
        _say(f"  {n:,} left out: {reason}{first}")
    for reason, n in result.quarantined.items():
        _say(f"  {n:,} in quarantine: {reason}")
    if result.kl_scored is not None:
        _say(f"  {result.kl_scored:,} have a mismatched answer that is scored, as KTOTrainer makes it")
    _say(f"TRL's settings: {', '.join(f'{name}={value!r}' for name, value in result.settings.items())}")
    if result.chat_template:
        _say(f"TRL's tokenizer needs this chat template: {result.chat_template}")


@print_result.register
def _print_import(result: command_results.ImportResult) -> None:
    per_token = f", {result.with_tokens:,} of them per token" if result.with_tokens else ""
    _say(f"{result.cache}: {count(result.imported, 'sequence')} imported as {result.numerics_id}{per_token}")
    for reason, n in result.refused.items():
        _say(f"  {n:,} refused, {reason}")
    left = f", which computes {result.left:,} others" if result.left else ""
    _say(f"Score and train with them: {result.use}{left}")


@print_result.register
def _print_parity(result: command_results.ParityResult) -> None:
    console, deviations, margins = _console(), result.deviations, result.margins
    _say(f"{result.a} and {result.b}: {deviations.tokens:,} tokens of {deviations.sequences:,} sequences, in nats")
    table = start_table("deviation", ">p50", ">p99", ">max")
    for label, quantiles in (("per token", deviations.token), ("per sequence (sum)", deviations.sequence)):
        values = (quantiles.p50, quantiles.p99, quantiles.max)
        table.add_row(label, *("-" if value is None else f"{value:.2e}" for value in values))
    console.print(table)
    if deviations.bias is not None:
        _say(f"bias: {deviations.bias:+.2e} nats per token (the first minus the second)")
    if deviations.not_finite:
        _say(f"{deviations.not_finite:,} tokens have no finite value on one side")
    if margins.pairs:
        _say(f"margins: {margins.flipped:,} of {margins.pairs:,} change sign")
    table = start_table("furthest apart", "answer", ">position", "token", ">first", ">second")
    for each in result.worst:
        token = Text(visible(repr(each.token)))
        table.add_row(each.example_id, each.answer, str(each.position), token, f"{each.a:.6f}", f"{each.b:.6f}")
    console.print(table)


@print_result.register
def _print_verify(result: command_results.VerifyResult) -> None:
    for cache in result.caches:
        # On a line of its own, so that a long name can be copied whole.
        _say(str(cache.folder))
        table = start_table(">shards", ">rows", ">failed", ">doubled", ">bytes", ">orphans", ">leftovers", ">damaged")
        counts = (cache.shards, cache.rows, cache.failed, cache.doubled, cache.n_bytes, cache.orphans, cache.leftovers)
        table.add_row(*(f"{n:,}" for n in (*counts, len(cache.damaged))))
        _console().print(table)
    _print_damage(result)


@print_result.register
def _print_gc(result: command_results.GcResult) -> None:
    would = "would be " if result.dry_run else ""
    for cache in result.caches:
        if not (cache.merged or cache.superseded or cache.orphans or cache.leftovers):
            _say(f"{cache.folder}: nothing to do, {count(cache.shards, 'shard')}")
            continue
        _say(
            f"{cache.folder}: {count(cache.merged, 'shard')} {would}merged into {cache.into:,}; {would}removed: "
            f"{cache.superseded:,} that others replace, {cache.orphans:,} without a record, "
            f"{count(cache.leftovers, 'leftover')}, {count(cache.doubled, 'doubled row')}. "
            f"{count(cache.shards, 'shard')} in all"
        )
    _print_damage(result)


def _print_damage(result: command_results.VerifyResult | command_results.GcResult) -> None:
    for cache in result.caches:
        for file, reason in cache.damaged.items():
            names_itself = reason.startswith(str(cache.folder))
            _say(f"damaged: {reason if names_itself else f'{cache.folder}/{file}: {reason}'}")


# -- the machine, and what can be chosen -----------------------------------------------------------------------------

_STATES = {"ok": ("ok", "green"), "absent": ("--", "dim"), "problem": ("!!", "bold red")}


@print_result.register
def _print_doctor(result: command_results.DoctorResult) -> None:
    console, area = _console(), None
    for finding in result.findings:
        if finding.area != area:
            area = finding.area
            console.print(Text(area, style="bold"))
        sign, style = _STATES[finding.state]
        text = Text(_wrap(f"  {sign} {finding.what}", indent=5))
        text.stylize(style, 0, 5)
        console.print(text, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"     {visible(finding.remedy)}", style="cyan"), soft_wrap=True)
    if result.why is not None:
        console.print(Text("up to date", style="bold"))
    for why in result.why or ():
        sign, style = _STATES["ok" if why.fresh else "absent"]
        text = Text(_wrap(f"  {sign} {why.what}: {why.sentence}", indent=5))
        text.stylize(style, 0, 5)
        console.print(text, soft_wrap=True)
    n = result.problems
    console.print(f"\n{count(n, 'problem')}" if n else "\nno problems", style="bold red" if n else "bold green")


_LOSS_GROUPS = {
    ("pairs", True): "Pairs",
    ("labels", True): "Labelled answers",
    ("pairs", False): "Pairs, without a reference: no scores are needed",
    ("labels", False): "Labelled answers, without a reference: no scores are needed",
}


def print_losses(losses: Sequence["Loss"]) -> None:
    for group, title in _LOSS_GROUPS.items():
        members = [loss for loss in losses if (loss.kind, loss.reads_reference) == group]
        if members:
            _say(f"{title}\n")
        for loss in members:
            _say(f"{loss.name}\n    {loss.when}")
            _say(f"    {' '.join([_hyperparameters(loss) + '.', *loss.papers[:1]])}\n")
    _say("`prefcache losses NAME` shows what one reads, its formula, and what a healthy run looks like.")


def print_loss(loss: "Loss") -> None:
    summary, _, text = str(loss.describe()["text"]).partition("\n")
    _say(f"{loss.name}: {summary}".removesuffix(": ") + f"\n\n    {loss.formula}\n")
    _say(f"{text.strip()}\n\nWhen: {loss.when}\n".lstrip("\n"))
    _say(f"Reads {loss.kind}: {', '.join(loss.columns)}")
    statistics = ", ".join(each.name for each in loss.statistics)
    if statistics or loss.over_batch:
        names = f": {statistics}" if statistics else ""
        _say(f"Computed over the whole batch of a step, however many micro-batches and processes it has{names}")
    _say(f"Hyperparameters: {_hyperparameters(loss)}")
    for name, allowed in loss.ranges.items():
        _say(f"    {name}: {'one of ' + ', '.join(allowed) if isinstance(allowed, tuple) else 'in ' + allowed}")
    _say("In a healthy run:")
    for sign in loss.healthy:
        _say(f"    {sign.metric} {sign.direction}: {sign.note}")


def _hyperparameters(loss: "Loss") -> str:
    return ", ".join(f"{name}={value}" for name, value in loss.hyperparameters.items()) or "no hyperparameters"


def print_formats(formats: Iterable["Format"], *, notes: bool) -> None:
    for each in formats:
        columns = ", ".join([*each.columns, *(f"[{name}]" for name in each.optional)])
        chosen = "recognised by its columns" if each.recognises else "read when named"
        _say(f"{each.name}\n    {each.help}\n    {each.makes}, {chosen}. Columns: {columns}")
        if each.options:
            _say(f"    Options: {', '.join(f'{name}={value!r}' for name, value in each.options.items())}")
        if notes and each.notes:
            _say(f"    {each.notes}")


_LAYOUTS = {
    "shared": "prompts are shared",
    "packed": "packed without padding, prompts not shared",
    "padded": "padded",
    "refused": "refused",
    "not run": "not tried",
}


def print_architectures(table: "Architectures") -> None:
    for row in table.rows:
        setting = "" if row.is_decoder is None else f" with is_decoder: {str(row.is_decoder).lower()}"
        facts = [_LAYOUTS[row.layout]]
        facts += [] if row.deviation is None else [f"attention {row.attention}", f"within {row.deviation:.1e} nats"]
        facts += [] if row.gradient is None else [f"gradients within {row.gradient:.1e}"]
        print(f"{row.model_type}{setting}: {row.model_class}")
        for text in filter(None, (", ".join(facts), row.reason, row.training)):
            print(_wrap(f"    {text}", indent=4))
    n_per_layout = Counter(row.layout for row in table.rows)
    totals = ", ".join(f"{n_per_layout[layout]} {what}" for layout, what in _LAYOUTS.items() if n_per_layout[layout])
    print()
    print(
        _wrap(
            f"{len(table.rows)} architectures: {totals}. Measured {table.measured['date']} with torch "
            f"{table.measured['torch']} and transformers {table.measured['transformers']}, on tiny random models in float32 on a CPU."
        )
    )


def print_views(views: Iterable[tuple[str, str, list[tuple[str, str]]]]) -> None:
    for name, purpose, columns in views:
        _say(f"{name}\n    {purpose}\n    {', '.join(f'{column} {kind.lower()}' for column, kind in columns)}")


def print_questions(questions: Iterable["Question"]) -> None:
    for each in questions:
        _say(f"{each.name}\n    {each.help}")
        for name, parameter in each.parameters.items():
            _say(f"    --set {name}={json.dumps(parameter.default)}: {parameter.help}")


# -- the rows of an answer -------------------------------------------------------------------------------------------


def print_rows(columns: list[str], rows: Iterator[tuple[Any, ...]], limit: int) -> None:
    """Print the first rows, whole, and count all."""
    shown = list(islice(rows, limit))
    row_layout.print_rows(_console(), columns, shown)
    n_more = sum(1 for _ in rows)
    _say(count(len(shown), "row") + (f" of {len(shown) + n_more:,}" if n_more else ""))


# -- onto the terminal -----------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Print a line. Names and paths in it may come from anywhere, so they are made visible."""
    print(visible(text))


def _wrap(text: str, indent: int = 0) -> str:
    """Break a line between words at the terminal's width. A pipe gets it whole, so that grep finds all of it."""
    text = visible(text)
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise what every other write to a closed pipe raises: rich would exit with code 1."""
        raise BrokenPipeError


def _console() -> Console:
    """Return a console as wide as the terminal, or of a fixed width for a pipe."""
    console = _Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else _Console(markup=False, highlight=False, emoji=False, width=_PIPE_WIDTH)


def settings(settings: Iterable[Setting]) -> None:
    console = _console()
    for setting in settings:
        line = Text(setting.key, style="bold") + Text(f" ({setting.type})")
        if setting.default:
            line += Text(f" = {setting.default}")
        elif setting.default is None:
            line += Text(" required", style="bold")
        console.print(line, soft_wrap=True)
        console.print(fill(setting.meaning, console.width, initial_indent=4 * " ", subsequent_indent=4 * " "))
