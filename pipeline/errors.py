"""What can go wrong for a user, by exit code. Each message says what was found, what was expected and what to do."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class PrefcacheError(Exception):
    """A mistake or a misfortune of the user's: one clear message and an exit code, never a traceback."""

    exit_code = 1


class UsageError(PrefcacheError):
    """A wrong argument, config key, path or model."""

    exit_code = 2


class DataError(PrefcacheError):
    """More unusable records than the threshold allows, or none that is usable."""

    exit_code = 3


class IntegrityError(PrefcacheError):
    """A stored file is damaged or missing, or a value is not what it must be."""

    exit_code = 4


class IdentityError(PrefcacheError):
    """Two things that must come from the same model, data or numerics do not."""

    exit_code = 5


class ResourceError(PrefcacheError):
    """Disk or memory ran out."""

    exit_code = 6


class AlertError(PrefcacheError):
    """A run raised an alert, and train.alerts is strict."""

    exit_code = 7


INTERRUPTED = 130


def named(registry: Mapping[str, T], name: str, key: str, listing: str = "") -> T:
    """What the config's `key` names in a registry, or UsageError with the nearest name. `listing`: where all are."""
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"The nearest is {near[0]}. " if near else ""
        what = key.rpartition(".")[2]
        known = listing or f"Known: {', '.join(sorted(registry))}."
        raise UsageError(f"{key}: there is no {what} {name!r}. {hint}{known}")
    return registry[name]
