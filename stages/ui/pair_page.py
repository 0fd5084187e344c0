"""One example: its texts with coloured tokens, its facts, its visits over training, and its neighbours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from prefcache.pipeline.browsing.neighbours import Neighbours, find_neighbours
from prefcache.pipeline.browsing.queries import Query
from prefcache.pipeline.spans import counted_positions
from prefcache.pipeline.token_colours import RATIO_SHADES, SURPRISE_SHADES, choose_colour
from prefcache.pipeline.visible_text import visible_tokens
from prefcache.ui import line_svg, pages
from prefcache.ui.image_reader import place
from prefcache.ui.line_svg import Line
from prefcache.ui.reader import Reader, Row
from prefcache.ui.token_reader import Logps, RunLogps

# The one answer of a label is shown, not the mismatched one next to it.
_ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion",)}
_MOST_NEIGHBOURS = 20  # of each group
_CURVES = {
    "pairs": (
        ("reward margin", "margin"),
        ("log-ratio of the chosen answer", "chosen_logp - ref_chosen_logp"),
        ("log-ratio of the rejected answer", "rejected_logp - ref_rejected_logp"),
    ),
    "labels": (("reward", "completion_reward"), ("log-ratio", "completion_logp - ref_completion_logp")),
}


def show(reader: Reader, request: Request) -> Response:
    if (position := _find(reader, request)) is None:
        return _refuse(reader, request)
    table = reader.examples.slice(position, 1)
    (row,) = table.to_pylist()
    names = [name for name in _ANSWERS[reader.kind] if row[f"{name}_ids"] is not None]
    images, choice = reader.images.list(row["images"]), _Choice.parse(request, reader.runs)
    texts, no_texts = reader.tokens.read_texts(row, names)
    reference, no_reference = reader.tokens.read_reference(table, names)
    runs = {run: reader.tokens.read_run(run, row, names, compute=choice.compute) for run in choice.runs}
    colouring = _Colouring.choose(choice, reference, runs)
    context = {
        "row": row,
        "prompt": list(place(row["prompt"] or "", images)),
        "choice": choice,
        "colouring": colouring,
        "runs_shown": list(runs.values()),
        "answers": [_show_answer(name, row, texts.get(name), reference, runs, colouring) for name in names],
        "no_texts": no_texts,
        "no_reference": no_reference,
        "facts": [*_list_facts(reader, row, names), *_list_margins(reader, position)],
        "path": f"/pairs/{row['example_id']}",
    }
    return pages.render("pair", section="/pairs", reader=reader, **context)


def show_visits(reader: Reader, request: Request) -> Response:
    """Draw what every run made of the example at each of its visits."""
    if (position := _find(reader, request)) is None:
        return _refuse(reader, request)
    example_id = reader.examples["example_id"][position].as_py()
    curves = _CURVES[reader.kind]
    values = ", ".join(sql for _, sql in curves)
    query = f"select run, step, {values} from steps where example_id = $id order by run, step"
    visits = reader.ask(Query(query, {"id": example_id})) if reader.runs else []
    charts = [
        line_svg.draw(title, lines)
        for n, (title, _) in enumerate(curves)
        if (lines := list(_draw_visits(reader.runs, visits, n + 2)))
    ]
    colours = {run: line_svg.choose_colour(number) for number, run in enumerate(reader.runs)}
    sentences = [_describe_visits(run, [visit for visit in visits if visit[0] == run], curves) for run in reader.runs]
    return pages.render_part(request, "visits", reader=reader, charts=charts, colours=colours, sentences=sentences)


def show_neighbours(reader: Reader, request: Request) -> Response:
    if (position := _find(reader, request)) is None:
        return _refuse(reader, request)
    found = find_neighbours(reader.examples, position, reader.kind)
    groups = list(_list_groups(reader, found))
    return pages.render_part(request, "neighbours", reader=reader, groups=groups)


def _find(reader: Reader, request: Request) -> int | None:
    return reader.find(request.path_params["example_id"])


def _refuse(reader: Reader, request: Request) -> Response:
    message = f"There is no example {request.path_params['example_id']!r} in {reader.folder}. Choose one from the list of its examples."
    return pages.render("error", section="/pairs", status=404, reader=reader, message=message)


# -- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What the address asks to colour by: the reference, a run against the reference, or a run against another."""

    run: str = ""
    minus: str = ""
    compute: bool = False  # what is not stored, with the runs' models

    @classmethod
    def parse(cls, request: Request, known: Sequence[str]) -> "_Choice":
        query = request.query_params
        run, minus = (name if (name := query.get(key, "")) in known else "" for key in ("run", "minus"))
        return cls(run, minus if run and minus != run else "", query.get("compute") == "yes")

    @property
    def runs(self) -> list[str]:
        return [run for run in (self.run, self.minus) if run]


@dataclass(frozen=True)
class _Colouring:
    """What the colours show; without a title, nothing."""

    title: str = ""
    values: Mapping[str, Sequence[float | None]] | None = None  # of each answer's tokens
    is_ratio: bool = False

    @classmethod
    def choose(cls, choice: _Choice, reference: Logps, runs: Mapping[str, RunLogps]) -> "_Colouring":
        if not choice.run:
            return cls("how likely the reference finds the tokens", reference) if reference else cls()
        policy = runs[choice.run].logps
        other, name = (runs[choice.minus].logps, choice.minus) if choice.minus else (reference, "the reference")
        if policy and other:
            ratios = {answer: _subtract(policy[answer], other[answer]) for answer in policy if answer in other}
            return cls(f"how much more likely {choice.run} finds the tokens than {name}", ratios, is_ratio=True)
        return cls(f"how likely {choice.run} finds the tokens", policy) if policy and not choice.minus else cls()

    def colour(self, value: float | None) -> str:
        return choose_colour(value, RATIO_SHADES if self.is_ratio else SURPRISE_SHADES)


@dataclass(frozen=True)
class _Token:
    number: int  # in the answer, from 1
    text: Markup  # made visible next to its neighbours, which a joiner depends on
    counts: bool
    value: float | None  # that colours it
    colour: str
    logps: Sequence[float | None]  # of the reference and the runs shown


@dataclass(frozen=True)
class _Answer:
    name: str
    text: str
    tokens: Sequence[_Token]  # none if the tokenizer is unknown
    n_tokens: int
    n_counted: int
    n_turns: int
    sum: float | None  # of the values of the tokens that count


def _show_answer(
    name: str,
    row: Mapping[str, Any],
    texts: Sequence[str] | None,
    reference: Logps,
    runs: Mapping[str, RunLogps],
    colouring: _Colouring,
) -> _Answer:
    n, spans = len(row[f"{name}_ids"]), row[f"{name}_spans"]
    counted = set(counted_positions(np.array(spans, np.int32)).tolist())
    nothing: Sequence[float | None] = [None] * n
    values = (colouring.values or {}).get(name, nothing)
    columns = [reference.get(name, nothing), *(each.logps.get(name, nothing) for each in runs.values())]
    tokens = [
        _Token(
            i + 1,
            escape(text),
            i in counted,
            values[i],
            _colour(colouring, values[i], i in counted),
            [c[i] for c in columns],
        )
        for i, text in enumerate(visible_tokens(texts or []))
    ]
    used = [value for i, value in enumerate(values) if i in counted and value is not None]
    return _Answer(
        name=name,
        text=row[name] or "",
        tokens=tokens,
        n_tokens=n,
        n_counted=len(counted),
        n_turns=len(spans) // 2,
        sum=sum(used) if used else None,
    )


def _colour(colouring: _Colouring, value: float | None, counts: bool) -> str:
    return colouring.colour(value) if counts else "uncounted"


def _subtract(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


# -- facts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    is_key: bool = False  # to be copied


def _list_facts(reader: Reader, row: Mapping[str, Any], names: Sequence[str]) -> Iterator[_Fact]:
    yield _Fact("example_id", row["example_id"], is_key=True)
    yield _Fact("source", f"{row['source']}, line {row['line']:,}")
    yield _Fact("split", row["split"])
    if row.get("label") is not None:
        yield _Fact("label", "desirable" if row["label"] else "undesirable")
    cut = f"; {row['cut_prompt']:,} more were cut from its beginning" if row["cut_prompt"] else ""
    yield _Fact("prompt", f"{row['n_prompt']:,} tokens{cut}")
    if images := row["images"]:
        counts = [reader.images.stored.facts(image).n_tokens for image in images]
        tokens = "" if None in counts else f"; {sum(filter(None, counts)):,} of the prompt's tokens stand for them"
        yield _Fact("images", f"{len(images):,}{tokens}")
    for name in names:
        yield _Fact(name, ", ".join(_describe_lengths(row, name)))
        yield _Fact(f"{name} key", row[f"{name}_key"].hex(), is_key=True)
    if row.get("n_common"):
        yield _Fact("both answers begin with", f"{row['n_common']:,} common tokens")
    if row["boundary"] != "exact":
        yield _Fact("boundary", "split: the prompt's tokens are not how the whole conversation begins")


def _list_margins(reader: Reader, position: int) -> Iterator[_Fact]:
    """List how far each reference that scored the pair prefers its chosen answer."""
    if reader.kind != "pairs":
        return
    query = "select reference, used, margin, margin_per_token from pairs where position = $position and margin is not null order by used desc, reference"
    for name, used, margin, per_token in reader.ask(Query(query, {"position": position})):
        yield _Fact(
            "reference margin" if used else f"margin of {name}", f"{margin:+.3f} nats, {per_token:+.4f} per token"
        )


def _describe_lengths(row: Mapping[str, Any], name: str) -> Iterator[str]:
    n, counted = row[f"n_{name}"], row[f"n_{name}_counted"]
    yield f"{n:,} tokens"
    if counted < n:
        yield f"{counted:,} of them count"
    if (turns := len(row[f"{name}_spans"]) // 2) > 1:
        yield f"in {turns} turns"
    if row[f"cut_{name}"]:
        yield f"{row[f'cut_{name}']:,} more were cut from its end"
    if (grade := row.get(f"{name}_score")) is not None:
        yield f"grade {grade:g}"


# -- visits and neighbours -------------------------------------------------------------------------------------------


def _draw_visits(runs: Sequence[str], visits: Sequence[Sequence[Any]], column: int) -> Iterator[Line]:
    for number, run in enumerate(runs):
        points = [(visit[1], visit[column]) for visit in visits if visit[0] == run and visit[column] is not None]
        if points:
            yield Line(run, line_svg.choose_colour(number), points)


def _describe_visits(run: str, visits: Sequence[Sequence[Any]], curves: Sequence[tuple[str, str]]) -> str:
    if not visits:
        return f"{run} has not visited it."
    if len(visits) > 1:
        return f"{run} visited it {len(visits):,} times, at steps {visits[0][1]:,} to {visits[-1][1]:,}."
    (_, step, *values) = visits[0]
    known = ", ".join(
        f"{title} {value:+.3f}" for (title, _), value in zip(curves, values, strict=True) if value is not None
    )
    return f"{run} visited it once, at step {step:,}, which is a dot and no curve: {known}."


@dataclass(frozen=True)
class _Group:
    title: str
    help: str
    n: int
    rows: Sequence[Row]  # the first of them


def _list_groups(reader: Reader, found: Neighbours) -> Iterator[_Group]:
    groups = (
        ("Contradictions", "the same prompt and answers, preferred the other way round", found.contradictions),
        ("Duplicates", "the same prompt and answers, token by token", found.duplicates),
        ("Same prompt", "other answers to the same prompt", found.same_prompt),
    )
    for title, help, positions in groups:
        if len(positions):
            yield _Group(title, help, len(positions), reader.read_texts(positions[:_MOST_NEIGHBOURS].tolist()))
