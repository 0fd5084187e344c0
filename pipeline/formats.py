"""Data formats: from a user's record to our one shape.

One function per format. It returns an Example or raises Unusable with the reason, which sends the record to quarantine.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import named
from pipeline.example import Example, Message, Turns, Unusable, plain_text

Reader = Callable[[dict[str, Any]], Example]


@dataclass(frozen=True)
class Format:
    name: str
    columns: tuple[str, ...]
    read: Reader


FORMATS: dict[str, Format] = {}


def data_format(*columns: str) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        FORMATS[function.__name__] = Format(function.__name__, columns, function)
        return function

    return register


def get_format(name: str) -> Format:
    return named(FORMATS, name, "prepare.format")


@data_format("prompt", "chosen", "rejected")
def pairs(record: dict[str, Any]) -> Example:
    """Ours and TRL's: prompt, chosen and rejected, each a string or a list of {role, content} messages."""
    for column in FORMATS["pairs"].columns:
        if column not in record:
            raise Unusable("missing column", f"{column!r}; found {', '.join(record) or 'none'}")
    example = Example(*(_turns(record[column], column) for column in FORMATS["pairs"].columns))
    for column in ("chosen", "rejected"):
        if not plain_text(getattr(example, column)).strip():
            raise Unusable("empty answer", column)
    if not plain_text(example.prompt).strip():
        raise Unusable("empty prompt")
    if plain_text(example.chosen) == plain_text(example.rejected):
        raise Unusable("chosen equals rejected")
    return example


def _turns(value: Any, column: str) -> Turns:
    if isinstance(value, str):
        return _sound(value, column)
    if isinstance(value, list):
        if not value:
            raise Unusable("empty prompt" if column == "prompt" else "empty answer", column)
        return [_message(message, column) for message in value]
    raise Unusable("wrong type", f"{column} is {_kind(value)}; expected text or a list of messages")


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, dict):
        raise Unusable("wrong type", f"{column} holds {_kind(message)}; expected messages with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Unusable("wrong type", f"{column}: a message's {key} is {_kind(message.get(key))}; expected text")
    # Keys that only some templates render count too.
    _sound(json.dumps(message, ensure_ascii=False), column)
    return message


def _sound(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("lone surrogate", f"in {column}") from None
    return text


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
