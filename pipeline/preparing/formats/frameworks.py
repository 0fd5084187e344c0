"""The formats of other training frameworks: LLaMA-Factory, ms-swift, NeMo RL."""

import json
from typing import Any

from prefcache.pipeline.preparing.example import Candidate, Label, Message, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Record, data_format

_CONTEXT = ("system", "tools")
_THOUGHTS_END = "</think>"
# Roles of ms-swift, for whose texts it also takes JSON that is not text.
_SWIFT_JSON = ("tool_call", "tool_response", "tool")
_ALPACA_CONTEXT = ("input", "history", *_CONTEXT)


def _make_pair(record: Record, prompt: Turns, chosen: Turns, rejected: Turns) -> Pair:
    pair = fields.make_pair(record, prompt, chosen, rejected)
    pair.tools = _complete(pair.tools)
    return pair


def _make_label(record: Record, prompt: Turns, completion: Turns, label: bool) -> Label:
    example = fields.make_label(record, prompt, completion, label)
    example.tools = _complete(example.tools)
    return example


def _complete(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools as OpenAI's schema has them: LLaMA-Factory and ms-swift also take the description of the function alone."""
    return tools and [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# -- LLaMA-Factory ---------------------------------------------------------------------------------------------------


_ALPACA = ("instruction", "chosen", "rejected")


@data_format(*_ALPACA, optional=_ALPACA_CONTEXT, when=fields.having(text=_ALPACA))
def llamafactory_alpaca(record: Record) -> Pair:
    """LLaMA-Factory's alpaca for preferences: instruction, input, system, history, chosen and rejected."""
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    return _make_pair(record, _alpaca_prompt(record), chosen, rejected)


@data_format(
    *("instruction", "output", "kto_tag"),
    optional=_ALPACA_CONTEXT,
    makes=Label,
    when=fields.having(text=("instruction", "output"), present=("kto_tag",)),
)
def llamafactory_alpaca_kto(record: Record) -> Label:
    """LLaMA-Factory's alpaca for KTO: instruction, input, system, history, output, and kto_tag, true for a good one."""
    completion, label = fields.text(record, "output"), fields.boolean(record, "kto_tag")
    return _make_label(record, _alpaca_prompt(record), completion, label)


def _alpaca_prompt(record: Record) -> Turns:
    asked = "\n".join(filter(None, (fields.text(record, "instruction"), fields.optional_text(record, "input"))))
    if not asked.strip():
        raise Unusable("empty prompt", "instruction and input are empty")
    history = record.get("history")
    turns: list[Message] = []
    for exchange in history if isinstance(history, list) else [] if history is None else [history]:
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            shown = fields.type_name(exchange)
            raise Unusable("wrong type", f"history holds {shown}; expected pairs of question and answer")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return [*turns, *fields.user_prompt(asked)] if turns else asked


def _is_sharegpt(record: Record) -> bool:
    return fields.has_messages(record, "conversations", role="from") or fields.has_messages(record, "conversations")


def _is_sharegpt_pair(record: Record) -> bool:
    return _is_sharegpt(record) and all(
        isinstance(record.get(column), dict) or fields.has_messages(record, column, role="from")
        for column in ("chosen", "rejected")
    )


@data_format("conversations", "chosen", "rejected", optional=_CONTEXT, when=_is_sharegpt_pair)
def llamafactory_sharegpt(record: Record) -> Pair:
    """LLaMA-Factory's sharegpt for preferences: conversations of {from, value}, chosen and rejected, a turn each."""
    prompt = _sharegpt_conversation(record)
    if prompt[-1]["role"] == "assistant":
        raise Unusable("prompt ends with an answer", "the last turn of conversations is the assistant's")
    chosen, rejected = (_sharegpt_answer(record, column) for column in ("chosen", "rejected"))
    return _make_pair(record, prompt, chosen, rejected)


@data_format(
    *("conversations", "kto_tag"),
    optional=_CONTEXT,
    makes=Label,
    when=lambda record: _is_sharegpt(record) and fields.has(record, "kto_tag"),
)
def llamafactory_sharegpt_kto(record: Record) -> Label:
    """LLaMA-Factory's sharegpt for KTO: conversations of {from, value}, whose last turn is the answer, and kto_tag."""
    prompt, completion = fields.split_last_turn(_sharegpt_conversation(record), "conversations")
    return _make_label(record, prompt, completion, fields.boolean(record, "kto_tag"))


def _sharegpt_answer(record: Record, column: str) -> list[Message]:
    """Read one turn, or a list of turns."""
    value = fields.get_column(record, column)
    if value == []:
        raise Unusable("empty answer", f"{column} has no turns")
    return [_sharegpt_turn(turn, column) for turn in (value if isinstance(value, list) else [value])]


def _sharegpt_conversation(record: Record) -> list[Message]:
    value = fields.get_column(record, "conversations")
    if not isinstance(value, list):
        raise Unusable("wrong type", f"conversations is {fields.type_name(value)}; expected a list of turns")
    if not value:
        raise Unusable("empty prompt", "conversations has no turns")
    return [_sharegpt_turn(turn, "conversations") for turn in value]


def _sharegpt_turn(value: Any, column: str) -> Message:
    """Read a turn of {from, value}, or of {role, content}, which the framework reads under other tags."""
    if isinstance(value, dict) and "from" not in value and "role" in value:
        return fields.message(value, column, roles=fields.ROLES)
    turn = fields.message(value, column, role="from", content="value", roles=fields.ROLES)
    if value["from"] != "function_call":
        return turn
    # Chat templates expect calls under tool_calls, and thoughts in the text.
    thoughts, _, called = turn["content"].rpartition(_THOUGHTS_END)
    calls = fields.function_calls(called, column, "function_call")
    return {"role": "assistant", "content": thoughts and thoughts + _THOUGHTS_END, "tool_calls": calls}


def _is_openai_pair(record: Record) -> bool:
    return fields.has_messages(record, "messages") and all(
        isinstance(record.get(column), dict) and "role" in record[column] for column in ("chosen", "rejected")
    )


@data_format("messages", "chosen", "rejected", optional=_CONTEXT, when=_is_openai_pair)
def llamafactory_openai(record: Record) -> Pair:
    """LLaMA-Factory's openai for preferences: messages, chosen and rejected, a message each; tool calls as OpenAI has them.

    Its converter adds "detailed thinking off" to the system message of a record without tools, and a line end to one
    with tools. Neither is added here: the system message is the record's own.
    """
    prompt = fields.messages(fields.get_column(record, "messages"), "messages", roles=fields.ROLES)
    if prompt[-1]["role"] == "assistant":
        raise Unusable("prompt ends with an answer", "the last message of messages is the assistant's")
    chosen, rejected = (
        [fields.message(fields.get_column(record, column), column, roles=fields.ROLES)]
        for column in ("chosen", "rejected")
    )
    return _make_pair(record, prompt, chosen, rejected)


# -- ms-swift and NeMo RL --------------------------------------------------------------------------------------------


def _is_swift_pair(record: Record) -> bool:
    rejected = record.get("rejected_response")
    has_answers = isinstance(rejected, list) and bool(rejected) and all(isinstance(each, str) for each in rejected)
    return fields.has_messages(record, "messages") and (
        isinstance(rejected, str)
        or has_answers
        or fields.has_messages(record, "rejected_response")
        or fields.has_messages(record, "rejected_messages")
    )


@data_format(
    *("messages", "rejected_response"),
    optional=(*_CONTEXT, "rejected_messages", "rejected_tools", "rejected_images"),
    when=_is_swift_pair,
)
def ms_swift(record: Record) -> Pair | Ranking:
    """ms-swift for preferences: messages, whose turns after the last question are chosen; rejected_response or _messages.

    rejected_response is text, messages, or a list of texts, which are several rejected answers. A call of a tool and its
    result belong to the answer. Other tools in rejected_tools than in tools, or other images in rejected_images, send the record to quarantine.
    """
    if fields.has(record, "rejected_images") and record["rejected_images"] != record.get("images"):
        raise Unusable("different images", "chosen and rejected have images of their own; a pair has one prompt")
    chosen = _swift_messages(record, "messages")
    prompt, answer = fields.split_after_last_question(chosen, "messages")
    if fields.has(record, "rejected_messages"):
        rejected = _swift_messages(record, "rejected_messages")
        if rejected[0]["role"] == "assistant":
            return _make_pair(record, prompt, answer, rejected)
        asked, worse = fields.split_after_last_question(rejected, "rejected_messages")
        if asked != prompt:
            # Later questions differ, too. The answers begin after the last question before the conversations part.
            n = fields.count_asked_turns(chosen[: fields.count_shared_turns(chosen, rejected)])
            prompt, answer, worse = chosen[:n], chosen[n:], rejected[n:]
        return _make_pair(record, prompt, answer, worse)
    responses = fields.get_column(record, "rejected_response")
    if not isinstance(responses, list):
        return _make_pair(record, prompt, answer, fields.text(record, "rejected_response"))
    if not all(isinstance(text, str) for text in responses):
        return _make_pair(record, prompt, answer, _swift_messages(record, "rejected_response"))
    answers = (Candidate(answer, 1.0), *(Candidate(text, 0.0) for text in responses))
    return Ranking(**_make_pair(record, prompt, answer, "").context(), answers=answers)


def _swift_messages(record: Record, column: str) -> list[Message]:
    """Read messages. Calls in a row are one turn, and so is the text before them."""
    rows = fields.get_column(record, column)
    if not isinstance(rows, list):
        return fields.messages(rows, column)
    turns: list[Message] = []
    for turn in fields.messages(list(map(_swift_row, rows)), column):
        role = turn["role"]
        if role == "tool_call":
            calls = fields.function_calls(turn["content"], column, role)
            before = turns.pop() if turns and turns[-1]["role"] == "assistant" else {"role": "assistant", "content": ""}
            turn = before | {"tool_calls": [*before.get("tool_calls", ()), *calls]}
        elif role == "tool_response":
            turn = turn | {"role": "tool"}
        turns.append(turn)
    return turns


def _swift_row(row: Any) -> Any:
    """Return a message with a call or a result that is JSON as JSON text."""
    if not isinstance(row, dict) or row.get("role") not in _SWIFT_JSON or not isinstance(row.get("content"), dict):
        return row
    return row | {"content": json.dumps(row["content"], ensure_ascii=False)}


@data_format(
    *("messages", "label"),
    optional=_CONTEXT,
    makes=Label,
    when=lambda record: fields.has_messages(record, "messages") and isinstance(record.get("label"), bool),
)
def messages_label(record: Record) -> Label:
    """Messages whose turns after the last question are the answer, and label: ms-swift's and LLaMA-Factory's for KTO."""
    prompt, completion = fields.split_after_last_question(_swift_messages(record, "messages"), "messages")
    return _make_label(record, prompt, completion, fields.boolean(record, "label"))


@data_format(
    *("context", "completions"),
    optional=_CONTEXT,
    makes=Ranking,
    when=lambda record: (
        fields.has_rows(record, "completions", "rank", "completion") and fields.has_messages(record, "context")
    ),
)
def nemo(record: Record) -> Ranking:
    """NeMo RL: context, and completions of {rank, completion}, each a list of messages; the lowest rank is best."""
    answers = tuple(
        Candidate(fields.conversation(row, "completion"), -fields.number(row, "rank"))
        for row in fields.rows(record, "completions")
    )
    prompt = fields.with_system(record, fields.conversation(record, "context"))
    return Ranking(prompt=prompt, answers=answers, **fields.template_inputs(record))
