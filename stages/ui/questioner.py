"""Ask an experiment's ready questions for the pages, one at a time."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache.commands.query import Experiment
from prefcache.pipeline.questions import Question

MOST_ROWS = 200  # on a page
_SECONDS = 300.0  # for one question, from when it is its turn


@dataclass(frozen=True)
class Answer:
    verdict: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]  # the first of them
    n_rows: int


class Questioner:
    """Keeps what the questions have opened so far."""

    def __init__(self, folder: Path) -> None:
        self._experiment, self._lock = Experiment(str(folder)), threading.Lock()

    def close(self) -> None:
        self._experiment.close()

    def ask(self, question: Question, settings: Mapping[str, str]) -> Answer:
        with self._lock, self._experiment.ask_question(question, settings, _SECONDS) as answered:
            rows, n_rows = [], 0
            for row in answered.answer.rows():
                n_rows += 1
                if n_rows <= MOST_ROWS:
                    rows.append(row)
            return Answer(answered.verdict().sentence, answered.answer.columns, rows, n_rows)

    def judge(self, question: Question) -> str:
        """Return the verdict alone."""
        with self._lock, self._experiment.ask_question(question, timeout=_SECONDS) as answered:
            return answered.verdict().sentence
