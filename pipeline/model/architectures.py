"""The architectures that were measured, and how sequences share a forward of each.

They are tiny random models of every class that Transformers loads as a causal language model: tests/architectures.py measures
them (`make architectures`) and writes architectures.json, which `prefcache architectures` shows.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from prefcache.pipeline.errors import UsageError

TABLE = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True)
class Architecture:
    model_type: str  # as in its config.json
    model_class: str | None
    is_decoder: bool | None  # set if this setting of its config was changed
    layout: str  # shared, packed, padded, refused, or not run
    attention: str | None = None
    reason: str | None = None  # why no better layout, or why refused
    deviation: float | None = None  # largest deviation of a token's log-prob from the plain forward's, in nats
    gradient: float | None = None  # relative norm of the deviation of one step's gradient
    training: str | None = None  # why it can only be scored


@dataclass(frozen=True)
class Table:
    measured: dict[str, str]  # the date and the versions
    rows: list[Architecture]


def load(name: str | None = None) -> Table:
    """Load the shipped table; with a name, the rows whose model type or class contains it."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [Architecture(**row) for row in stored["architectures"]]
    if name is None:
        return Table(stored["measured"], rows)
    matches = [row for row in rows if name.lower() in f"{row.model_type} {row.model_class}".lower()]
    if not matches:
        close = difflib.get_close_matches(name, [row.model_type for row in rows], n=1)
        hint = f"The nearest is {close[0]}. " if close else ""
        raise UsageError(f"No architecture is called {name!r}. {hint}`prefcache architectures` lists all of them.")
    return Table(stored["measured"], matches)


def write(measured: dict[str, str], rows: Iterable[Architecture]) -> None:
    stored = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
    lines = ",\n".join(json.dumps({"is_decoder": None} | row) for row in stored)
    TABLE.write_text(f'{{"measured": {json.dumps(measured)}, "architectures": [\n{lines}\n]}}\n', encoding="utf-8")
