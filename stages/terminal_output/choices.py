"""What can be chosen: losses, formats, architectures, views and questions."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prefcache.terminal_output.console import say

if TYPE_CHECKING:
    from prefcache.pipeline.model.architectures import Table as Architectures
    from prefcache.pipeline.preparing.formats import Format
    from prefcache.pipeline.questions import Question
    from prefcache.pipeline.training.losses import Loss

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
            say(f"{title}\n")
        for loss in members:
            say(f"{loss.name}\n    {loss.when}")
            say(f"    {' '.join([_hyperparameters(loss) + '.', *loss.papers[:1]])}\n")
    say("`prefcache losses NAME` shows what one reads, its formula, and what a healthy run looks like.")


def print_loss(loss: "Loss") -> None:
    summary, _, text = str(loss.describe()["text"]).partition("\n")
    say(f"{loss.name}: {summary}".removesuffix(": ") + f"\n\n    {loss.formula}\n")
    say(f"{text.strip()}\n\nWhen: {loss.when}\n".lstrip("\n"))
    say(f"Reads {loss.kind}: {', '.join(loss.columns)}")
    statistics = ", ".join(each.name for each in loss.statistics)
    if statistics or loss.over_batch:
        names = f": {statistics}" if statistics else ""
        say(f"Computed over the whole batch of a step, however many micro-batches and processes it has{names}")
    say(f"Hyperparameters: {_hyperparameters(loss)}")
    for name, allowed in loss.ranges.items():
        say(f"    {name}: {'one of ' + ', '.join(allowed) if isinstance(allowed, tuple) else 'in ' + allowed}")
    say("In a healthy run:")
    for sign in loss.healthy:
        say(f"    {sign.metric} {sign.direction}: {sign.note}")


def _hyperparameters(loss: "Loss") -> str:
    return ", ".join(f"{name}={value}" for name, value in loss.hyperparameters.items()) or "no hyperparameters"


def print_formats(formats: Iterable["Format"], *, notes: bool) -> None:
    for each in formats:
        columns = ", ".join([*each.columns, *(f"[{name}]" for name in each.optional)])
        chosen = "recognised by its columns" if each.recognises else "read when named"
        say(f"{each.name}\n    {each.help}\n    {each.makes}, {chosen}. Columns: {columns}")
        if each.options:
            say(f"    Options: {', '.join(f'{name}={value!r}' for name, value in each.options.items())}")
        if notes and each.notes:
            say(f"    {each.notes}")


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
            say(f"    {text}")
    n_per_layout = Counter(row.layout for row in table.rows)
    totals = ", ".join(f"{n_per_layout[layout]} {what}" for layout, what in _LAYOUTS.items() if n_per_layout[layout])
    print()
    say(
        f"{len(table.rows)} architectures: {totals}. Measured {table.measured['date']} with torch "
        f"{table.measured['torch']} and transformers {table.measured['transformers']}, on tiny random models in float32 on a CPU."
    )


def print_views(views: Iterable[tuple[str, str, list[tuple[str, str]]]]) -> None:
    for name, purpose, columns in views:
        say(f"{name}\n    {purpose}\n    {', '.join(f'{column} {kind.lower()}' for column, kind in columns)}")


def print_questions(questions: Iterable["Question"]) -> None:
    for each in questions:
        say(f"{each.name}\n    {each.help}")
        for name, parameter in each.parameters.items():
            say(f"    --set {name}={json.dumps(parameter.default)}: {parameter.help}")
