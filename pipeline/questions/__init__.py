"""Ready questions about any data set and run, each answered by rows and a verdict: `prefcache ask`.

One .sql file each. Its first comment is its help; the comments after it declare its parameters as `-- name = default: help`,
which the queries read as $name. Then come two SELECTs, with the line `-- verdict` between them: the rows, and one row of numbers
about all the data, from which a function of the question's name (data_verdicts.py, reference_verdicts.py, run_verdicts.py) makes
a sentence. The second may read the rows as the table `answer`, which has all of them: $limit is applied when they are listed. To
add a question, add a file and a function.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.questions import data_verdicts, reference_verdicts, run_verdicts  # noqa: F401 - they register themselves
from prefcache.pipeline.questions.verdict import JUDGES, Judge, Verdict

__all__ = ["QUESTIONS", "Parameter", "Question", "Verdict", "get_question"]

_PARAMETER = re.compile(r"-- (\w+) = ([^:]+): (.+)")
_VERDICT = "\n-- verdict\n"
_LIMIT = "limit"
_SHARE = (lambda value: 0 < value <= 1, "a share above 0 and up to 1")
# What a parameter of this name may be, and how to say that.
_BOUNDS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    _LIMIT: (lambda value: value >= 0 and value == int(value), "a whole number, or null for all rows"),
    "share": _SHARE,
    "similarity": _SHARE,
    "nats": (lambda value: value >= 0, "a number of 0 or more"),
    "epochs": (lambda value: value > 0, "a number above 0"),
}


@dataclass(frozen=True)
class Parameter:
    default: Any
    help: str

    def parse(self, name: str, value: Any) -> Any:
        """Parse a setting: a number if the default is one, else the text itself, since a run may be called 1. null is None."""
        if value in (None, "null") and (self.default is None or name == _LIMIT):
            return None
        if not isinstance(self.default, int | float):
            return str(value)
        number = value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                number = json.loads(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"--set {name}={value}: expected a number, such as {json.dumps(self.default)}.")
        is_allowed, expected = _BOUNDS.get(name, (lambda value: True, "a number"))
        if not math.isfinite(number) or not is_allowed(number):
            raise UsageError(f"--set {name}={value}: expected {expected}, such as {json.dumps(self.default)}.")
        return number


@dataclass(frozen=True)
class Question:
    name: str
    help: str
    parameters: Mapping[str, Parameter]
    select: str  # all rows
    numbers: str  # the numbers behind the verdict; may read the rows as `answer`
    judge: Judge

    @property
    def sql(self) -> str:
        """The SELECT of the rows to list."""
        return self.select + (f"limit ${_LIMIT}\n" if _LIMIT in self.parameters else "")

    @property
    def shares_rows(self) -> bool:
        """Whether the numbers read the rows, which are then computed once for both."""
        return re.search(r"\banswer\b", self.numbers) is not None

    @property
    def listing(self) -> str:
        """The SELECT of the rows to list, from the table `answer`."""
        return "select * from answer" + (f" limit ${_LIMIT}" if _LIMIT in self.parameters else "")

    def values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every parameter: as set, or its default."""
        hint = "" if self.parameters else "It has none."
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        for name, value in settings.items():
            values[name] = look_up(self.parameters, name, f"{self.name}.parameter", hint).parse(name, value)
        return values


def get_question(name: str) -> Question:
    return look_up(QUESTIONS, name, "", "prefcache ask lists them.", what="question")


def _parse(file: Path) -> Question:
    select, _, numbers = file.read_text(encoding="utf-8").partition(_VERDICT)
    help_line, *lines = select.splitlines()
    parameters = {}
    for line in lines:
        if not (match := _PARAMETER.fullmatch(line)):
            break
        parameters[match[1]] = Parameter(json.loads(match[2]), match[3])
    help = help_line.removeprefix("--").strip()
    return Question(
        file.stem,
        help,
        parameters,
        f"{select.rstrip()}\n",
        numbers,
        JUDGES[file.stem],
    )


QUESTIONS = {file.stem: _parse(file) for file in sorted(Path(__file__).parent.glob("*.sql"))}
