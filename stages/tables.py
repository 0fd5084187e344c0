"""What a person reads at the end of a command, on stdout."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.progress import printable
from pipeline.stored.prepared import DONE

_WIDTH_OF_A_PIPE = 100


def prepared(result: dict[str, Any]) -> None:
    if result.get("waiting"):
        print(
            f"{result['prepared']}: {result['finished']:,} of {result['parts']:,} parts are finished. The rest is other "
            "machines' (RANK, WORLD_SIZE); whichever finishes last puts them together"
        )
        return
    left_out = sum(result["quarantined"].values())
    print(
        f"{result['prepared']}: {result['train']:,} training and {result['held_out']:,} held-out {result['kind']} "
        f"of {result['records']:,} records, {left_out:,} in quarantine"
    )
    for reason, n in result["quarantined"].items():
        print(f"  {n:,} {reason}")
    for name, n in result["done"].items():
        if name in DONE:
            print(f"  {n:,} {DONE[name]}")
    if split := result["boundaries"].get("split"):
        print(
            f"  {split:,} where the tokenizer would merge prompt and answer; the text was cut there (boundary: split)"
        )
    if result["date"]:
        print(f"  the template prints the date: always {result['date']} (prepare.date)")


def previewed(result: dict[str, Any], ids: bool) -> None:
    """Tokens as they are: in turn light and dark, special ones and what is cut in colours of their own."""
    console = _console()
    for example in result["examples"]:
        console.print(Text(printable(f"{example['source']}, line {example['line']}"), style="bold"))
        if "reason" in example:
            console.print(Text(printable(f"  to quarantine: {_reason(example)}\n"), style="red"))
            continue
        facts = [f"boundary {example['boundary']}"]
        facts += [f"label {str(example['label']).lower()}"] if "label" in example else []
        facts += [f"{example['cut_prompt']:,} tokens of its oldest turns left out"] if example["cut_prompt"] else []
        console.print(Text("  " + ", ".join(facts), style="dim"))
        for part in example["parts"]:
            cut = f", {part['n_cut']:,} more cut" if part["n_cut"] else ""
            console.print(Text(f"  {part['name']} ({part['n_tokens']:,} tokens{cut})", style="bold"))
            if part.get("cut_turns"):
                console.print(Text(printable(part["cut_turns"]), style=_CUT))
            console.print(_tokens(part))
            if ids:
                console.print(
                    Text(" ".join(str(token["id"]) for token in part["tokens"] if not token["cut"]), style="dim")
                )
        console.print()


def _reason(example: dict[str, Any]) -> str:
    return f"{example['reason']}: {example['detail']}" if example["detail"] else str(example["reason"])


_CUT = "strike red"
_TOKENS = {"prompt": ("blue", "cyan"), "rejected": ("yellow", "bright_yellow")}
_ANSWER_TOKENS = ("green", "bright_green")


def _tokens(part: dict[str, Any]) -> Text:
    text = Text()
    colours = _TOKENS.get(part["name"], _ANSWER_TOKENS)
    cut = False
    for n, token in enumerate(part["tokens"]):
        if token["cut"] and not cut:
            cut = True
            text.append("[cut here]", style="bold red")
        style = _CUT if token["cut"] else "reverse magenta" if token["special"] else colours[n % 2]
        text.append(printable(token["text"]).replace("\n", "\u23ce\n").replace("\t", "\u21e5\t"), style=style)
    return text


# What colours a token: the first of these that is known. Where only one model has seen it, how surprised that was.
_SEEN = (
    ("log_ratio", "green: the policy finds the token likelier than the reference does; red: less likely", True),
    ("reference", "red: the reference did not expect the token", False),
    ("policy", "red: the policy does not expect the token", False),
)
_STRONGEST = 5


def shown(result: dict[str, Any]) -> None:
    """Tokens in colours, and in words those that differ most: not every reader sees colours, and pipes have none."""
    console = _console()
    label = "" if result["label"] is None else f", label {str(result['label']).lower()}"
    where = f"{result['example_id']}, {result['split']}: {result['source']}, line {result['line']}{label}"
    console.print(Text(printable(where), style="bold"))
    console.print(Text(f"{printable(result['prompt'])}\n", style="dim"))
    known = [each for each in _SEEN if all(token[each[0]] is not None for token in _all_tokens(result))]
    for answer in result["answers"]:
        sums = ", ".join(
            f"{name.replace('_', '-')} {answer[f'{name}_sum']:.3f}"
            for name in ("policy", "reference", "log_ratio")
            if answer[f"{name}_sum"] is not None
        )
        console.print(
            Text(f"{answer['name']} ({answer['n_tokens']:,} tokens{f': {sums}' if sums else ''})", style="bold")
        )
        if known:
            name, _, signed = known[0]
            full = max((abs(token[name]) for token in _all_tokens(result)), default=0.0)
            console.print(_coloured(answer["tokens"], name, full))
            console.print(Text(_strongest(answer["tokens"], name, signed), style="dim"))
        else:
            console.print(_coloured(answer["tokens"], None, 0.0))
        console.print()
    for line in _what_colours_mean(result, known):
        console.print(Text(line, style="dim"))


def _all_tokens(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for answer in result["answers"] for token in answer["tokens"]]


def _coloured(tokens: Iterable[dict[str, Any]], name: str | None, full: float) -> Text:
    """Each on a ground of its own, black or white print on it: readable on a dark and on a light terminal."""
    text = Text()
    for token in tokens:
        strength = min(abs(token[name]) / full, 1.0) if name and full else 0.0
        pale, strong = round(235 - 125 * strength), round(255 - 50 * strength)
        ground = f"rgb({pale},{strong},{pale})" if name and token[name] > 0 else f"rgb({strong},{pale},{pale})"
        style = f"black on {ground}" if strength > 0.02 else ""
        text.append(printable(token["text"]).replace("\n", "\u23ce\n").replace("\t", "\u21e5\t"), style=style)
    return text


def _strongest(tokens: list[dict[str, Any]], name: str, signed: bool) -> str:
    most = sorted(tokens, key=lambda token: -abs(token[name]))[:_STRONGEST]
    form = "{:+.2f}" if signed else "{:.2f}"
    return "most: " + ", ".join(f"{printable(repr(token['text']))} {form.format(token[name])}" for token in most)


def _what_colours_mean(result: dict[str, Any], known: list[tuple[str, str, bool]]) -> Iterator[str]:
    if known:
        full = max((abs(token[known[0][0]]) for token in _all_tokens(result)), default=0.0)
        yield f"{known[0][1]}; full colour at {full:.2f} nats."
    if not result["scored"]:
        yield "The reference has not been scored (make score)."
    if result["run"] is None:
        yield "No run of that name has a model yet (make train)."


_STATES = {"ok": ("ok", "green"), "absent": ("--", "dim"), "problem": ("!!", "bold red")}


def examined(result: dict[str, Any]) -> None:
    console, area = _console(), None
    for each in result["findings"]:
        if each["area"] != area:
            area = each["area"]
            console.print(Text(area, style="bold"))
        sign, style = _STATES[each["state"]]
        console.print(Text(f"  {sign} ", style=style) + Text(printable(each["what"])), soft_wrap=True)
        if each["remedy"]:
            console.print(Text(f"     {printable(each['remedy'])}", style="cyan"), soft_wrap=True)
    n = result["problems"]
    console.print(f"\n{n:,} problems" if n else "\nno problems", style="bold red" if n else "bold green")


_LOSSES = {
    ("pairs", True): "Pairs",
    ("labels", True): "Labelled answers",
    ("pairs", False): "Pairs, without a reference: no scores are needed",
    ("labels", False): "Labelled answers, without a reference: no scores are needed",
}


def losses(found: Iterable[Any]) -> None:
    listed = [each.describe() for each in found]
    for (kind, reference), title in _LOSSES.items():
        those = [each for each in listed if (each["kind"], each["reference"]) == (kind, reference)]
        if those:
            print(f"{title}\n")
        for each in those:
            print(f"{each['name']}\n    {each['when']}")
            print(f"    {' '.join([_hyperparameters(each) + '.', *each['papers'][:1]])}\n")
    print("`prefcache losses NAME` shows what one reads, its formula, and what a healthy run looks like.")


def loss(chosen: Any) -> None:
    each = chosen.describe()
    summary, _, text = each["text"].partition("\n")
    print(f"{each['name']}: {summary}".removesuffix(": ") + f"\n\n    {each['formula']}\n")
    print(f"{text.strip()}\n\nWhen: {each['when']}\n".lstrip("\n"))
    print(f"Reads {each['kind']}: {', '.join(each['columns'])}")
    if each["statistics"] or each["over_batch"]:
        which = f": {', '.join(each['statistics'])}" if each["statistics"] else ""
        print(f"Taken over the whole batch of a step, however many micro-batches and processes it has{which}")
    print(f"Hyperparameters: {_hyperparameters(each)}")
    for name, allowed in each["ranges"].items():
        print(f"    {name}: {'one of ' + ', '.join(allowed) if isinstance(allowed, tuple) else 'in ' + allowed}")
    print("In a healthy run:")
    for sign in each["healthy"]:
        print(f"    {sign['metric']} {sign['direction']}: {sign['note']}")


def _hyperparameters(described: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in described["hyperparameters"].items()) or "no hyperparameters"


def formats(found: Iterable[Any]) -> None:
    for each in found:
        columns = ", ".join([*each.columns, *(f"[{name}]" for name in each.optional)])
        known = "recognised by its columns" if each.recognises else "read when named"
        print(f"{each.name}\n    {each.help}\n    {each.makes}, {known}. Columns: {columns}")
        if each.options:
            print(f"    Options: {', '.join(f'{name}={value!r}' for name, value in each.options.items())}")


def scored(result: dict[str, Any]) -> None:
    known = f"{result['cache']}: {result['sequences']:,} sequences, {result['cached_before']:,} already cached"
    known += f" ({result['cut_from_longer']:,} cut from longer ones)" if result.get("cut_from_longer") else ""
    if not result.get("dry_run"):
        print(f"{known}, {result['scored']:,} scored now ({result['tokens']:,} tokens)")
        if result["failed"]:
            print(f"  {result['failed']:,} have no finite log-prob; pairs with them are left out of training")
        return
    print(f"{known}, {result['to_score']:,} to score ({result['tokens']:,} tokens, at most {result['bytes']:,} bytes)")
    for numerics_id, n in result["other_numerics"].items():
        print(f"  {n:,} of these are cached under other numerics, {numerics_id}")


def exported(result: dict[str, Any]) -> None:
    print(f"{printable(result['output'])}: {result['rows']:,} rows, {result['scored']:,} with all log-probs")
    for reason, n in result["without"].items():
        print(printable(f"  {n:,} {reason}"))


def scored_files(result: dict[str, Any]) -> None:
    scored(result["scored"])
    exported(result["exported"])


def imported(result: dict[str, Any]) -> None:
    per_token = f", {result['with_tokens']:,} of them per token" if result["with_tokens"] else ""
    print(f"{result['cache']}: {result['imported']:,} sequences imported as {result['numerics_id']}{per_token}")
    for reason, n in result["refused"].items():
        print(f"  {n:,} refused, {reason}")
    left = f", which computes {result['left']:,} others" if result["left"] else ""
    print(f"Score and train with them: {result['use']}{left}")


def compared(result: dict[str, Any]) -> None:
    console = _console()
    print(f"{result['a']} and {result['b']}: {result['tokens']:,} tokens of {result['sequences']:,} sequences, in nats")
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("deviation", "p50", "p99", "max"):
        table.add_column(column, justify="left" if column == "deviation" else "right")
    for label, name in (("per token", "token"), ("per sequence (sum)", "sequence")):
        table.add_row(label, *("-" if value is None else f"{value:.2e}" for value in result[name].values()))
    console.print(table)
    if result["bias"] is not None:
        print(f"bias: {result['bias']:+.2e} nats per token (the first minus the second)")
    if result["not_finite"]:
        print(f"{result['not_finite']:,} tokens have no finite value on one side")
    if result["pairs"]:
        print(f"margins: {result['flipped']:,} of {result['pairs']:,} change sign")
    worst = Table(box=SIMPLE, pad_edge=False)
    for column in ("furthest apart", "answer", "position", "token", "first", "second"):
        worst.add_column(column, justify="right" if column in ("position", "first", "second") else "left")
    for each in result["worst"]:
        values = (f"{each[side]:.6f}" for side in ("a", "b"))
        text = Text(printable(repr(each["token"])))
        worst.add_row(each["example_id"], each["answer"], str(each["position"]), text, *values)
    console.print(worst)


def verified(result: dict[str, Any]) -> None:
    numbers = ("shards", "rows", "failed", "doubled", "n_bytes", "orphans", "leftovers")
    for each in result["caches"]:
        # A line of its own, to be copied: in a column a long name would be cut into pieces.
        print(printable(each["folder"]))
        table = Table(box=SIMPLE, pad_edge=False)
        for column in (*numbers, "damaged"):
            table.add_column(column.removeprefix("n_"), justify="right")
        table.add_row(*(f"{each[name]:,}" for name in numbers), f"{len(each['damaged']):,}")
        _console().print(table)
    _print_damage(result)


def collected(result: dict[str, Any]) -> None:
    would = "would be " if result["dry_run"] else ""
    for each in result["caches"]:
        print(
            f"{printable(each['folder'])}: {each['merged']:,} shards {would}merged into {each['into']:,}; {would}removed: "
            f"{each['superseded']:,} that others stand for, {each['orphans']:,} without a record, {each['leftovers']:,} "
            f"leftovers, {each['doubled']:,} doubled rows. {each['shards']:,} shards in all"
        )
    _print_damage(result)


def _print_damage(result: dict[str, Any]) -> None:
    for each in result["caches"]:
        for file, reason in each["damaged"].items():
            print(printable(f"damaged: {each['folder']}/{file}: {reason}"))


def trained(result: dict[str, Any]) -> None:
    console = _console()
    console.print(
        f"{result['run']}: {result['examples']:,} {result['kind']}, {result['steps']:,} steps with loss {result['loss']}, "
        f"{result['seconds']:.0f} s"
    )
    if result["before"]["evaluation"]:
        console.print(_held_out(result))
    if result["samples"]:
        lead = "Among them:" if result["changed_answers"] else "Still, these are what it answers:"
        console.print(f"{result['changed_answers']:,} greedy answers changed. {lead}\n")
    for sample in result["samples"][:3]:
        console.print(_sample(sample))
    best = result.get("best")
    which = f", of step {best['step']:,}, the best by {best['metric']}" if best else ""
    console.print(f"model: {result['run']}/model{which}")


_COMPARED = (
    ("reward accuracy", "rewards/accuracies", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3f}"),
    ("prefers chosen", "preference_accuracy", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
)


def swept(result: dict[str, Any]) -> None:
    """The best of each column stands out; losses compare only where the loss is the same."""
    runs = result["runs"]
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column(f"{runs[0]['held_out']:,} held-out {runs[0]['kind']}")
    for title, _, _ in _COMPARED:
        table.add_column(title, justify="right")
    best = {
        name: max((run["after"]["evaluation"].get(name, float("-inf")) for run in runs), default=None)
        for _, name, _ in _COMPARED[:3]
    }
    for run in runs:
        found = run["after"]["evaluation"]
        cells = [
            Text(
                form.format(found[name]) if name in found else "-",
                style="bold" if found.get(name) == best.get(name) else "",
            )
            for _, name, form in _COMPARED
        ]
        table.add_row(Text(printable(Path(run["run"]).name)), *cells)
    _console().print(table)
    print(f"models: {Path(runs[0]['run']).parent}/RUN/model")


def merged(result: dict[str, Any]) -> None:
    console = _console()
    facts = (
        f"{result['output']}: {result['adapter']} merged into {result['base']}, as {result['dtype']}",
        f"{result['compared']} answers' log-probs changed by {result['mean']:.2g} nats a token on average, {result['largest']:.2g} at most",
        f"the adapter itself had changed them by {result['effect']:.2g} on average",
    )
    for fact in facts:
        console.print(fact, soft_wrap=True)


def pushed(result: dict[str, Any]) -> None:
    print(printable(f"{result['url']}: {result['files']} files of {result['run']}/model, commit {result['commit']}"))


def reported(result: dict[str, Any]) -> None:
    print(printable(f"{result['report']}: {result['bytes']:,} bytes"))


def _held_out(result: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column(f"{result['held_out']:,} held-out {result['kind']}")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = result["before"], result["after"]
    if before["kinds"] and (n := sum(before["kinds"].values())):
        for kind in before["kinds"]:
            shares = (f"{counted['kinds'][kind] / n:.1%}" for counted in (before, after))
            table.add_row(f"greedy answers of {kind if kind == 'neither' else 'the ' + kind} kind (of {n:,})", *shares)
    old, new = before["evaluation"], after["evaluation"]
    for label, name, form in (
        ("chosen answer more likely than rejected", "preference_accuracy", "{:.1%}"),
        ("reward accuracy", "rewards/accuracies", "{:.1%}"),
        ("reward margin", "rewards/margins", "{:.3f}"),
        ("loss", "loss", "{:.4f}"),
    ):
        if name not in new:
            continue
        # Before the first step all rewards are zero: there is nothing to be accurate about.
        nothing = name == "rewards/accuracies" and abs(old["rewards/margins"]) < 1e-4
        # Adding 0.0 after rounding spares the reader a "-0.000".
        shown = [form.format(round(values[name], 6) + 0.0) for values in (old, new)]
        table.add_row(label, "-" if nothing else shown[0], shown[1])
    return table


def _sample(sample: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, name in (("asked", "prompt"), ("before", "before"), ("after", "after")):
        table.add_row(label, Text(printable(sample[name]) or "(nothing)"))
    table.add_row("", "")
    return table


def views(described: Iterable[tuple[str, str, list[tuple[str, str]]]]) -> None:
    for name, purpose, columns in described:
        print(f"{name}\n    {purpose}\n    {', '.join(f'{column} {kind.lower()}' for column, kind in columns)}")


def questions(found: Iterable[Any]) -> None:
    for each in found:
        print(f"{each.name}\n    {each.help}")
        for name, parameter in each.parameters.items():
            print(f"    --set {name}={json.dumps(parameter.default)}: {parameter.help}")


def rows(columns: list[str], found: Iterator[tuple[Any, ...]], limit: int) -> None:
    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        # Whole, over several lines: of two that begin alike, a reader could not tell which is which.
        table.add_column(Text(printable(column), overflow="fold"))
    for row in islice(found, limit):
        table.add_row(*(Text(_cell(value)) for value in row))
    console = _console()
    console.print(table)
    more = sum(1 for _ in found)
    console.print(f"{table.row_count:,} rows" + (f" of {table.row_count + more:,}" if more else ""))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else printable(str(value))


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    return (
        console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=_WIDTH_OF_A_PIPE)
    )
