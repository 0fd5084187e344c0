"""Render the page: one HTML file that contains its style and figures, and no script.

The template escapes everything it prints. Invisible characters, and those that would reorder the text around them, are shown
by name (pipeline/visible_text.py), even if the template forgets to ask for it. The same facts give the same bytes: the page
has no date.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from prefcache.pipeline.html_templates import make_environment
from prefcache.pipeline.report import plots, prose
from prefcache.pipeline.report.data_section import Data
from prefcache.pipeline.report.reference_section import Reference
from prefcache.pipeline.report.runs_section import Measured, MovedExample, Run, Token
from prefcache.pipeline.report.svg import RUNS
from prefcache.pipeline.schema import HELD_OUT
from prefcache.pipeline.stored.records import FileEntry, PreparedManifest, ScoredManifest
from prefcache.pipeline.thumbnails import Thumbnail, split_at_tags
from prefcache.pipeline.token_colours import RATIO_SHADES, choose_colour
from prefcache.pipeline.visible_text import visible, visible_tokens

MOST_RUNS = len(RUNS)  # compared on one page, each in a colour of its own
_FOLDER = Path(__file__).parent
_MOST_CHARACTERS = 1500  # of one text
_EXAMPLES_PER_RUN = 2  # of the largest gains, and of the largest losses, when several runs are compared


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows."""

    experiment: str
    config: str  # as on a command line
    prepared: PreparedManifest
    prepared_id: str
    scored: ScoredManifest | None
    data: Data
    reference: Reference | None
    runs: Sequence[Run]
    pictures: Mapping[str, Thumbnail] = field(default_factory=dict)  # by their tags in prompts


def render(facts: Facts) -> str:
    environment = make_environment(_FOLDER, keep_trailing_newline=True)
    environment.filters |= {
        "visible": lambda text, most=_MOST_CHARACTERS: visible(text, most),
        "figure": prose.figure,
        "interval": prose.interval,
        "number": lambda value, form: prose.NONE if value is None else form.format(value),
        "tiny": prose.tiny,
        "pieces": _pieces,
        "illustrated": lambda text: _split_prompt(text, facts.pictures),
        "colour": lambda token: choose_colour(token.ratio, RATIO_SHADES),
    }
    return environment.get_template("report.html.j2").render(_build_context(facts))


def _build_context(facts: Facts) -> dict[str, Any]:
    runs, data, reference = facts.runs, facts.data, facts.reference
    alerts = list(enumerate((alert for run in runs for alert in run.alerts), 1))
    sections = {
        "held-out": "Before and after" if runs else None,
        "run": ("The runs" if len(runs) > 1 else "The run") if runs else None,
        "samples": "Answers" if runs else None,
        "examples": "Gains and losses" if runs else None,
        "reference": "The reference" if reference else None,
        "data": "The data",
        "missing": None if reference and runs else "Missing",
        "provenance": "Provenance",
    }
    return {
        "title": ", ".join(run.name for run in runs) or facts.experiment,
        "experiment": facts.experiment,
        "config": facts.config,
        "style": Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        "version": version("prefcache"),
        "summary": list(prose.summarize(data, reference, runs)),
        "key_figures": list(prose.list_key_figures(data, reference, runs)),
        "sections": {key: name for key, name in sections.items() if name},
        "runs": runs,
        "evaluated": list(_list_evaluated(runs, data.kind)),
        "medians": [{name: float(np.median(values)) for name, (_, values) in run.series.items()} for run in runs],
        "colours": RUNS,
        "curves": list(plots.draw_runs(runs, alerts)),
        "alerts": alerts,
        "watched": any(run.record.watched for run in runs),
        "samples": list(_list_samples(runs)),
        "n_own": sum(sample.is_own for run in runs[:1] for sample in run.samples),
        "n_samples": max((len(run.record.samples) for run in runs), default=0),
        "moved": list(_list_moved(runs)),
        "reference": reference,
        "reference_figures": list(plots.draw_reference(reference)) if reference else [],
        "data": data,
        "data_counts": prose.count_by_split(data),
        "data_figures": list(plots.draw_data(data)),
        "provenance": list(_list_provenance(facts)),
    }


def _split_prompt(text: str, pictures: Mapping[str, Thumbnail]) -> Iterator[tuple[str, str, Thumbnail | None]]:
    """Yield the pieces of a prompt, each with the tag and the thumbnail of the picture that follows; pictures beyond the cut as well."""
    n_left = _MOST_CHARACTERS
    for piece, tag in split_at_tags(text):
        picture = pictures.get(tag)
        yield visible(piece + ("" if picture else tag), n_left) if n_left else "", tag, picture
        n_left = max(n_left - len(piece), 0)


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluated:
    """What the runs measured on one split."""

    examples: str  # how many of what
    rows: "list[_MeasureRow]"


@dataclass(frozen=True)
class _MeasureRow:
    run: str
    measured: Measured
    span: int  # rows of the measure, on the first of them; else 0


def _list_evaluated(runs: Sequence[Run], kind: str) -> Iterator[_Evaluated]:
    numbers = {each.split: each.n for run in reversed(runs) for each in run.evaluations if each.n}
    for split in sorted(numbers, key=lambda split: (split != HELD_OUT, split)):
        yield _Evaluated(f"{numbers[split]:,} {prose.name_split(split, kind)}", list(_list_measures(runs, split)))


def _list_measures(runs: Sequence[Run], split: str) -> Iterator[_MeasureRow]:
    """List each measure of each run on a split."""
    evaluations = [evaluation for run in runs if (evaluation := run.find_evaluation(split))]
    for name in dict.fromkeys(measured.name for each in evaluations for measured in each.measured):
        found = [(run.name, measured) for run in runs if (measured := run.find_measure(name, split))]
        for n, (run_name, measured) in enumerate(found):
            yield _MeasureRow(run_name, measured, 0 if n else len(found))


@dataclass(frozen=True)
class _Answer:
    when: str
    text: str
    kind: str | None


def _list_samples(runs: Sequence[Run]) -> Iterator[tuple[str, bool, list[_Answer]]]:
    """List the first run's samples, each with the answers of the other runs to the same prompt."""
    for sample in runs[0].samples if runs else ():
        answers = [_Answer("before", sample.before, sample.before_kind)]
        for run in runs:
            other = next((each for each in run.record.samples if each.example_id == sample.example_id), None)
            if other:
                when = "after" if len(runs) == 1 else f"after {run.name}"
                answers.append(_Answer(when, other.after, other.after_kind))
        yield sample.prompt, sample.is_own, answers


@dataclass(frozen=True)
class _MovedGroup:
    title: str
    note: str
    examples: Sequence[MovedExample]


def _list_moved(runs: Sequence[Run]) -> Iterator[_MovedGroup]:
    for run in runs:
        # The first half gained most, the second half lost most.
        half = (len(run.moved) + 1) // 2
        gains, losses = run.moved[:half], run.moved[half:][::-1]
        if len(runs) > 1:
            gains, losses = gains[:_EXAMPLES_PER_RUN], losses[:_EXAMPLES_PER_RUN]
        name = f", {run.name}" if len(runs) > 1 else ""
        lost = "Largest losses" if any(example.gain < 0 for example in losses) else "Smallest gains (no losses)"
        for title, examples in ((f"Largest gains{name}", gains), (lost + name, losses)):
            if examples:
                tokens = (token for example in examples for answer in example.answers.values() for token in answer)
                has_colours = any(token.ratio is not None for token in tokens)
                note = "Not coloured: the run used no reference, or the cache lacks log-probs of single tokens."
                yield _MovedGroup(title, "" if has_colours else note, examples)


def _pieces(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """Yield each token with its text, in which line ends and tabs are visible."""
    yield from zip(tokens, visible_tokens([token.text for token in tokens]), strict=True)


# -- provenance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Provenance:
    """The inputs of one stage."""

    title: str
    rows: Sequence[tuple[str, str]]
    settings: str  # as YAML


def _list_provenance(facts: Facts) -> Iterator[_Provenance]:
    inputs, scored = facts.prepared.inputs, facts.scored
    rows: dict[str, Any] = {
        "prepared data": facts.prepared_id,
        "made from": inputs.data,
        "tokenizer": inputs.tokenizer_id,
        **({"image processor": inputs.processor_id} if inputs.processor_id else {}),
        "shards": [
            *facts.prepared.shards,
            *facts.prepared.images,
            *facts.prepared.image_files,
            facts.prepared.quarantine,
        ],
        "chat template": facts.prepared.template,
        "date in the template": facts.prepared.date,
    }
    yield _Provenance("Data", _format_rows(rows), _to_yaml(inputs.config))
    if scored:
        rows = {
            "model": scored.reference.name,
            "model id": scored.reference.model_id,
            "cache": scored.cache,
            **{f"numerics {name}": record for name, record in scored.numerics.items()},
            "shards": scored.shards,
            "versions": scored.inputs.versions,
        }
        yield _Provenance("Reference", _format_rows(rows), _to_yaml(scored.inputs.config))
    for run in facts.runs:
        provenance, manifest = run.record.provenance, run.record.manifest
        config = run.record.folder / "config.yaml"
        rows = {
            "commands": [f"prefcache {stage} {config}" for stage in ("prepare", "score", "train")],
            **{name.replace("_", " "): value for name, value in provenance.facts().items() if name != "inputs"},
            **{f"from {name}": getattr(provenance.inputs, name) for name in _RUN_INPUTS},
            "model files": manifest and manifest.model,
            **{f"parts of {table}": entries for table, entries in run.record.parts.items()},
        }
        yield _Provenance(f"Run {run.name}", _format_rows(rows), run.record.config)


_RUN_INPUTS = ("prepared", "reference", "numerics", "policy")


def _format_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _format_value(value)) for name, value in facts.items() if value not in (None, [], {}, "")]


def _format_value(value: Any) -> str:
    """Format files as names and checksums, other records as names and values, and lists as one item per line."""
    if isinstance(value, FileEntry):
        return f"{value.file} (xxh3 {value.xxh3_128})"
    if isinstance(value, Mapping):
        if {"file", "xxh3_128"} <= value.keys():
            return f"{value['file']} (xxh3 {value['xxh3_128']})"
        return ", ".join(f"{name} {_format_value(each)}" for name, each in value.items())
    return "\n".join(map(_format_value, value)) if isinstance(value, list) else str(value)


def _to_yaml(settings: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
