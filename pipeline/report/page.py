"""The page: one HTML file with its style and its figures in it, and no script.

Everything that is printed is escaped by the template, and what would not be seen, or would move the text around it, is shown
by name (visible.py). The same facts give the same bytes: there is no date on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from pipeline.report import charts, words
from pipeline.report.data import Data
from pipeline.report.figures import INK, RUNS
from pipeline.report.reference import Reference
from pipeline.report.runs import Run, Shown, Token
from pipeline.report.visible import visible

MOST_RUNS = len(RUNS)  # compared on one page, each in its colour
_HERE = Path(__file__).parent
_SHADES = (0.05, 0.2, 0.5, 2.0)  # nats, from which a token has the next colour
_FEW = 2  # examples shown of those that each of several runs gained, and lost, most


@dataclass(frozen=True)
class Facts:
    """All that the page says."""

    experiment: str
    config: str  # as a command names it
    prepared: Mapping[str, Any]  # the manifest
    prepared_id: str
    scored: Mapping[str, Any] | None
    data: Data
    reference: Reference | None
    runs: Sequence[Run]


def render(facts: Facts) -> str:
    """The file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "visible": visible,
        "figure": words.figure,
        "interval": words.interval,
        "tiny": words.tiny,
        "token": _token,
        "colour": _colour,
    }
    return environment.get_template("report.html.j2").render(_context(facts))


def _context(facts: Facts) -> dict[str, Any]:
    runs = facts.runs
    of_all = [{"run": run.name, **alert} for run in runs for alert in run.alerts]
    alerts = [{"number": number, **alert} for number, alert in enumerate(of_all, 1)]
    of_what = facts.data, facts.reference, runs
    return {
        "title": ", ".join(run.name for run in runs) or facts.experiment,
        "experiment": facts.experiment,
        "style": Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        "version": version("prefcache"),
        "summary": list(words.summary(*of_what)),
        "glance": list(words.glance(*of_what)),
        "sections": list(_sections(facts)),
        "runs": runs,
        "measured": _measured(runs),
        "overview": [words.overview(run) for run in runs],
        "legend": list(_legend(runs)),
        "curves": list(charts.of_runs(runs, alerts)),
        "alerts": alerts,
        "watched": any(run.watched for run in runs),
        "samples": _samples(runs),
        "n_samples": max((len(run.record.samples) for run in runs), default=0),
        "shown": list(_shown(runs)),
        "reference": facts.reference,
        "reference_figures": list(charts.of_reference(facts.reference)) if facts.reference else [],
        "data": facts.data,
        "data_figures": list(charts.of_data(facts.data)),
        "missing": list(_missing(facts)),
        "provenance": list(_provenance(facts)),
    }


def _sections(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.runs:
        yield "held-out", "Before and after"
        yield "run", "The runs" if len(facts.runs) > 1 else "The run"
        yield "samples", "Answers"
        yield "examples", "Gained and lost"
    if facts.reference:
        yield "reference", "The reference"
    yield "data", "The data"
    if list(_missing(facts)):
        yield "missing", "Not here yet"
    yield "provenance", "Provenance"


def _missing(facts: Facts) -> Iterator[dict[str, str]]:
    if facts.reference is None:
        yield {
            "what": "The reference has not read this data. This runs it, once:",
            "command": f"prefcache score {facts.config}",
        }
    if not facts.runs:
        yield {
            "what": "Nothing has been trained. This trains, and measures before and after:",
            "command": f"prefcache train {facts.config}",
        }


# -- runs ------------------------------------------------------------------------------------------------------------


def _measured(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the table: each measure, of each run."""
    names = dict.fromkeys(measured.name for run in runs for measured in run.measured)
    rows = []
    for name in names:
        of_runs = [(run.name, measured) for run in runs if (measured := run.of(name))]
        for n, (run_name, measured) in enumerate(of_runs):
            rows.append({"run": run_name, "measured": measured, "first": n == 0, "span": len(of_runs)})
    return rows


def _legend(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Of several runs, which all figures share. Figures of a single one have their own."""
    if len(runs) > 1:
        for run, colour in zip(runs, RUNS, strict=False):
            yield {"name": run.name, "colour": colour, "dashed": False}
        yield {"name": "rejected answers, where a run has two lines", "colour": INK, "dashed": True}


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the first run shows, and beside it what the others answered to the same prompt."""
    found = []
    for sample in runs[0].samples if runs else ():
        answers = [{"when": "before", "text": sample["before"], "kind": sample["before_kind"]}]
        for run in runs:
            for other in run.record.samples:
                if other["example_id"] == sample["example_id"]:
                    when = "after" if len(runs) == 1 else f"after {run.name}"
                    answers.append({"when": when, "text": other["after"], "kind": other["after_kind"]})
                    break
        found.append({"prompt": sample["prompt"], "answers": answers})
    return found


def _shown(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        half = (len(run.shown) + 1) // 2
        gained, lost = run.shown[:half], run.shown[half:][::-1]
        if len(runs) > 1:
            gained, lost = gained[:_FEW], lost[:_FEW]
        named = f", {run.name}" if len(runs) > 1 else ""
        for title, examples in ((f"Gained most{named}", gained), (_losses(lost) + named, lost)):
            if examples:
                yield {"title": title, "note": _note(examples), "examples": examples}


def _losses(examples: Sequence[Shown]) -> str:
    return "Lost most" if any(example.gain < 0 for example in examples) else "Gained least (none lost)"


def _note(examples: Sequence[Shown]) -> str:
    uncoloured = any(token.ratio is None for each in examples for tokens in each.answers.values() for token in tokens)
    return (
        "Without colours: the run read no reference, or the cache has no log-probs of single tokens."
        if uncoloured
        else ""
    )


def _token(text: str) -> str:
    """Where a line ends is part of what a model writes, and would not be seen."""
    return visible(text).replace("\n", "\N{RETURN SYMBOL}\n").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}\t")


def _colour(token: Token) -> str:
    if token.ratio is None or abs(token.ratio) < _SHADES[0]:
        return "even"
    shade = sum(abs(token.ratio) >= least for least in _SHADES)
    return f"{'up' if token.ratio > 0 else 'down'} by{shade}"


# -- provenance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """From what one thing was made."""

    title: str
    rows: list[tuple[str, str]]
    settings: str  # as YAML


def _provenance(facts: Facts) -> Iterator[_Made]:
    yield _of_data(facts)
    if facts.scored:
        yield _of_reference(facts.scored)
    yield from map(_of_run, facts.runs)


def _of_data(facts: Facts) -> _Made:
    inputs = facts.prepared["inputs"]
    rows = {
        "prepared data": facts.prepared_id,
        "made from": inputs["data"],
        "tokenizer": inputs["tokenizer_id"],
        "shards": [*facts.prepared["shards"], facts.prepared["quarantine"]],
        "chat template": facts.prepared["template"],
        "date in the template": facts.prepared["date"],
    }
    return _Made("Data", _rows(rows), _yaml(inputs["config"]))


def _of_reference(scored: Mapping[str, Any]) -> _Made:
    rows = {
        "model": scored["reference"]["name"],
        "model id": scored["reference"]["model_id"],
        "cache": scored["cache"],
        **{f"numerics {name}": record for name, record in scored["numerics"].items()},
        "shards": scored["shards"],
        "versions": scored["inputs"]["versions"],
    }
    return _Made("Reference", _rows(rows), _yaml(scored["inputs"]["config"]))


def _of_run(run: Run) -> _Made:
    facts, manifest = run.record.provenance, run.record.manifest or {}
    config = run.record.folder / "config.yaml"
    rows = {
        "commands": [f"prefcache {stage} {config}" for stage in ("prepare", "score", "train")],
        **{name.replace("_", " "): value for name, value in facts.items() if name != "inputs"},
        **{f"from {name}": facts["inputs"][name] for name in ("prepared", "reference", "numerics", "policy")},
        "model files": manifest.get("model"),
        **{f"parts of {table}": entries for table, entries in run.record.parts.items()},
    }
    return _Made(f"Run {run.name}", _rows(rows), run.record.config)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in facts.items() if value not in (None, [], {}, "")]


def _plain(value: Any) -> str:
    """Of files their names and checksums, of other things what they are called and what they are; a line for each of many."""
    if isinstance(value, Mapping):
        if "xxh3_128" in value:
            return f"{value['file']} (xxh3 {value['xxh3_128']})"
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return "\n".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _yaml(settings: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
