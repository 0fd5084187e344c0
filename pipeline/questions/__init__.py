"""Ready questions about any data set and run: `prefcache ask`.

One .sql file each. Its first comment is its help; the comments after it declare its parameters as `-- name = default: help`,
which the query reads as $name. To add a question, add a file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError, look_up

_PARAMETER = re.compile(r"-- (\w+) = ([^:]+): (.+)")


@dataclass(frozen=True)
class Parameter:
    default: Any
    help: str

    def parse(self, name: str, text: str) -> Any:
        """Parse a setting: a number if the default is one, else the text itself, since a run may be called 1. null is None."""
        if text == "null":
            return None
        if not isinstance(self.default, int | float):
            return text
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"--set {name}={text}: expected a number, such as {json.dumps(self.default)}.")
        return value


@dataclass(frozen=True)
class Question:
    name: str
    help: str
    parameters: Mapping[str, Parameter]
    sql: str

    def values(self, settings: Mapping[str, str]) -> dict[str, Any]:
        """Return the value of every parameter: as set, or its default."""
        hint = "" if self.parameters else "It has none."
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        for name, text in settings.items():
            values[name] = look_up(self.parameters, name, f"{self.name}.parameter", hint).parse(name, text)
        return values


def get_question(name: str) -> Question:
    return look_up(QUESTIONS, name, "", "prefcache ask lists them.", what="question")


def _parse(file: Path) -> Question:
    sql = file.read_text(encoding="utf-8")
    help_line, *lines = sql.splitlines()
    parameters = {}
    for line in lines:
        if not (match := _PARAMETER.fullmatch(line)):
            break
        parameters[match[1]] = Parameter(json.loads(match[2]), match[3])
    return Question(file.stem, help_line.removeprefix("--").strip(), parameters, sql)


QUESTIONS = {file.stem: _parse(file) for file in sorted(Path(__file__).parent.glob("*.sql"))}
