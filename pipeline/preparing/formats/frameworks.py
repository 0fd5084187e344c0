"""What other training frameworks read, for files that were made for them."""

from typing import Any

from pipeline.preparing.example import Label, Message, Pair, Ranked, Ranking, Turns, Unusable
from pipeline.preparing.formats import fields
from pipeline.preparing.formats.registry import Record, data_format

_BESIDE = ("system", "tools")
_ALPACA_BESIDE = ("input", "history", *_BESIDE)


def _is_alpaca_pair(record: Record) -> bool:
    return fields.has_text(record, "instruction", "chosen", "rejected")


@data_format("instruction", "chosen", "rejected", optional=_ALPACA_BESIDE, when=_is_alpaca_pair)
def llamafactory_alpaca(record: Record) -> Pair:
    """LLaMA-Factory's alpaca for preferences: instruction, input, system, history, chosen and rejected."""
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    return Pair(prompt=_alpaca_prompt(record), chosen=chosen, rejected=rejected, **fields.beside(record))


def _is_alpaca_label(record: Record) -> bool:
    return fields.has_text(record, "instruction", "output") and fields.has(record, "kto_tag")


@data_format("instruction", "output", "kto_tag", optional=_ALPACA_BESIDE, makes=Label, when=_is_alpaca_label)
def llamafactory_alpaca_kto(record: Record) -> Label:
    """LLaMA-Factory's alpaca for KTO: instruction, input, system, history, output, and kto_tag, true for a good one."""
    completion, label = fields.text(record, "output"), fields.boolean(record, "kto_tag")
    return Label(prompt=_alpaca_prompt(record), completion=completion, label=label, **fields.beside(record))


def _alpaca_prompt(record: Record) -> Turns:
    asked = "\n".join(filter(None, (fields.text(record, "instruction"), fields.optional_text(record, "input"))))
    if not asked.strip():
        raise Unusable("empty prompt", "instruction and input are empty")
    history = _history(record)
    return fields.with_system(record, [*history, *fields.user(asked)] if history else asked)


def _history(record: Record) -> list[Message]:
    found = record.get("history")
    if found is None:
        return []
    turns: list[Message] = []
    for round_ in found if isinstance(found, list) else [found]:
        if not (isinstance(round_, list) and len(round_) == 2 and all(isinstance(said, str) for said in round_)):
            raise Unusable("wrong type", f"history holds {fields.kind(round_)}; expected pairs of question and answer")
        turns += [{"role": "user", "content": round_[0]}, {"role": "assistant", "content": round_[1]}]
    return turns


def _is_sharegpt(record: Record) -> bool:
    return fields.has_messages(record, "conversations", role="from") or fields.has_messages(record, "conversations")


def _is_sharegpt_pair(record: Record) -> bool:
    return _is_sharegpt(record) and all(
        isinstance(record.get(column), dict) or fields.has_messages(record, column, role="from")
        for column in ("chosen", "rejected")
    )


@data_format("conversations", "chosen", "rejected", optional=_BESIDE, when=_is_sharegpt_pair)
def llamafactory_sharegpt(record: Record) -> Pair:
    """LLaMA-Factory's sharegpt for preferences: conversations of {from, value}, chosen and rejected, a turn each."""
    prompt = _conversation(record)
    if prompt[-1]["role"] == "assistant":
        raise Unusable("prompt ends with an answer", "the last turn of conversations is the assistant's")
    chosen, rejected = (_sharegpt_answer(record, column) for column in ("chosen", "rejected"))
    asked = fields.with_system(record, prompt)
    return Pair(prompt=asked, chosen=chosen, rejected=rejected, **fields.beside(record))


def _is_sharegpt_label(record: Record) -> bool:
    return _is_sharegpt(record) and fields.has(record, "kto_tag")


@data_format("conversations", "kto_tag", optional=_BESIDE, makes=Label, when=_is_sharegpt_label)
def llamafactory_sharegpt_kto(record: Record) -> Label:
    """LLaMA-Factory's sharegpt for KTO: conversations of {from, value}, whose last turn is the answer, and kto_tag."""
    prompt, completion = fields.last_turn(_conversation(record), "conversations")
    label = fields.boolean(record, "kto_tag")
    return Label(prompt=fields.with_system(record, prompt), completion=completion, label=label, **fields.beside(record))


def _sharegpt_answer(record: Record, column: str) -> list[Message]:
    """One turn, or a list of turns."""
    found = fields.value(record, column)
    if found == []:
        raise Unusable("empty answer", f"{column} has no turns")
    return [_sharegpt(turn, column) for turn in (found if isinstance(found, list) else [found])]


def _conversation(record: Record) -> list[Message]:
    found = fields.value(record, "conversations")
    if not isinstance(found, list):
        raise Unusable("wrong type", f"conversations is {fields.kind(found)}; expected a list of turns")
    if not found:
        raise Unusable("empty prompt", "conversations has no turns")
    return [_sharegpt(turn, "conversations") for turn in found]


def _sharegpt(found: Any, column: str) -> Message:
    """A turn of {from, value}, or of {role, content}, which the framework reads under other tags."""
    if isinstance(found, dict) and "from" not in found and "role" in found:
        return fields.message(found, column, roles=fields.ROLES)
    turn = fields.message(found, column, role="from", content="value", roles=fields.ROLES)
    return _called(turn, column) if found["from"] == "function_call" else turn


def _called(turn: Message, column: str) -> Message:
    """A function call, written as JSON text, the way chat templates expect it."""
    called = fields.from_json(turn["content"])
    calls = called if isinstance(called, list) else [called]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unusable("wrong type", f"{column}: a function_call is no JSON with name and arguments")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def _is_swift_pair(record: Record) -> bool:
    rejected = fields.has_text(record, "rejected_response") or fields.has_messages(record, "rejected_messages")
    return fields.has_messages(record, "messages") and rejected


@data_format("messages", "rejected_response", optional=(*_BESIDE, "rejected_messages"), when=_is_swift_pair)
def ms_swift(record: Record) -> Pair:
    """ms-swift for preferences: messages, whose last turn is the chosen answer, and rejected_response."""
    chosen = fields.conversation(record, "messages")
    if fields.has(record, "rejected_messages"):
        rejected = fields.conversation(record, "rejected_messages")
        n = 0 if rejected[0]["role"] == "assistant" else fields.shared_turns(chosen, rejected)
        prompt, answer = (chosen[:n], chosen[n:]) if n else fields.last_turn(chosen, "messages")
        worse: Turns = rejected[n:]
    else:
        prompt, answer = fields.last_turn(chosen, "messages")
        worse = fields.text(record, "rejected_response")
    return Pair(prompt=fields.with_system(record, prompt), chosen=answer, rejected=worse, **fields.beside(record))


def _is_messages_label(record: Record) -> bool:
    return fields.has_messages(record, "messages") and isinstance(record.get("label"), bool)


@data_format("messages", "label", optional=_BESIDE, makes=Label, when=_is_messages_label)
def messages_label(record: Record) -> Label:
    """Messages in OpenAI's shape, whose last turn is the answer, and label: ms-swift's and LLaMA-Factory's for KTO."""
    prompt, completion = fields.last_turn(fields.conversation(record, "messages"), "messages")
    label = fields.boolean(record, "label")
    return Label(prompt=fields.with_system(record, prompt), completion=completion, label=label, **fields.beside(record))


def _is_nemo(record: Record) -> bool:
    return fields.has_rows(record, "completions", "rank", "completion") and fields.has_messages(record, "context")


@data_format("context", "completions", optional=_BESIDE, makes=Ranking, when=_is_nemo)
def nemo(record: Record) -> Ranking:
    """NeMo RL: context, and completions of {rank, completion}, each a list of messages; the lowest rank is best."""
    found = fields.rows(record, "completions")
    answers = tuple(Ranked(fields.conversation(each, "completion"), -fields.number(each, "rank")) for each in found)
    prompt = fields.with_system(record, fields.conversation(record, "context"))
    return Ranking(prompt=prompt, answers=answers, **fields.beside(record))
