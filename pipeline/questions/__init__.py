"""Questions that come up with every data set and every run, ready to ask: `prefcache ask`.

One .sql file each. Its first comment is its help; the comments after it declare its parameters, `-- name = default: help`, which
the query reads as $name. To add a question, add a file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError, named

_PARAMETER = re.compile(r"-- (\w+) = ([^:]+): (.+)")


@dataclass(frozen=True)
class Parameter:
    default: Any
    help: str

    def read(self, name: str, text: str) -> Any:
        """A number where the default is one, else a word, also one of digits: a run may be called 1. null is none."""
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
        """Of every parameter: what is said, or its default."""
        none = "" if self.parameters else "It has none."
        said = {
            key: named(self.parameters, key, f"{self.name}.parameter", none).read(key, text)
            for key, text in settings.items()
        }
        return {key: parameter.default for key, parameter in self.parameters.items()} | said


def question(name: str) -> Question:
    return named(QUESTIONS, name, "question", "prefcache ask lists them.")


def _read(file: Path) -> Question:
    sql = file.read_text(encoding="utf-8")
    first, _, rest = sql.partition("\n")
    parameters = {}
    for line in rest.splitlines():
        if not (found := _PARAMETER.fullmatch(line)):
            break
        parameters[found[1]] = Parameter(json.loads(found[2]), found[3])
    return Question(file.stem, first.removeprefix("--").strip(), parameters, sql)


QUESTIONS = {file.stem: _read(file) for file in sorted(Path(__file__).parent.glob("*.sql"))}
