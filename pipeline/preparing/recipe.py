"""The recipe of a preparation: the config, what the tokenizer brings, and how each source is read.

It is settled once, before the first record, and travels to every worker.
"""

import difflib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import Prepare
from pipeline.errors import UsageError
from pipeline.preparing import encoder, formats
from pipeline.preparing.chat_template import prints_date, read_template
from pipeline.preparing.encoder import TokenizerFacts
from pipeline.preparing.example import Unusable
from pipeline.preparing.sources import Opened
from pipeline.progress import Progress

_LOOKED_AT = 100
_ENOUGH = 20


@dataclass(frozen=True)
class Reading:
    """How the records of one source are read."""

    format: str
    arguments: dict[str, Any]
    columns: dict[str, str]  # ours -> theirs


@dataclass(frozen=True)
class Recipe:
    """All that a part depends on beside its records. It travels to the workers."""

    prepare: Prepare
    kind: str  # pairs or labels
    tokenizer: TokenizerFacts
    template: str | None  # None: plain text
    tool_template: str | None
    readings: tuple[Reading, ...]

    @property
    def date(self) -> str | None:
        """The date that the template prints as today's, if it prints one."""
        printed = prints_date(self.template, self.tool_template)
        return self.prepare.date.isoformat() if printed else None


def make_recipe(prepare: Prepare, model: Path, opened: list[Opened], progress: Progress) -> Recipe:
    tokenizer = encoder.load(model)
    text, tool_text = tokenizer.chat_template, tokenizer.tool_template
    if prepare.chat_template is not None:
        text, tool_text = read_template(prepare.chat_template), None
    if prepare.template == "none":
        text = tool_text = None
        if tokenizer.eos is None:
            raise UsageError(f"The tokenizer in {model} has no end token, which plain text needs after an answer.")
    elif not text:
        raise UsageError(
            f"The tokenizer in {model} has no chat template. Name one (prepare.chat_template: FILE.jinja), "
            "or train on plain text (prepare.template: none)."
        )
    found = [_format_of(source, progress) for source in opened]
    readings = tuple(
        Reading(each.name, source.entry.format_args, source.entry.columns)
        for source, each in zip(opened, found, strict=True)
    )
    return Recipe(prepare, _kind(prepare, opened, found), tokenizer, text, tool_text, readings)


def _format_of(source: Opened, progress: Progress) -> formats.Format:
    name = source.entry.format or "auto"
    named = None if name == "auto" else formats.get_format(name)
    lines = (line for chunk in islice(source.chunks(), 1) for line in chunk.lines())
    records = list(islice((line.record for line in lines if line.record is not None), _LOOKED_AT))
    _check_columns(source, records)
    records = [renamed(record, source.entry.columns) for record in records]
    if named:
        _check_fits(named, source, records)
        return named
    if not records:
        return formats.get_format("pairs")  # all that is there goes to quarantine, which says why
    found = formats.recognise(records)
    if found is None:
        raise UsageError(
            f"{source.name}: its columns ({', '.join(records[0]) or 'none'}) are those of no format that is recognised by "
            "itself. Name one (prepare.format; `prefcache formats` lists them), or rename columns (prepare.columns)."
        )
    progress.say(f"prepare: {source.name} is read as {found.name} ({found.help.rstrip('.')})")
    return found


def _check_columns(source: Opened, records: list[dict[str, Any]]) -> None:
    """Both sides of a renaming: the format's, and the data's."""
    known = {name for each in formats.FORMATS.values() for name in (*each.columns, *each.optional)}
    there = {name for record in records for name in record}
    for ours, theirs in source.entry.columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f" The nearest is {near[0]}." if near else ""
            raise UsageError(f"prepare.columns: no format reads a column {ours!r}.{hint} Write it as OURS: THEIRS.")
        if records and theirs not in there:
            raise UsageError(
                f"prepare.columns: {source.name} has no column {theirs!r}; found {', '.join(sorted(there))}."
            )


def _check_fits(named: formats.Format, source: Opened, records: list[dict[str, Any]]) -> None:
    """A format that can read none of many records is the wrong one; better said now than after all of them."""
    if len(records) < _ENOUGH:
        return
    details = set()
    for record in records:
        try:
            named.bind(source.entry.format_args)(record)
            return
        except Unusable as unusable:
            if unusable.reason != "missing column":
                return
            details.add(unusable.detail)
    found = formats.recognise(records)
    hint = f" They are those of {found.name}." if found else ""
    raise UsageError(
        f"{source.name} is not in format {named.name}: none of its first {len(records)} records has the columns "
        f"{', '.join(named.columns)} (missing {min(details)}).{hint}"
    )


def _kind(prepare: Prepare, opened: list[Opened], found: list[formats.Format]) -> str:
    labelled = [source.name for source, each in zip(opened, found, strict=True) if each.makes == "labels"]
    if prepare.examples == "pairs" and labelled:
        raise UsageError(
            f"{', '.join(labelled)} has labelled answers, of which no pairs can be made. Set prepare.examples: labels."
        )
    if prepare.examples == "auto" and labelled and len(labelled) < len(found):
        raise UsageError(
            f"{', '.join(labelled)} has labelled answers, the other sources have pairs. Set prepare.examples: labels, and "
            "the pairs are taken apart, or prepare them on their own."
        )
    if labelled or prepare.examples == "labels":
        if prepare.pairing in ("adjacent", "all") and any(each.makes == "rankings" for each in found):
            raise UsageError(
                f"prepare.pairing: {prepare.pairing} would label answers in the middle both good and bad. For labels, set it "
                "to best_worst or best_rest."
            )
        return "labels"
    return "pairs"


def renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    taken = set(columns.values())
    kept = {name: value for name, value in record.items() if name not in taken and name not in columns}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
