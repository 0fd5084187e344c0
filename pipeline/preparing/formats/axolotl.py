"""Axolotl's preference strategies, under the names that its `type:` has. KTO's begin with `kto.`, ORPO's with `orpo.`:
there, one name stands for several. A name without a dot is its `.default`, as in Axolotl.

chatml and llama3 write the turns themselves, whatever the tokenizer; chat_template leaves that to the tokenizer's own
template. The texts are Axolotl's where it does what its documentation says. Where it would take the wrong message, as
in conversations of more than two, what is documented is done.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.preparing.example import Label, Message, Pair, Ranked, Ranking, Turns, Unusable
from pipeline.preparing.formats import fields
from pipeline.preparing.formats.registry import Reader, Record, data_format

# -- chatml and llama3: dialects, and layouts of the columns ---------------------------------------------------------


class Dialect(NamedTuple):
    """How a turn is written out: before and after its role, after its text, and between two turns."""

    title: str
    before_role: str
    after_role: str
    end: str
    between: str

    def prompt(self, messages: list[Message]) -> str:
        """These turns, and the beginning of the assistant's."""
        if not any(_said(message).strip() for message in messages if message["role"] != "system"):
            raise Unusable("empty prompt")
        turns = (self._header(message["role"]) + _said(message) + self.end + self.between for message in messages)
        return "".join(turns) + self._header("assistant")

    def answer(self, turns: Turns, column: str) -> str:
        said = turns if isinstance(turns, str) else _said(turns[-1])
        return _filled(said, column) + self.end

    def _header(self, role: str) -> str:
        return self.before_role + role + self.after_role


_DIALECTS = {
    "chatml": Dialect("ChatML", "<|im_start|>", "\n", "<|im_end|>", "\n"),
    "llama3": Dialect("Llama 3's template", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ""),
}


def _said(message: Message) -> str:
    if message.get("tool_calls"):
        raise Unusable("tool calls", "this format writes text alone; chat_template formats have a place for them")
    content: str = message["content"]
    return content


def _filled(said: str, column: str) -> str:
    # With an end token after it, an empty answer would no longer look empty.
    if not said.strip():
        raise Unusable("empty answer", column)
    return said


class Layout(NamedTuple):
    """Which columns a record has, and how they are read, before any text is written out."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Pair | Label]


def _texts(prompt: str, chosen: str, rejected: str) -> Layout:
    def read(record: Record) -> Pair:
        return Pair(
            prompt=_asked(record, prompt), chosen=fields.text(record, chosen), rejected=fields.text(record, rejected)
        )

    return Layout((prompt, chosen, rejected), ("system",), read)


def _asked(record: Record, prompt: str) -> list[Message]:
    return fields.user(fields.text(record, prompt), fields.optional_text(record, "system"))


_ANY_OF = (
    ("prompt", "input", "question", "instruction"),
    ("chosen", "chosen_response"),
    ("rejected", "rejected_response"),
)


def _any_columns(record: Record) -> Pair:
    prompt, chosen, rejected = (_first_of(record, *names) for names in _ANY_OF)
    return Pair(
        prompt=_asked(record, prompt), chosen=fields.text(record, chosen), rejected=fields.text(record, rejected)
    )


def _first_of(record: Record, *names: str) -> str:
    """The first of these columns that is not null; a table of several shapes has them all."""
    return next((name for name in names if fields.has(record, name)), names[0])


def _conversation(record: Record, column: str) -> list[Message]:
    return fields.messages(fields.value(record, column), column, roles=fields.ROLES)


def _conversations(record: Record) -> Pair:
    """Two whole conversations that differ in the last message, which is the answer."""
    return _continued(_conversation(record, "chosen"), _conversation(record, "rejected"))


def _continued(chosen: list[Message], rejected: list[Message]) -> Pair:
    prompt, better = fields.last_turn(chosen, "chosen")
    other, worse = fields.last_turn(rejected, "rejected")
    if [_turn(message) for message in prompt] != [_turn(message) for message in other]:
        raise Unusable("answers to different prompts", "chosen and rejected differ before their last message")
    return Pair(prompt=prompt, chosen=better, rejected=worse)


def _turn(message: Message) -> tuple[Any, ...]:
    """What makes two messages the same turn. Ids, scores and the like may differ."""
    return message["role"], message["content"], message.get("tool_calls") or None


def _answered_prompt(record: Record, *, needs_prompt: bool) -> Pair:
    """Two conversations, and their one question in a column of its own. Of longer ones, the question is not all."""
    prompt = (fields.text if needs_prompt else fields.optional_text)(record, "prompt")
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if prompt.strip() and max(len(chosen), len(rejected)) <= 2:
        asked = fields.user(prompt)
        chosen, rejected = ([*asked, *each[-1:]] for each in (chosen, rejected))
    pair = _continued(chosen, rejected)
    return replace(pair, prompt=fields.with_system(record, pair.prompt))


_PAIRS = {
    "default": Layout((), (*chain(*_ANY_OF), "system"), _any_columns),
    "argilla": _texts("instruction", "chosen_response", "rejected_response"),
    "argilla_chat": Layout(("chosen", "rejected"), (), _conversations),
    "icr": _texts("input", "chosen", "rejected"),
    "intel": _texts("question", "chosen", "rejected"),
    "prompt_pairs": _texts("prompt", "chosen", "rejected"),
    "ultra": Layout(("prompt", "chosen", "rejected"), ("system",), partial(_answered_prompt, needs_prompt=True)),
}


def _completions(prompt: str) -> Layout:
    def read(record: Record) -> Label:
        completion, label = fields.text(record, "completion"), fields.boolean(record, "label")
        return Label(prompt=_asked(record, prompt), completion=completion, label=label)

    return Layout((prompt, "completion", "label"), ("system",), read)


def _completed(record: Record) -> Label:
    """A whole conversation; or, as Axolotl documents it, the answer alone, and what it answers in `chosen`."""
    conversation = _conversation(record, "completion")
    if len(conversation) == 1 and fields.has(record, "chosen"):
        asked = _conversation(record, "chosen")
        conversation = (asked[:-1] if asked[-1]["role"] == "assistant" else asked) + conversation
    prompt, completion = fields.last_turn(conversation, "completion")
    return Label(prompt=prompt, completion=completion, label=fields.boolean(record, "label"))


_LABELS = {
    "argilla": _completions("instruction"),
    "argilla_chat": Layout(("completion", "label"), ("chosen",), _completed),
    "intel": _completions("question"),
    "prompt_pairs": _completions("prompt"),
    "ultra": _completions("prompt"),
}


def _written(dialect: Dialect, read: Callable[[Record], Pair | Label]) -> Reader:
    def reader(record: Record) -> Pair | Label:
        example = read(record)
        assert isinstance(example.prompt, list)
        prompt = dialect.prompt(example.prompt)
        if isinstance(example, Label):
            completion = dialect.answer(example.completion, "completion")
            return replace(example, prompt=prompt, completion=completion, rendered=True)
        chosen, rejected = dialect.answer(example.chosen, "chosen"), dialect.answer(example.rejected, "rejected")
        return replace(example, prompt=prompt, chosen=chosen, rejected=rejected, rendered=True)

    return reader


def _register(prefix: str, layouts: Mapping[str, Layout], makes: type) -> None:
    for dialect_name, dialect in _DIALECTS.items():
        for layout_name, layout in layouts.items():
            name = f"{dialect_name}.{layout_name}"
            columns = ", ".join(layout.columns) or "a prompt, chosen and rejected under any of their usual names"
            reader = _written(dialect, layout.read)
            reader.__doc__ = f"Axolotl {name}{' of KTO' if prefix else ''}: {columns}, written out as {dialect.title}."
            names = [name, dialect_name] if layout_name == "default" else [name]
            for each in names:
                data_format(*layout.columns, optional=layout.optional, makes=makes, name=prefix + each)(reader)


_register("", _PAIRS, Pair)
_register("kto.", _LABELS, Label)


# -- chat_template: by the tokenizer's own template ------------------------------------------------------------------


@data_format("messages", "chosen", "rejected", optional=("tools",), name="chat_template")
@data_format("messages", "chosen", "rejected", optional=("tools",), name="chat_template.default")
def chat_template(
    record: Record,
    field_messages: str = "messages",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    field_tools: str = "tools",
    message_property_mappings: dict[str, str] | None = None,
    roles: dict[str, list[str]] | None = None,
) -> Pair:
    """Axolotl chat_template.default: messages, chosen and rejected, written out by the tokenizer's own template.

    An answer is text, a message, or a conversation that goes on from where `messages` is.
    """
    read = partial(_mapped, record, mappings=message_property_mappings, roles=roles)
    asked = read(field_messages, alone="user")
    chosen, rejected = (
        _continuation(asked, read(column, alone="assistant"), column) for column in (field_chosen, field_rejected)
    )
    return Pair(prompt=asked, chosen=chosen, rejected=rejected, **fields.beside({"tools": record.get(field_tools)}))


@data_format("chosen", "rejected", optional=("tools",), name="chat_template.argilla_chat")
def chat_template_argilla_chat(
    record: Record,
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    field_tools: str = "tools",
    message_property_mappings: dict[str, str] | None = None,
    roles: dict[str, list[str]] | None = None,
) -> Pair:
    """Axolotl chat_template.argilla_chat: chosen and rejected as whole conversations, by the tokenizer's own template."""
    read = partial(_mapped, record, mappings=message_property_mappings, roles=roles)
    return replace(
        _continued(read(field_chosen), read(field_rejected)), **fields.beside({"tools": record.get(field_tools)})
    )


@data_format("chosen", "rejected", optional=("prompt", "system"), name="orpo.chat_template")
@data_format("chosen", "rejected", optional=("prompt", "system"), name="orpo.chat_template.argilla")
def orpo_chat_template(record: Record) -> Pair:
    """Axolotl chat_template.argilla of ORPO: chosen and rejected as whole conversations, by the tokenizer's own template.

    `prompt`, where there is one, is what is asked in a conversation of one question.
    """
    return _answered_prompt(record, needs_prompt=False)


def _mapped(
    record: Record, column: str, *, mappings: dict[str, str] | None, roles: dict[str, list[str]] | None, alone: str = ""
) -> list[Message]:
    """Messages whose keys and roles have the data's own names. Text alone, or a message, is one where `alone` says whose."""
    found = fields.value(record, column)
    if alone and isinstance(found, str):
        return [{"role": alone, "content": found}]
    keys, known = _known_keys(mappings), _known_roles(roles)
    listed = [found] if alone and isinstance(found, dict) else found
    read = fields.messages(listed, column, role=keys["role"], content=keys["content"], roles=known)
    return [
        _with_decoded_calls(_with_keys(message, source, keys)) for message, source in zip(read, listed, strict=True)
    ]


def _with_keys(message: Message, source: Message, keys: Mapping[str, str]) -> Message:
    """The message under our names of its keys, where these are others."""
    if all(key == name for key, name in keys.items()):
        return message
    kept = {key: value for key, value in message.items() if key not in keys and key not in keys.values()}
    more = {key: source[name] for key, name in keys.items() if source.get(name) is not None}
    # A key that the data has under our name beside its own is another thing.
    return kept | {"content": None} | more | {"role": message["role"]}


def _with_decoded_calls(message: Message) -> Message:
    """Arguments of tool calls as values where they are JSON text: templates write them as JSON once more."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_decoded_call(call) for call in calls]}


def _decoded_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return call | {"function": function | {"arguments": fields.from_json(function["arguments"])}}


def _known_keys(mappings: Mapping[str, str] | None) -> dict[str, str]:
    own = {} if mappings is None else mappings
    if not isinstance(own, Mapping) or not all(isinstance(name, str) for name in own.values()):
        raise UsageError(
            f"prepare.format_args: message_property_mappings is {own!r}; expected names such as {{role: from, content: value}}."
        )
    return {"role": "role", "content": "content"} | dict(own)


def _known_roles(roles: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    own = {} if roles is None else roles
    if not isinstance(own, Mapping) or not all(isinstance(sources, list | tuple) for sources in own.values()):
        raise UsageError(
            f"prepare.format_args: roles is {own!r}; expected lists such as {{user: [human], assistant: [gpt]}}."
        )
    return fields.ROLES | {str(source): role for role, sources in own.items() for source in sources}


def _continuation(asked: list[Message], answer: list[Message], column: str) -> list[Message]:
    """The answer without the end of the prompt that it repeats."""
    turns = [_turn(message) for message in answer]
    longest = min(len(asked), len(answer) - 1)
    n = next((n for n in range(longest, 0, -1) if turns[:n] == [_turn(message) for message in asked[-n:]]), 0)
    if answer[n]["role"] != "assistant":
        raise Unusable("no assistant turn", f"{column} goes on from the prompt with a turn of {answer[n]['role'][:40]}")
    return answer[n:]


# -- texts as the config or the data has them ------------------------------------------------------------------------


@data_format("prompt", "chosen", "rejected", optional=("system",), name="user_defined")
@data_format("prompt", "chosen", "rejected", optional=("system",), name="user_defined.default")
def user_defined(
    record: Record,
    field_system: str = "system",
    field_prompt: str = "prompt",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    prompt_format: str = "{prompt}",
    chosen_format: str = "{chosen}",
    rejected_format: str = "{rejected}",
) -> Pair:
    """Axolotl user_defined: a system, prompt, chosen and rejected of your names, put into formats of yours.

    In a format, {system}, {prompt}, {chosen} and {rejected} are the texts, whatever their columns are called.
    """
    return Pair(
        prompt=_formatted_prompt(record, prompt_format, field_system, field_prompt),
        chosen=_formatted_answer(record, "chosen", chosen_format, field_chosen),
        rejected=_formatted_answer(record, "rejected", rejected_format, field_rejected),
        rendered=True,
    )


@data_format("prompt", "completion", "label", optional=("system",), makes=Label, name="kto.user_defined")
@data_format("prompt", "completion", "label", optional=("system",), makes=Label, name="kto.user_defined.default")
def kto_user_defined(
    record: Record,
    field_system: str = "system",
    field_prompt: str = "prompt",
    field_completion: str = "completion",
    field_label: str = "label",
    prompt_format: str = "{prompt}",
    completion_format: str = "{completion}",
) -> Label:
    """Axolotl user_defined of KTO: a system, prompt, completion and label of your names, put into formats of yours."""
    return Label(
        prompt=_formatted_prompt(record, prompt_format, field_system, field_prompt),
        completion=_formatted_answer(record, "completion", completion_format, field_completion),
        label=fields.boolean(record, field_label),
        rendered=True,
    )


def _formatted_prompt(record: Record, prompt_format: str, field_system: str, field_prompt: str) -> str:
    prompt = fields.text(record, field_prompt)
    if not prompt.strip():
        raise Unusable("empty prompt", field_prompt)
    return _fill("prompt_format", prompt_format, system=fields.optional_text(record, field_system), prompt=prompt)


def _formatted_answer(record: Record, name: str, answer_format: str, column: str) -> str:
    return _fill(f"{name}_format", answer_format, **{name: _filled(fields.text(record, column), column)})


def _fill(option: str, text: str | None, **texts: str) -> str:
    # Never str.format: {prompt.__class__} would reach into Python.
    if text is not None and not isinstance(text, str):
        raise UsageError(f"prepare.format_args: {option} is {fields.kind(text)}; expected text.")
    pieces = _pieces(option, text or "{" + option.removesuffix("_format") + "}", tuple(texts))
    return "".join(literal + texts.get(name, "") for literal, name in pieces)


@lru_cache
def _pieces(option: str, text: str, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """A format as pieces of text, each with the name that follows it."""
    places = " and ".join("{" + name + "}" for name in names)
    expected = f"expected text with {places} in it, and {{{{ for a brace"
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"prepare.format_args: {option} {text!r} is no format ({error}); {expected}.") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (name not in names or spec or conversion):
            written = name + ("!" + conversion if conversion else "") + (":" + spec if spec else "")
            raise UsageError(f"prepare.format_args: {option} asks for {{{written}}}; {expected}.")
    return [(literal, name or "") for literal, name, _, _ in parsed]


@data_format("prompt", "chosen", "rejected", name="passthrough")
@data_format("prompt", "chosen", "rejected", name="passthrough.default")
def passthrough(record: Record) -> Pair:
    """Axolotl passthrough: prompt, chosen and rejected as texts that need no template.

    Lists of messages, which Axolotl leaves to TRL, are written out by the tokenizer's own template, as TRL does.
    """
    prompt, chosen, rejected = (fields.turns(record, column) for column in ("prompt", "chosen", "rejected"))
    are_text = {isinstance(turns, str) for turns in (prompt, chosen, rejected)}
    if len(are_text) > 1:
        raise Unusable("wrong type", "prompt, chosen and rejected are partly text and partly messages")
    if are_text == {True}:
        return Pair(prompt=prompt, chosen=chosen, rejected=rejected, rendered=True)
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **fields.beside(record))


@data_format("prompt", "answers", makes=Ranking, name="zephyr.nectar")
def zephyr_nectar(record: Record) -> Ranking:
    """Axolotl zephyr.nectar: prompt and answers, each with a rank of which 1 is the best, written out as Zephyr's template."""
    prompt, answers = fields.text(record, "prompt"), fields.value(record, "answers")
    if not prompt.strip():
        raise Unusable("empty prompt")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise Unusable("wrong type", f"answers is {fields.kind(answers)}; expected a list of {{answer, rank}}")
    return Ranking(
        prompt=f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n",
        # Axolotl takes the two of the highest rank numbers, which are the worst.
        answers=tuple(Ranked(fields.text(answer, "answer"), -fields.number(answer, "rank")) for answer in answers),
        rendered=True,
    )
