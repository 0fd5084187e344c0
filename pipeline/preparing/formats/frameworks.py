"""The formats of other training frameworks: LLaMA-Factory, ms-swift, NeMo RL."""

from typing import Any

from prefcache.pipeline.preparing.example import Candidate, Label, Message, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Record, data_format

_CONTEXT = ("system", "tools")
_ALPACA_CONTEXT = ("input", "history", *_CONTEXT)

# -- LLaMA-Factory ---------------------------------------------------------------------------------------------------


_ALPACA = ("instruction", "chosen", "rejected")


@data_format(*_ALPACA, optional=_ALPACA_CONTEXT, when=fields.having(text=_ALPACA))
def llamafactory_alpaca(record: Record) -> Pair:
    """LLaMA-Factory's alpaca for preferences: instruction, input, system, history, chosen and rejected."""
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    return fields.make_pair(record, _alpaca_prompt(record), chosen, rejected)


@data_format(
    *("instruction", "output", "kto_tag"),
    optional=_ALPACA_CONTEXT,
    makes=Label,
    when=fields.having(text=("instruction", "output"), present=("kto_tag",)),
)
def llamafactory_alpaca_kto(record: Record) -> Label:
    """LLaMA-Factory's alpaca for KTO: instruction, input, system, history, output, and kto_tag, true for a good one."""
    completion, label = fields.text(record, "output"), fields.boolean(record, "kto_tag")
    return fields.make_label(record, _alpaca_prompt(record), completion, label)


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
    return fields.make_pair(record, prompt, chosen, rejected)


@data_format(
    *("conversations", "kto_tag"),
    optional=_CONTEXT,
    makes=Label,
    when=lambda record: _is_sharegpt(record) and fields.has(record, "kto_tag"),
)
def llamafactory_sharegpt_kto(record: Record) -> Label:
    """LLaMA-Factory's sharegpt for KTO: conversations of {from, value}, whose last turn is the answer, and kto_tag."""
    prompt, completion = fields.split_last_turn(_sharegpt_conversation(record), "conversations")
    return fields.make_label(record, prompt, completion, fields.boolean(record, "kto_tag"))


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
    # A function call, written as JSON text; chat templates expect it under tool_calls.
    called = fields.parse_json_text(turn["content"])
    calls = called if isinstance(called, list) else [called]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unusable("wrong type", f"{column}: a function_call is not JSON with name and arguments")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


# -- ms-swift and NeMo RL --------------------------------------------------------------------------------------------


def _is_swift_pair(record: Record) -> bool:
    rejected = fields.has_text(record, "rejected_response") or fields.has_messages(record, "rejected_messages")
    return fields.has_messages(record, "messages") and rejected


@data_format("messages", "rejected_response", optional=(*_CONTEXT, "rejected_messages"), when=_is_swift_pair)
def ms_swift(record: Record) -> Pair:
    """ms-swift for preferences: messages, whose last turn is the chosen answer, and rejected_response."""
    chosen = fields.conversation(record, "messages")
    if not fields.has(record, "rejected_messages"):
        prompt, answer = fields.split_last_turn(chosen, "messages")
        return fields.make_pair(record, prompt, answer, fields.text(record, "rejected_response"))
    rejected = fields.conversation(record, "rejected_messages")
    n = 0 if rejected[0]["role"] == "assistant" else fields.count_shared_turns(chosen, rejected)
    prompt, answer = (chosen[:n], chosen[n:]) if n else fields.split_last_turn(chosen, "messages")
    return fields.make_pair(record, prompt, answer, rejected[n:])


@data_format(
    *("messages", "label"),
    optional=_CONTEXT,
    makes=Label,
    when=lambda record: fields.has_messages(record, "messages") and isinstance(record.get("label"), bool),
)
def messages_label(record: Record) -> Label:
    """Messages in OpenAI's shape, whose last turn is the answer, and label: ms-swift's and LLaMA-Factory's for KTO."""
    prompt, completion = fields.split_last_turn(fields.conversation(record, "messages"), "messages")
    return fields.make_label(record, prompt, completion, fields.boolean(record, "label"))


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
