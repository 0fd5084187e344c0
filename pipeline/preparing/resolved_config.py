"""The resolved config of a preparation: the settings, what the tokenizer brings, and the format of each source.

It is resolved once, before the first record, and sent to every worker.
"""

import contextlib
import difflib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import formats, tokenizer_facts
from prefcache.pipeline.preparing.chat_template import ChatTemplate, prints_date, read_template
from prefcache.pipeline.preparing.example import Candidate, Label, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.formats import Format
from prefcache.pipeline.preparing.formats.registry import Record
from prefcache.pipeline.preparing.rendered_text import RenderedText
from prefcache.pipeline.preparing.sources import DataSource
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts
from prefcache.pipeline.progress import Progress

_SAMPLE = 100  # records at which a format is recognised
_ENOUGH = 20  # records that tell that a named format is wrong
_BULK = 0.5  # of the records: texts that do not fit prepare.template


@dataclass(frozen=True)
class SourceFormat:
    """How the records of one source are read. The manifest records these fields."""

    format: str
    arguments: dict[str, Any]
    columns: dict[str, str]  # ours -> theirs


@dataclass(frozen=True)
class ResolvedConfig:
    """All that a part depends on, apart from its records."""

    prepare: Prepare
    kind: str  # pairs or labels
    tokenizer: TokenizerFacts
    template: str | None  # None: plain text
    tool_template: str | None
    source_formats: tuple[SourceFormat, ...]
    fast_tokenizer: bool = False  # worth its time to load
    image_processor: Path | None = None  # the folder of the processor of images; None if no source has any

    @property
    def date(self) -> str | None:
        """The date that the template prints as today's, if it prints one."""
        return self.prepare.date.isoformat() if prints_date(self.template, self.tool_template) else None


def resolve_config(
    prepare: Prepare, model: Path, sources: list[DataSource], progress: Progress, *, late_images: str = ""
) -> ResolvedConfig:
    """Resolve the config by the first records of each source; `late_images` names a later record that has images."""
    tokenizer = tokenizer_facts.load_facts(model)
    template, tool_template = tokenizer.chat_template, tokenizer.tool_template
    if prepare.chat_template is not None:
        template, tool_template = read_template(prepare.chat_template), None
    if prepare.template == "none":
        template = tool_template = None
        if tokenizer.eos is None:
            raise UsageError(f"The tokenizer in {model} has no end token, which plain text needs after an answer.")
    elif not template:
        raise UsageError(
            f"The tokenizer in {model} has no chat template. Name one (prepare.chat_template: FILE.jinja), "
            "or train on plain text (prepare.template: none)."
        )
    chat_template = template and ChatTemplate(template, tokenizer.special, prepare.date, tool_text=tool_template)
    rendered_text = RenderedText(chat_template, tokenizer) if chat_template else None
    matches, illustrated, have_image_column = [], late_images, False
    for source in sources:
        records = _first_records(source)
        matches.append(_find_format(source, records, progress))
        examples = _read_examples(source, matches[-1], records)
        _check_texts(source, matches[-1], examples, rendered_text)
        if not illustrated and any(example.images for example in examples):
            illustrated = source.name
        have_image_column |= any(column in record for record in records for column in formats.IMAGE_COLUMNS)
    image_processor = None
    if illustrated:
        _check_sees_images(model, chat_template or None, illustrated)
        image_processor = model
    elif have_image_column:  # which may hold some further on
        with contextlib.suppress(UsageError):
            _check_sees_images(model, chat_template or None, "")
            image_processor = model
    source_formats = tuple(
        SourceFormat(each.name, source.entry.format_args, source.entry.columns)
        for source, each in zip(sources, matches, strict=True)
    )
    return ResolvedConfig(
        prepare,
        _resolve_kind(prepare, sources, matches),
        tokenizer,
        template,
        tool_template,
        source_formats,
        image_processor=image_processor,
    )


def _first_records(source: DataSource) -> list[Record]:
    lines = (line for chunk in islice(source.chunks(), 1) for line in chunk.lines())
    records = list(islice((line.record for line in lines if line.record is not None), _SAMPLE))
    _check_columns(source, records)
    return [rename_columns(record, source.entry.columns) for record in records]


def _find_format(source: DataSource, records: list[Record], progress: Progress) -> Format:
    """Return the format that the config names, or the one that the first records show."""
    name = source.entry.format or "auto"
    named = None if name == "auto" else formats.get_format(name)
    if named:
        _check_fits(named, source, records)
        return named
    if not records:
        return formats.get_format("pairs")  # whatever there is goes to quarantine, with a reason
    recognised = formats.recognise(records)
    if recognised is None:
        raise UsageError(
            f"{source.name}: no format is recognised by its columns ({', '.join(records[0]) or 'none'}). Name one "
            "(prepare.format; `prefcache formats` lists them), or rename columns (prepare.columns)."
        )
    progress.say(f"prepare: {source.name} is read as {recognised.name} ({recognised.help.rstrip('.')})")
    return recognised


def _read_examples(source: DataSource, chosen: Format, records: list[Record]) -> list[Pair | Label | Ranking]:
    read, examples = chosen.bind(source.entry.format_args), []
    for record in records:
        with contextlib.suppress(Unusable):
            examples.append(read(record))
    return examples


def _check_sees_images(model: Path, template: ChatTemplate | None, source: str) -> None:
    """Refuse images that the model or its chat template has no place for, before all of them are quarantined."""
    # Imported for data with images: it loads Pillow, and Transformers.
    from prefcache.pipeline import image_processor
    from prefcache.pipeline.preparing.image_text import count_placeholders

    if template is None:
        raise UsageError(
            f"{source} has images, for which prepare.template: none has no place. Set prepare.template: chat."
        )
    try:
        processor = image_processor.load(model)
    except UsageError as error:
        raise UsageError(f"{source} has images. {error}") from None
    try:
        processor.process(np.zeros((64, 64, 3), np.uint8))
    except Exception as error:
        # Processors written for earlier versions of Transformers lack methods that are called here.
        raise UsageError(
            f"{source} has images, and the processor in {model} cannot process one by itself ({type(error).__name__}: {error}). Name "
            "a model of another family."
        ) from None
    placeholder = processor.placeholder
    if count_placeholders(template, placeholder) != 1:
        raise UsageError(
            f"{source} has images, and the chat template prints no {placeholder} for one, by which the model's processor finds its "
            "place. Name another: prepare.chat_template: FILE.jinja."
        )


def _check_texts(
    source: DataSource, chosen: Format, read: list[Pair | Label | Ranking], rendered_text: RenderedText | None
) -> None:
    """Refuse data that would get a template twice, or messages that would get none, before all of it is quarantined."""
    examples: list[tuple[bool, list[Turns]]] = []
    for example in read:
        answers = [each.turns if isinstance(each, Candidate) else each for each in example.answers]
        examples.append((example.rendered, [example.prompt, *answers]))
    n_messages = sum(any(not isinstance(turns, str) for turns in texts) for _, texts in examples)
    if rendered_text is None:
        if n_messages > _BULK * len(examples):
            as_text = "" if chosen.name != "hh" else ", or take transcripts as text (prepare.format: implicit_prompt)"
            raise UsageError(
                f"{source.name} is read as {chosen.name}, which gives messages, and prepare.template: none writes no "
                f"messages out. Set prepare.template: chat{as_text}."
            )
        return
    found = []
    for is_rendered, (prompt, *answers) in examples:
        try:
            if not is_rendered:
                rendered_text.check(prompt, answers)
        except Unusable as unusable:
            found.append(unusable.description)
    if len(found) > _BULK * len(examples):
        remedy = (
            "Take it out of the messages." if n_messages else "Set prepare.template: none, which takes text as it is."
        )
        raise UsageError(
            f"{source.name} is rendered already: {len(found)} of its first {len(examples)} records hold what the chat "
            f"template writes between turns (in the first, {found[0]}). The template would be applied a second time. {remedy}"
        )


def _check_columns(source: DataSource, records: list[Record]) -> None:
    """Check both sides of a renaming: the format's, and the data's."""
    known = {name for each in formats.FORMATS.values() for name in (*each.columns, *each.optional)}
    known.update(formats.IMAGE_COLUMNS)
    present = {name for record in records for name in record}
    for ours, theirs in source.entry.columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f" The nearest is {near[0]}." if near else ""
            raise UsageError(f"prepare.columns: no format reads a column {ours!r}.{hint} Write it as OURS: THEIRS.")
        if records and theirs not in present:
            raise UsageError(
                f"prepare.columns: {source.name} has no column {theirs!r}; found {', '.join(sorted(present))}."
            )


def _check_fits(named: Format, source: DataSource, records: list[Record]) -> None:
    """Refuse a format that can read none of many records, before all of them are quarantined."""
    if len(records) < _ENOUGH:
        return
    read, details = named.bind(source.entry.format_args), set()
    for record in records:
        try:
            read(record)
            return
        except Unusable as unusable:
            if unusable.reason != "missing column":
                return
            details.add(unusable.detail)
    recognised = formats.recognise(records)
    hint = f" They are those of {recognised.name}." if recognised else ""
    raise UsageError(
        f"{source.name} is not in format {named.name}: none of its first {len(records)} records has the columns "
        f"{', '.join(named.columns)} (missing {min(details)}).{hint}"
    )


def _resolve_kind(prepare: Prepare, sources: list[DataSource], matches: list[Format]) -> str:
    labelled = [source.name for source, each in zip(sources, matches, strict=True) if each.makes == "labels"]
    if prepare.examples == "pairs" and labelled:
        raise UsageError(
            f"{', '.join(labelled)} has labelled answers, of which no pairs can be made. Set prepare.examples: labels."
        )
    if prepare.examples == "auto" and labelled and len(labelled) < len(matches):
        raise UsageError(
            f"{', '.join(labelled)} has labelled answers, the other sources have pairs. Set prepare.examples: labels, and "
            "the pairs are taken apart, or prepare them on their own."
        )
    if not labelled and prepare.examples != "labels":
        return "pairs"
    if prepare.pairing in ("adjacent", "all") and any(each.makes == "rankings" for each in matches):
        raise UsageError(
            f"prepare.pairing: {prepare.pairing} would label answers in the middle both good and bad. For labels, set it "
            "to best_worst or best_rest."
        )
    return "labels"


def rename_columns(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a record under the formats' names; `columns` maps ours to theirs."""
    theirs = set(columns.values())
    others = {name: value for name, value in record.items() if name not in theirs and name not in columns}
    return others | {ours: record[name] for ours, name in columns.items() if name in record}
