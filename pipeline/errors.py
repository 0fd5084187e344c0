"""The errors that a user can see, by exit code. Each message says what was found, what was expected and what to do."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")


class PrefcacheError(Exception):
    """An error that the user can act on: one clear message and an exit code, never a traceback."""

    exit_code = 1
    kind: str  # of each error below, as in the JSON of --json


class UsageError(PrefcacheError):
    """A wrong argument, config key, path or model."""

    exit_code = 2
    kind = "usage"


class DataError(PrefcacheError):
    """More unusable records than the threshold allows, or none that is usable."""

    exit_code = 3
    kind = "data"


class IntegrityError(PrefcacheError):
    """A stored file is damaged or missing, or a value is not what it must be."""

    exit_code = 4
    kind = "integrity"


class IdentityError(PrefcacheError):
    """Two things that must come from the same model, data or numerics do not."""

    exit_code = 5
    kind = "identity"


class ResourceError(PrefcacheError):
    """Disk or memory ran out."""

    exit_code = 6
    kind = "resource"


class AlertError(PrefcacheError):
    """A run raised an alert, and train.alerts is strict."""

    exit_code = 7
    kind = "alert"


class CallbackError(PrefcacheError):
    """A callback of a run raised an error. The run can be resumed."""

    kind = "callback"


def look_up(registry: Mapping[str, T], name: str, key: str, listing: str = "", what: str = "") -> T:
    """Look up what the config's `key` names; UsageError with the nearest name.

    `listing` says where all names are; `what` says what they name, if there is no key.
    """
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"The nearest is {near[0]}. " if near else ""
        what = what or key.rpartition(".")[2]
        known = listing or f"Known: {', '.join(sorted(registry))}."
        message = f"there is no {what} {name!r}. {hint}{known}"
        raise UsageError(f"{key}: {message}" if key else message[0].upper() + message[1:])
    return registry[name]


def first_complaint(error: "ValidationError", within: str = "") -> str:
    """Put the first complaint of a validation into words: `rows = "many" (expected an integer)`. `within`: the key above."""
    first = error.errors(include_url=False)[0]
    where = ".".join([*([within] if within else []), *(str(part)[:40] for part in first["loc"][:6])])
    shown = f" = {first['input']!r}"[:80] if isinstance(first["input"], str | int | float | None) else ""
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:200]
    message = f"{message[:1].lower()}{message[1:]}"
    return f"{where}{shown} ({message})" if where else message


def first_line(error: Exception) -> str:
    """Return the first line of what a library's error says, or its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
