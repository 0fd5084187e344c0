"""What a person reads at the end of a command, on stdout."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.progress import printable

_WIDTH_OF_A_PIPE = 100


def prepared(result: dict[str, Any]) -> None:
    left_out = sum(result["quarantined"].values())
    print(
        f"{result['prepared']}: {result['train']:,} training and {result['held_out']:,} held-out pairs "
        f"of {result['records']:,} records, {left_out:,} in quarantine"
    )
    for reason, n in result["quarantined"].items():
        print(f"  {n:,} {reason}")
    if result["duplicates"]:
        print(f"  {result['duplicates']:,} pairs are exact duplicates of others; all were kept")


def scored(result: dict[str, Any]) -> None:
    known = f"{result['cache']}: {result['sequences']:,} sequences, {result['cached_before']:,} already cached"
    if not result.get("dry_run"):
        print(f"{known}, {result['scored']:,} scored now ({result['tokens']:,} tokens)")
        if result["failed"]:
            print(f"  {result['failed']:,} have no finite log-prob; pairs with them are left out of training")
        return
    print(f"{known}, {result['to_score']:,} to score ({result['tokens']:,} tokens, at most {result['bytes']:,} bytes)")
    for numerics_id, n in result["other_numerics"].items():
        print(f"  {n:,} of these are cached under other numerics, {numerics_id}")


def trained(result: dict[str, Any]) -> None:
    console = _console()
    console.print(
        f"{result['run']}: {result['pairs']:,} pairs, {result['steps']:,} steps with loss {result['loss']}, "
        f"{result['seconds']:.0f} s"
    )
    if result["before"]["evaluation"]:
        console.print(_held_out(result))
    if result["samples"]:
        lead = "Among them:" if result["changed_answers"] else "Still, these are what it answers:"
        console.print(f"{result['changed_answers']:,} greedy answers changed. {lead}\n")
    for sample in result["samples"][:3]:
        console.print(_sample(sample))
    console.print(f"model: {result['run']}/model")


def _held_out(result: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column(f"{result['held_out']:,} held-out pairs")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = result["before"], result["after"]
    if before["kinds"]:
        n = sum(before["kinds"].values())
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


def views(described: Iterable[tuple[str, str, list[str]]]) -> None:
    for name, purpose, columns in described:
        print(f"{name}\n    {purpose}\n    {', '.join(columns)}")


def rows(columns: list[str], found: Iterator[tuple[Any, ...]], limit: int) -> None:
    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(Text(printable(column)))
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
