"""Columns of a record, each read with the one check that it is what it should be.

The readers raise Unusable, whatever JSON they find. The `has_` functions only look, for recognising a format.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline.preparing.example import Message, Turns, Unusable

Record = dict[str, Any]

# Who speaks, under the names that data sets use.
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}

# Columns of messages that hold what was asked, perhaps with its answer.
_ASKING = ("prompt", "context", "messages", "conversations")


def value(record: Record, column: str) -> Any:
    if column not in record:
        raise Unusable("missing column", f"{column!r}; found {', '.join(record) or 'none'}")
    return record[column]


def has(record: Record, *columns: str) -> bool:
    """Whether these columns are there and not null, as a table of several shapes leaves them."""
    return all(record.get(column) is not None for column in columns)


def has_text(record: Record, *columns: str) -> bool:
    return all(isinstance(record.get(column), str) for column in columns)


def has_messages(record: Record, *columns: str, role: str = "role") -> bool:
    return all(is_messages(record.get(column), role) for column in columns)


def is_messages(found: Any, role: str = "role") -> bool:
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and role in found[0]


def has_rows(record: Record, column: str, *keys: str) -> bool:
    """Whether a column holds a list of mappings with these keys."""
    found = record.get(column)
    first = found[0] if isinstance(found, list) and found else None
    return isinstance(first, dict) and all(key in first for key in keys)


def are_whole(record: Record, *columns: str) -> bool:
    """Whether these columns hold whole conversations, with what was asked, and not answers alone."""
    return has_messages(record, *columns) and all(record[column][0]["role"] != "assistant" for column in columns)


def text(record: Record, column: str) -> str:
    """A column of text; it may be empty."""
    found = value(record, column)
    if not isinstance(found, str):
        raise Unusable("wrong type", f"{column} is {kind(found)}; expected text")
    return found


def optional_text(record: Record, column: str) -> str:
    """A column of text that may be missing, null or NaN: then empty."""
    found = record.get(column)
    return "" if found is None or _is_nan(found) else text(record, column)


def turns(record: Record, column: str) -> Turns:
    """Text, or a list of messages with role and content."""
    found = value(record, column)
    return found if isinstance(found, str) else messages(found, column)


def conversation(record: Record, column: str) -> list[Message]:
    """A column that holds a list of messages."""
    return messages(value(record, column), column)


def messages(
    found: Any, column: str, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> list[Message]:
    """A list of messages. `role` and `content` name their keys; `roles`, where given, maps the data's to ours."""
    if not isinstance(found, list):
        raise Unusable("wrong type", f"{column} is {kind(found)}; expected text or a list of messages")
    if not found:
        raise Unusable("empty prompt" if column in _ASKING else "empty answer", f"{column} has no messages")
    return [message(each, column, role=role, content=content, roles=roles) for each in found]


def message(
    found: Any, column: str, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> Message:
    """One message. Its other keys are kept: some templates render them."""
    if not isinstance(found, dict):
        raise Unusable("wrong type", f"{column} holds {kind(found)}; expected messages with {role} and {content}")
    who, said = found.get(role), found.get(content)
    if not isinstance(who, str):
        raise Unusable("wrong type", f"{column}: a message's {role} is {kind(who)}; expected text")
    if isinstance(said, list):
        said = _text_of_parts(said)
    # A turn that only calls tools says nothing.
    if not isinstance(said, str) and not (said is None and found.get("tool_calls")):
        raise Unusable("wrong type", f"{column}: a message's {content} is {kind(said)}; expected text")
    if roles is not None:
        if who not in roles:
            raise Unusable("unknown role", f"{column}: {who[:40]!r}; known: {', '.join(roles)}")
        who = roles[who]
    if (role, content) == ("role", "content") and who == found["role"] and said == found.get("content"):
        return found
    return {"role": who, "content": said} | {
        key: found[key] for key in found if key not in (role, content, "role", "content")
    }


def _text_of_parts(parts: list[Any]) -> Any:
    """The text of a content that is written as parts, as models of several media have it, where all are text."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type", "text") == "text"]
    said = [text for text in texts if isinstance(text, str)]
    return "".join(said) if parts and len(said) == len(parts) else parts


def rows(record: Record, column: str) -> list[Record]:
    """A list of mappings, which are read as records are."""
    found = value(record, column)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise Unusable("wrong type", f"{column} is {kind(found)}; expected a list of mappings")
    return found


def boolean(record: Record, column: str) -> bool:
    found = value(record, column)
    if not isinstance(found, bool):
        shown = f" ({found!r:.40})" if isinstance(found, str | int) else ""
        raise Unusable("label is no boolean", f"{column} is {kind(found)}{shown}; expected true or false")
    return found


def number(record: Record, column: str) -> float:
    found = value(record, column)
    try:
        # An int of JSON may be too large for a float.
        read = math.nan if isinstance(found, bool) or not isinstance(found, int | float) else float(found)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise Unusable("wrong type", f"{column} is {kind(found)}; expected a number")
    return read


def optional_number(record: Record, column: str) -> float | None:
    found = record.get(column)
    return None if found is None or _is_nan(found) else number(record, column)


def scores(record: Record, chosen: str = "chosen_score", rejected: str = "rejected_score") -> dict[str, Any]:
    """The grades of a pair, as Pair names them, from the columns of these names."""
    return {"chosen_score": optional_number(record, chosen), "rejected_score": optional_number(record, rejected)}


def user(said: str, system: str = "") -> list[Message]:
    """A prompt of one user turn, after a system message where there is one."""
    asked: list[Message] = [{"role": "user", "content": said}]
    return [{"role": "system", "content": system}, *asked] if system.strip() else asked


def with_system(record: Record, prompt: Turns) -> Turns:
    """The prompt after the row's `system`, unless it begins with a system message of its own."""
    system = optional_text(record, "system")
    if not system.strip():
        return prompt
    if isinstance(prompt, str):
        return user(prompt, system)
    if prompt and prompt[0]["role"] in ("system", "developer"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def beside(record: Record) -> dict[str, Any]:
    """What a row may bring for the chat template: `tools` and `chat_template_kwargs`."""
    tools, kwargs = _unpacked(record.get("tools")), record.get("chat_template_kwargs")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("wrong type", "tools is no list of JSON schemas")
    if kwargs and not isinstance(kwargs, dict):
        raise Unusable("wrong type", f"chat_template_kwargs is {kind(kwargs)}; expected a mapping")
    return {"tools": tools or None, "template_kwargs": kwargs or None}


def _unpacked(found: Any) -> Any:
    """Several frameworks keep lists of tools as JSON text: a table has no type for them."""
    if isinstance(found, str) and found.strip():
        return from_json(found)
    return None if _is_nan(found) else found


def from_json(found: str) -> Any:
    """What a JSON text says; the text itself where it is none."""
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        return found


def shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations share as their prompt: as many as leave each an answer by the assistant."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    # Two answers that are the same, or one that goes on from the other, still need an answer each.
    n = max(min(n, len(chosen) - 1, len(rejected) - 1), 0)
    if n == 0:
        raise Unusable("empty prompt", "chosen and rejected begin with different messages")
    while n > 0 and not _answers_begin(chosen, rejected, n):
        n -= 1
    if n == 0:
        raise Unusable("no assistant turn", "no shared turn is followed by an assistant's in both chosen and rejected")
    return n


def _answers_begin(chosen: list[Message], rejected: list[Message], n: int) -> bool:
    assistants = [turn["role"] == "assistant" for turn in (chosen[n - 1], chosen[n], rejected[n])]
    return assistants == [False, True, True]


def last_turn(conversation: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """A conversation as its prompt and its answer, which is its last message and the assistant's."""
    if conversation[-1]["role"] != "assistant":
        raise Unusable("no assistant turn", f"{column} ends with a turn of {conversation[-1]['role'][:40]}")
    if len(conversation) == 1:
        raise Unusable("empty prompt", f"{column} has nothing before the answer")
    return conversation[:-1], conversation[-1:]


def kind(found: Any) -> str:
    if found is None:
        return "null"
    return "NaN" if _is_nan(found) else type(found).__name__


def _is_nan(found: Any) -> bool:
    return isinstance(found, float) and math.isnan(found)
