"""The registry of data formats.

A format is one function from a record to an example. Its parameters after the record are its options, each with a
default (`prepare.format_args`); its docstring's first line says what it reads, further lines say what one may stumble over.
Pictures are read in the same way for all formats, see prompt_images.py.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.preparing.example import Label, Pair, Ranking
from prefcache.pipeline.preparing.formats.prompt_images import place_images

Record = dict[str, Any]
Reader = Callable[..., Pair | Label | Ranking]
KINDS = {Pair: "pairs", Label: "labels", Ranking: "rankings"}


@dataclass(frozen=True)
class Format:
    name: str
    columns: tuple[str, ...]  # what it needs
    optional: tuple[str, ...]  # what it reads if present
    makes: str  # pairs, labels or rankings
    recognises: Callable[[Record], bool] | None  # None: read only when named
    reader: Reader

    @property
    def help(self) -> str:
        return inspect.cleandoc(self.reader.__doc__ or "").partition("\n")[0]

    @property
    def notes(self) -> str:
        """What follows the first line, as one paragraph."""
        return " ".join(inspect.cleandoc(self.reader.__doc__ or "").partition("\n")[2].split())

    @property
    def options(self) -> dict[str, Any]:
        parameters = list(inspect.signature(self.reader).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "help": self.help,
            "notes": self.notes,
            "makes": self.makes,
            "columns": self.columns,
            "optional": self.optional,
            "recognised": self.recognises is not None,
            "options": self.options,
        }

    def bind(self, arguments: Mapping[str, Any]) -> Reader:
        """Return the reader with the config's options; raise UsageError for an option that it does not have."""
        for name in arguments:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise UsageError(f"prepare.format_args: format {self.name} has no option {name!r}. It has: {known}.")
        return lambda record: place_images(self.reader(record, **arguments), record)


FORMATS: dict[str, Format] = {}


def data_format(
    *columns: str,
    optional: tuple[str, ...] = (),
    makes: type = Pair,
    when: Callable[[Record], bool] | None = None,
    name: str | None = None,
) -> Callable[[Reader], Reader]:
    """Register a format. `when` tells from a record's columns and their types whether this is its format."""

    def register(function: Reader) -> Reader:
        key = name or function.__name__
        assert key not in FORMATS, key
        FORMATS[key] = Format(key, columns, optional, KINDS[makes], when, function)
        return function

    return register


def get_format(name: str) -> Format:
    return look_up(FORMATS, name, "prepare.format", "`prefcache formats` lists all of them.")
