"""sql and ask: queries and ready questions about data, references and runs. Only what a query reads is opened."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache import view_sources
from prefcache.pipeline import views
from prefcache.pipeline.questions import Question, Verdict, get_question
from prefcache.pipeline.stored import duckdb_connection, overwrite_guard
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.views import query_worker


class Experiment:
    """An experiment's folder, and a process that answers queries about it."""

    def __init__(self, where: str | None) -> None:
        """Open the folder or the config that is named; None for the only experiment in runs/."""
        self.folder = view_sources.find_experiment(where)
        self.inputs = overwrite_guard.Inputs(experiment=self.folder).with_files(where)
        self._worker = query_worker.Worker(lambda: Database(self.folder))

    @contextlib.contextmanager
    def ask_question(
        self, question: str | Question, settings: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator["AnsweredQuestion"]:
        """Answer a ready question; `settings` are its parameters that are not at their defaults."""
        if isinstance(question, str):
            question = get_question(question)
        values = question.values(settings or {})
        query = views.Query(question.sql, question.numbers)
        if question.shares_rows:
            query = views.Query(question.listing, question.numbers, answer=question.select)
        with self.ask(query, values, timeout) as answer:
            yield AnsweredQuestion(question, values, answer)

    def ask(
        self, query: str | views.Query, parameters: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> contextlib.AbstractContextManager[query_worker.Answer]:
        """Answer one SELECT. The answer must be read within `timeout` seconds."""
        bounds = query_worker.Bounds(
            "The query",
            timeout,
            "Ask for less, or give it more time (--timeout; in Python, timeout=).",
            "Ask for fewer rows or columns at once.",
        )
        return self._worker.ask(query, parameters, bounds)

    def close(self) -> None:
        """End the process. The next query starts another."""
        self._worker.close()

    def describe(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Describe every view, including the columns for the metrics of this experiment's runs."""
        return views.describe(view_sources.collect(self.folder, {"metrics"}))


@dataclass(frozen=True)
class AnsweredQuestion:
    """A ready question with its rows, which stream, and its verdict."""

    question: Question
    parameters: Mapping[str, Any]
    answer: query_worker.Answer

    def verdict(self) -> Verdict:
        """Judge by all the data. Rows that were not read yet are skipped."""
        return self.question.judge(self.answer.numbers(), self.parameters)


class Database:
    """The parts of an experiment that queries have read so far, and the tables of an extension."""

    def __init__(
        self, folder: Path, extension: views.Extension | None = None, prepared: Prepared | None = None
    ) -> None:
        self._folder, self._extension, self._prepared = folder, extension, prepared
        self._opened: set[str] = set()
        self._sources = views.Sources()
        self._con: Any = None

    def open(self, query: views.Query) -> None:
        needed = query.find_stored_tables(self._extension)
        # A locked database cannot be extended, so open another when a query reads more than those before it.
        if self._con is None or not needed <= self._opened or duckdb_connection.find_missing(self._sources.files):
            needed |= self._opened
            sources = view_sources.collect(self._folder, needed, prepared=self._prepared)
            self._con, self._sources, self._opened = views.connect(sources, self._extension), sources, needed

    def ask(self, query: views.Query, parameters: Mapping[str, Any] | None) -> views.Result:
        return views.ask(self._con, query, self._sources.files, parameters, self._extension)
