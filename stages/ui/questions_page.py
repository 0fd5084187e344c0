"""The ready questions: all of them with their help, and each with its verdict and its rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.questions import QUESTIONS, Question, get_question
from prefcache.ui import pages
from prefcache.ui.reader import Reader

_ID = "example_id"


def show(reader: Reader, request: Request) -> Response:
    """List the questions; with `verdicts=all`, each with its verdict, which takes a while."""
    has_verdicts = request.query_params.get("verdicts") == "all"
    return pages.render(
        "questions", section="/questions", reader=reader, questions=QUESTIONS.values(), has_verdicts=has_verdicts
    )


def show_verdict(reader: Reader, request: Request) -> Response:
    question = _find(request)
    return pages.render_part(request, "verdict", reader=reader, verdict=reader.questions.judge(question))


def show_question(reader: Reader, request: Request) -> Response:
    question, error = _find(request), ""
    settings = _read_settings(request, question)
    try:
        question.values(settings)
    except UsageError as problem:
        error = str(problem)
    return pages.render(
        "question",
        section="/questions",
        status=400 if error else 200,
        reader=reader,
        question=question,
        fields=[(name, settings.get(name, ""), each) for name, each in question.parameters.items()],
        answer=pages.address(f"/questions/{question.name}/answer", settings.items()),
        error=error,
    )


def show_answer(reader: Reader, request: Request) -> Response:
    question = _find(request)
    answer = reader.questions.ask(question, _read_settings(request, question))
    ids = _list_ids(answer.columns, answer.rows)
    known = {each for each in ids if reader.find(each) is not None} if len(ids) else set()
    return pages.render_part(
        request,
        "answer",
        reader=reader,
        question=question,
        answer=answer,
        ids=[each for each in ids if each in known],
        is_id=[column == _ID or column.endswith(f"_{_ID}") for column in answer.columns],
        is_number=list(_find_numbers(answer.columns, answer.rows)),
    )


def _find(request: Request) -> Question:
    return get_question(request.path_params["name"])


def _read_settings(request: Request, question: Question) -> Mapping[str, str]:
    """Read the parameters that have a value, so that an empty field means the default."""
    query = request.query_params
    return {name: query[name].strip() for name in question.parameters if query.get(name, "").strip()}


def _list_ids(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the examples that the rows are about, each once."""
    if _ID not in columns:
        return []
    at = list(columns).index(_ID)
    return list(dict.fromkeys(str(row[at]) for row in rows))


def _find_numbers(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[bool]:
    for at, _ in enumerate(columns):
        values = [row[at] for row in rows if row[at] is not None]
        yield bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
