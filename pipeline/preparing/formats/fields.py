"""Columns of a record, each read with the one check that it is what it should be.

The readers raise Unusable, whatever JSON they find. The `has_` functions and `having` only look, to recognise a format.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from prefcache.pipeline import schema
from prefcache.pipeline.preparing.example import IMAGE_MARK, Label, Message, Pair, Turns, Unusable
from prefcache.pipeline.preparing.formats.prompt_images import read_parts

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
# Columns that make_pair and make_label read next to prompt and answers.
CONTEXT = ("system", "tools", "chat_template_kwargs")
# Tools of one side. A pair has one prompt, which shows one set of tools, so they have to be the same.
SIDES = ("chosen_tools", "rejected_tools")
_TEMPLATE_INPUTS = frozenset(("tools", "chat_template_kwargs", *SIDES))
_DATA_COLUMNS = {kind: schema.data_columns(kind) for kind in ("pairs", "labels")}
_ANSWERING = ("assistant", "tool")
# Columns of messages that hold a prompt, perhaps with its answer.
_PROMPTS = ("prompt", "context", "messages", "conversations")

# -- recognising -----------------------------------------------------------------------------------------------------


def has(record: Record, *columns: str) -> bool:
    """Return whether these columns are there and not null, as a table of several shapes leaves them."""
    return all(record.get(column) is not None for column in columns)


def has_text(record: Record, *columns: str) -> bool:
    return all(isinstance(record.get(column), str) for column in columns)


def has_messages(record: Record, *columns: str, role: str = "role") -> bool:
    return all(has_rows(record, column, role) for column in columns)


def has_rows(record: Record, column: str, *keys: str) -> bool:
    """Return whether a column holds a list of mappings with these keys."""
    rows = record.get(column)
    first = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and all(key in first for key in keys)


def having(
    *,
    text: tuple[str, ...] = (),
    messages: tuple[str, ...] = (),
    present: tuple[str, ...] = (),
    absent: tuple[str, ...] = (),
) -> Callable[[Record], bool]:
    """Return the test whether a record has columns of these types, and lacks others."""

    def recognises(record: Record) -> bool:
        is_there = has_text(record, *text) and has_messages(record, *messages) and has(record, *present)
        return is_there and not any(has(record, column) for column in absent)

    return recognises


def has_conversations(record: Record, *columns: str) -> bool:
    """Return whether these columns hold whole conversations, prompt included, and not answers alone."""
    return has_messages(record, *columns) and all(record[column][0]["role"] != "assistant" for column in columns)


# -- single columns --------------------------------------------------------------------------------------------------


def get_column(record: Record, column: str) -> Any:
    if column not in record:
        raise Unusable("missing column", f"{column!r}; found {', '.join(record) or 'none'}")
    return record[column]


def text(record: Record, column: str) -> str:
    """Read a column of text; it may be empty."""
    value = get_column(record, column)
    if not isinstance(value, str):
        raise Unusable("wrong type", f"{column} is {type_name(value)}; expected text")
    return value


def optional_text(record: Record, column: str) -> str:
    """Read a column of text that may be missing, null or NaN: then empty."""
    return "" if _is_absent(record.get(column)) else text(record, column)


def boolean(record: Record, column: str) -> bool:
    value = get_column(record, column)
    if not isinstance(value, bool):
        shown = f" ({value!r:.40})" if isinstance(value, str | int) else ""
        raise Unusable("label is no boolean", f"{column} is {type_name(value)}{shown}; expected true or false")
    return value


def number(record: Record, column: str) -> float:
    value = get_column(record, column)
    try:
        # An int of JSON may be too large for a float.
        read = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise Unusable("wrong type", f"{column} is {type_name(value)}; expected a number")
    return read


def optional_number(record: Record, column: str) -> float | None:
    return None if column not in record or _is_absent(record[column]) else number(record, column)


def rows(record: Record, column: str) -> list[Record]:
    """Read a list of mappings, which are records themselves."""
    value = get_column(record, column)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise Unusable("wrong type", f"{column} is {type_name(value)}; expected a list of mappings")
    return value


def type_name(value: Any) -> str:
    return "null" if value is None else "NaN" if _is_absent(value) else type(value).__name__


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_json_text(text: str) -> Any:
    """Decode JSON text; return any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# -- messages --------------------------------------------------------------------------------------------------------


def turns(record: Record, column: str) -> Turns:
    """Read text, or a list of messages with role and content."""
    value = get_column(record, column)
    return value if isinstance(value, str) else messages(value, column)


def conversation(record: Record, column: str) -> list[Message]:
    """Read a column that holds a list of messages."""
    return messages(get_column(record, column), column)


def messages(
    value: Any, column: str, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> list[Message]:
    """Read a list of messages. `role` and `content` name their keys; `roles` maps the data's roles to ours."""
    if not isinstance(value, list):
        raise Unusable("wrong type", f"{column} is {type_name(value)}; expected text or a list of messages")
    if not value:
        raise Unusable("empty prompt" if column in _PROMPTS else "empty answer", f"{column} has no messages")
    return [message(each, column, role=role, content=content, roles=roles) for each in value]


def _is_plain(value: Any) -> bool:
    """Return whether a message is as most are: a role and a text, and nothing else."""
    if type(value) is not dict or len(value) != 2:
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def message(
    value: Any, column: str, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> Message:
    """Read one message. Its other keys are kept: some templates render them.

    Its pictures are marks in the text, and under IMAGE_MARK as the data has them; prompt_images.py takes them from there.
    """
    if (role, content, roles) == ("role", "content", None) and _is_plain(value):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, dict):
        raise Unusable("wrong type", f"{column} holds {type_name(value)}; expected messages with {role} and {content}")
    speaker, body = value.get(role), value.get(content)
    if not isinstance(speaker, str):
        raise Unusable("wrong type", f"{column}: a message's {role} is {type_name(speaker)}; expected text")
    if IMAGE_MARK in value:
        raise Unusable("reserved characters", "U+FDD2, which marks an image")
    images: tuple[Any, ...] = ()
    if isinstance(body, list):
        body, images = read_parts(body, column) or (body, ())
    # A turn that only calls tools has no content.
    if not isinstance(body, str) and not (body is None and value.get("tool_calls")):
        raise Unusable("wrong type", f"{column}: a message's {content} is {type_name(body)}; expected text")
    if roles is not None:
        if speaker not in roles:
            raise Unusable("unknown role", f"{column}: {speaker[:40]!r}; known: {', '.join(roles)}")
        speaker = roles[speaker]
    if (role, content) == ("role", "content") and speaker == value["role"] and body == value.get("content"):
        return with_calls(value)
    others = {key: value[key] for key in value if key not in (role, content, "role", "content")}
    if images:
        others[IMAGE_MARK] = images
    return with_calls({"role": speaker, "content": body} | others)


def with_calls(message: Message) -> Message:
    """Return a message without empty keys, and with its tool calls as templates expect them.

    OpenAI's client writes every key that a message lacks as null, and templates ask whether a key is there. It writes
    arguments as JSON text, which templates would write as JSON once more.
    """
    read = {key: value for key, value in message.items() if value is not None or key == "content"}
    calls = read.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = parse_json_text(calls)
    return (
        read | {"tool_calls": list(map(_decode_arguments, calls)) if isinstance(calls, list) else calls}
        if calls
        else read
    )


def _decode_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    # A call without arguments is written as empty text.
    arguments = parse_json_text(function["arguments"]) if function["arguments"].strip() else {}
    return call | {"function": function | {"arguments": arguments}}


def function_calls(text: str, column: str, role: str) -> list[dict[str, Any]]:
    """Read calls that are a message's text: JSON with name and arguments, or a list of such."""
    called = parse_json_text(text)
    calls = called if isinstance(called, list) else [called]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unusable("wrong type", f"{column}: a {role} is not JSON with name and arguments")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return [_decode_arguments({"type": "function", "function": function}) for function in functions]


def user_prompt(content: str, system: str = "") -> list[Message]:
    """Return a prompt of one user turn, after a system message if there is one."""
    prompt: list[Message] = [{"role": "user", "content": content}]
    return [{"role": "system", "content": system}, *prompt] if system.strip() else prompt


def count_shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Count the messages that two conversations share as their prompt: as many as leave each an answer of its own."""
    n, most = 0, min(len(chosen), len(rejected)) - 1
    # Two answers that are the same, or one that continues the other, still need an answer each.
    while n < most and chosen[n] == rejected[n]:
        n += 1
    if n <= 0:
        raise Unusable("empty prompt", "chosen and rejected begin with different messages")
    for shared in range(n, 0, -1):
        before, answers = chosen[shared - 1], (chosen[shared], rejected[shared])
        if before["role"] != "assistant" and all(turn["role"] == "assistant" for turn in answers):
            return shared
    raise Unusable("no assistant turn", "no shared turn is followed by an assistant's in both chosen and rejected")


def count_asked_turns(conversation: list[Message]) -> int:
    """Count the turns up to the last of neither the assistant nor a tool: what follows is the answer to it."""
    return next((n for n in range(len(conversation), 0, -1) if conversation[n - 1]["role"] not in _ANSWERING), 0)


def split_after_last_question(conversation: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation into its prompt and its answer: calls, their results, and what the assistant says of them."""
    split_last_turn(conversation, column)
    n = count_asked_turns(conversation)
    if not n:
        raise Unusable("empty prompt", f"{column} has nothing before the answer")
    return conversation[:n], conversation[n:]


def split_last_turn(conversation: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation into its prompt and its answer: the last message, which has to be the assistant's."""
    if conversation[-1]["role"] != "assistant":
        raise Unusable("no assistant turn", f"{column} ends with a turn of {conversation[-1]['role'][:40]}")
    if len(conversation) == 1:
        raise Unusable("empty prompt", f"{column} has nothing before the answer")
    return conversation[:-1], conversation[-1:]


# -- examples with the columns that go with any prompt ---------------------------------------------------------------


def make_pair(
    record: Record, prompt: Turns, chosen: Turns, rejected: Turns, columns: dict[str, float] | None = None
) -> Pair:
    """Return a pair with the record's system message, tools and template arguments."""
    prompt = with_system(record, prompt)
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **template_inputs(record), columns=columns or {})


def make_label(
    record: Record, prompt: Turns, completion: Turns, label: bool, columns: dict[str, float] | None = None
) -> Label:
    """Return a label with the record's system message, tools and template arguments."""
    prompt = with_system(record, prompt)
    return Label(prompt=prompt, completion=completion, label=label, **template_inputs(record), columns=columns or {})


def with_system(record: Record, prompt: Turns) -> Turns:
    """Put the row's `system` before the prompt, unless that begins with a system message of its own."""
    system = optional_text(record, "system") if "system" in record else ""
    if not system.strip():
        return prompt
    if isinstance(prompt, str):
        return user_prompt(prompt, system)
    if prompt and prompt[0]["role"] in ("system", "developer"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def template_inputs(record: Record) -> dict[str, Any]:
    """Read what a row may bring for the chat template: `tools` and `chat_template_kwargs`."""
    if record.keys().isdisjoint(_TEMPLATE_INPUTS):
        return {}
    tools, kwargs = _tools(record, "tools"), record.get("chat_template_kwargs")
    chosen, rejected = (_tools(record, column) or tools for column in SIDES)
    if chosen != rejected:
        raise Unusable("different tools", "chosen and rejected have tools of their own; a pair has one prompt")
    if kwargs and not isinstance(kwargs, dict):
        raise Unusable("wrong type", f"chat_template_kwargs is {type_name(kwargs)}; expected a mapping")
    return {"tools": chosen or None, "template_kwargs": kwargs or None}


def _tools(record: Record, column: str) -> Any:
    tools = record.get(column)
    if isinstance(tools, str) and tools.strip():
        tools = parse_json_text(tools)  # several frameworks keep them as JSON text: a table has no type for them
    elif _is_absent(tools):
        tools = None
    # A table keeps each of them as text for the same reason.
    if isinstance(tools, list):
        tools = [parse_json_text(tool) if isinstance(tool, str) else tool for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("wrong type", f"{column} is not a list of JSON schemas")
    return tools or None


def data_columns(record: Record, kind: str, **renamed: str) -> dict[str, float]:
    """Read the data columns of pairs or labels; `renamed` maps those that the record has under another name."""
    columns: dict[str, float] = {}
    for name in _DATA_COLUMNS[kind]:
        value = optional_number(record, renamed.get(name, name))
        if value is not None:
            columns[name] = value
    return columns
