"""Axolotl's preference strategies, under the names that its `type:` has. KTO's begin with `kto.`, ORPO's with `orpo.`:
there, one name stands for several. A name without a dot is its `.default`, as in Axolotl. Of those of reward models,
`bradley_terry.chat_template` is the one that Axolotl can load.

chatml and llama3 write the turns themselves, whatever the tokenizer; chat_template leaves that to the tokenizer's own
template. The texts are Axolotl's as far as it follows its documentation. If it would take the wrong message, as in
conversations of more than two, the format follows the documentation.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import IMAGE_MARK, Candidate, Label, Message, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Reader, Record, data_format

# -- chatml and llama3: layouts of the columns, and dialects to write them out in ------------------------------------


class Layout(NamedTuple):
    """Which columns a record has, and how they are read, before any text is written out."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Pair | Label]


def _text_pair(prompt: str, chosen: str, rejected: str) -> Layout:
    def read(record: Record) -> Pair:
        asked = _user_prompt(record, prompt)
        return Pair(prompt=asked, chosen=fields.text(record, chosen), rejected=fields.text(record, rejected))

    return Layout((prompt, chosen, rejected), ("system",), read)


def _text_label(prompt: str) -> Layout:
    def read(record: Record) -> Label:
        completion, label = fields.text(record, "completion"), fields.boolean(record, "label")
        return Label(prompt=_user_prompt(record, prompt), completion=completion, label=label)

    return Layout((prompt, "completion", "label"), ("system",), read)


def _user_prompt(record: Record, column: str) -> list[Message]:
    return fields.user_prompt(fields.text(record, column), fields.optional_text(record, "system"))


_ANY_OF = (
    ("prompt", "input", "question", "instruction"),
    ("chosen", "chosen_response"),
    ("rejected", "rejected_response"),
)


def _text_pair_of_any_names(record: Record) -> Pair | Label:
    # A table of several shapes has all of the names: the first that is not null counts.
    columns = (next((name for name in names if fields.has(record, name)), names[0]) for names in _ANY_OF)
    return _text_pair(*columns).read(record)


def _conversation(record: Record, column: str) -> list[Message]:
    return fields.messages(fields.get_column(record, column), column, roles=fields.ROLES)


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> Pair:
    """Read two whole conversations that differ in the last message, which is the answer."""
    prompt, better = fields.split_last_turn(chosen, "chosen")
    other, worse = fields.split_last_turn(rejected, "rejected")
    if list(map(_turn_identity, prompt)) != list(map(_turn_identity, other)):
        raise Unusable("answers to different prompts", "chosen and rejected differ before their last message")
    return Pair(prompt=prompt, chosen=better, rejected=worse)


def _turn_identity(message: Message) -> tuple[Any, ...]:
    """Return what makes two messages the same turn. Ids, scores and the like may differ."""
    return message["role"], message["content"], message.get("tool_calls") or None, message.get(IMAGE_MARK)


def _pair_with_question(record: Record, *, needs_prompt: bool) -> Pair:
    """Read two conversations, whose one question has a column of its own; in longer ones, that is only a part."""
    prompt = (fields.text if needs_prompt else fields.optional_text)(record, "prompt")
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if prompt.strip() and max(len(chosen), len(rejected)) <= 2:
        asked = fields.user_prompt(prompt)
        chosen, rejected = [*asked, *chosen[-1:]], [*asked, *rejected[-1:]]
    pair = _split_conversations(chosen, rejected)
    return replace(pair, prompt=fields.with_system(record, pair.prompt))


def _label_of_conversation(record: Record) -> Label:
    """Read a whole conversation; or, as Axolotl documents it, the answer alone, with its prompt in `chosen`."""
    conversation = _conversation(record, "completion")
    if len(conversation) == 1 and fields.has(record, "chosen"):
        prompt = _conversation(record, "chosen")
        conversation = (prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt) + conversation
    prompt, completion = fields.split_last_turn(conversation, "completion")
    return Label(prompt=prompt, completion=completion, label=fields.boolean(record, "label"))


_PAIRS = {
    "default": Layout((), (*chain(*_ANY_OF), "system"), _text_pair_of_any_names),
    "argilla": _text_pair("instruction", "chosen_response", "rejected_response"),
    "argilla_chat": Layout(
        *(("chosen", "rejected"), ()),
        lambda record: _split_conversations(_conversation(record, "chosen"), _conversation(record, "rejected")),
    ),
    "icr": _text_pair("input", "chosen", "rejected"),
    "intel": _text_pair("question", "chosen", "rejected"),
    "prompt_pairs": _text_pair("prompt", "chosen", "rejected"),
    "ultra": Layout(("prompt", "chosen", "rejected"), ("system",), partial(_pair_with_question, needs_prompt=True)),
}
_LABELS = {
    "argilla": _text_label("instruction"),
    "argilla_chat": Layout(("completion", "label"), ("chosen",), _label_of_conversation),
    "intel": _text_label("question"),
    "prompt_pairs": _text_label("prompt"),
    "ultra": _text_label("prompt"),
}


class Dialect(NamedTuple):
    """How a turn is written out: before and after its role, after its text, and between two turns."""

    title: str
    before_role: str
    after_role: str
    end: str
    between: str

    def write_prompt(self, messages: Turns) -> str:
        """Write these turns, and the beginning of the assistant's."""
        assert isinstance(messages, list)
        texts = [_content(message) for message in messages]
        if not any(text.strip() for message, text in zip(messages, texts, strict=True) if message["role"] != "system"):
            raise Unusable("empty prompt")
        roles = [message["role"] for message in messages]
        turns = [self._header(role) + text + self.end + self.between for role, text in zip(roles, texts, strict=True)]
        return "".join(turns) + self._header("assistant")

    def write_answer(self, turns: Turns, column: str) -> str:
        return _refuse_empty(turns if isinstance(turns, str) else _content(turns[-1]), column) + self.end

    def _header(self, role: str) -> str:
        return self.before_role + role + self.after_role


_DIALECTS = {
    "chatml": Dialect("ChatML", "<|im_start|>", "\n", "<|im_end|>", "\n"),
    "llama3": Dialect("Llama 3's template", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ""),
}


def _content(message: Message) -> str:
    if message.get("tool_calls"):
        raise Unusable("tool calls", "this format writes text alone; chat_template formats have a place for them")
    if IMAGE_MARK in message:
        raise Unusable(
            "image in plain text", "this format writes text alone; chat_template formats have a place for images"
        )
    content: str = message["content"]
    return content


def _refuse_empty(answer: str, column: str) -> str:
    # With an end token after it, an empty answer would no longer look empty.
    if not answer.strip():
        raise Unusable("empty answer", column)
    return answer


def _register(prefix: str, layouts: Mapping[str, Layout], makes: type) -> None:
    for dialect_name, dialect in _DIALECTS.items():
        for layout_name, layout in layouts.items():
            name = f"{dialect_name}.{layout_name}"
            columns = ", ".join(layout.columns) or "a prompt, chosen and rejected under any of their usual names"
            reader = _reader(dialect, layout.read)
            reader.__doc__ = f"Axolotl {name}{' of KTO' if prefix else ''}: {columns}, written out as {dialect.title}."
            for each in [name, dialect_name] if layout_name == "default" else [name]:
                data_format(*layout.columns, optional=layout.optional, makes=makes, name=prefix + each)(reader)


def _reader(dialect: Dialect, read: Callable[[Record], Pair | Label]) -> Reader:
    def reader(record: Record) -> Pair | Label:
        example = read(record)
        prompt = dialect.write_prompt(example.prompt)
        if isinstance(example, Label):
            completion = dialect.write_answer(example.completion, "completion")
            return replace(example, prompt=prompt, completion=completion, rendered=True)
        chosen = dialect.write_answer(example.chosen, "chosen")
        rejected = dialect.write_answer(example.rejected, "rejected")
        return replace(example, prompt=prompt, chosen=chosen, rejected=rejected, rendered=True)

    return reader


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

    An answer is text, a message, or a conversation that continues `messages`.
    """
    read = partial(_mapped_messages, record, mappings=message_property_mappings, roles=roles)
    prompt = read(field_messages, text_role="user")
    chosen, rejected = (
        _continuation(prompt, read(column, text_role="assistant"), column) for column in (field_chosen, field_rejected)
    )
    tools = fields.template_inputs({"tools": record.get(field_tools)})
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **tools)


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
    read = partial(_mapped_messages, record, mappings=message_property_mappings, roles=roles)
    pair = _split_conversations(read(field_chosen), read(field_rejected))
    return replace(pair, **fields.template_inputs({"tools": record.get(field_tools)}))


@data_format("chosen", "rejected", optional=("system",), name="orpo.chat_template.load")
def orpo_chat_template_load(record: Record) -> Pair:
    """Axolotl chat_template.load of ORPO: chosen and rejected as whole conversations, and a system of their own."""
    pair = _split_conversations(_conversation(record, "chosen"), _conversation(record, "rejected"))
    return replace(pair, prompt=fields.with_system(record, pair.prompt))


@data_format("input", "chosen", "rejected", optional=("system",), name="bradley_terry.chat_template")
def bradley_terry_chat_template(record: Record) -> Pair:
    """Axolotl bradley_terry.chat_template, of reward models: system, input, chosen and rejected, each text."""
    pair = _text_pair("input", "chosen", "rejected").read(record)
    assert isinstance(pair, Pair)
    return pair


@data_format("chosen", "rejected", optional=("prompt", "system"), name="orpo.chat_template")
@data_format("chosen", "rejected", optional=("prompt", "system"), name="orpo.chat_template.argilla")
def orpo_chat_template(record: Record) -> Pair:
    """Axolotl chat_template.argilla of ORPO: chosen and rejected as whole conversations, by the tokenizer's own template.

    `prompt`, if present, is the question of a conversation that has only one.
    """
    return _pair_with_question(record, needs_prompt=False)


def _mapped_messages(
    record: Record,
    column: str,
    *,
    mappings: dict[str, str] | None,
    roles: dict[str, list[str]] | None,
    text_role: str = "",
) -> list[Message]:
    """Read messages whose keys and roles have the data's own names.

    With `text_role`, text alone is one message of that role, and a message alone is one too.
    """
    value = fields.get_column(record, column)
    if text_role and isinstance(value, str):
        return [{"role": text_role, "content": value}]
    keys, known_roles = _message_keys(mappings), _role_names(roles)
    sources = [value] if text_role and isinstance(value, dict) else value
    messages = fields.messages(sources, column, role=keys["role"], content=keys["content"], roles=known_roles)
    return [
        fields.with_calls(_rename_keys(message, source, keys))
        for message, source in zip(messages, sources, strict=True)
    ]


def _message_keys(mappings: Mapping[str, str] | None) -> dict[str, str]:
    own = {} if mappings is None else mappings
    if not isinstance(own, Mapping) or not all(isinstance(name, str) for name in own.values()):
        raise UsageError(
            f"prepare.format_args: message_property_mappings is {own!r}; expected names such as {{role: from, content: value}}."
        )
    return {"role": "role", "content": "content"} | dict(own)


def _role_names(roles: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    own = {} if roles is None else roles
    if not isinstance(own, Mapping) or not all(isinstance(sources, list | tuple) for sources in own.values()):
        raise UsageError(
            f"prepare.format_args: roles is {own!r}; expected lists such as {{user: [human], assistant: [gpt]}}."
        )
    return fields.ROLES | {str(source): role for role, sources in own.items() for source in sources}


def _rename_keys(message: Message, source: Message, keys: Mapping[str, str]) -> Message:
    """Return the message under our names of its keys; `keys` maps ours to the data's."""
    if all(key == name for key, name in keys.items()):
        return message
    others = {key: value for key, value in message.items() if key not in keys and key not in keys.values()}
    renamed = {key: source[name] for key, name in keys.items() if source.get(name) is not None}
    # A key that the data has under our name, next to its own name for it, is something else.
    return others | renamed | {"role": message["role"], "content": message.get("content")}


def _continuation(prompt: list[Message], answer: list[Message], column: str) -> list[Message]:
    """Return the answer without the end of the prompt that it repeats."""
    asked, turns = list(map(_turn_identity, prompt)), list(map(_turn_identity, answer))
    longest = min(len(prompt), len(answer) - 1)
    n = next((n for n in range(longest, 0, -1) if turns[:n] == asked[-n:]), 0)
    if answer[n]["role"] != "assistant":
        raise Unusable("no assistant turn", f"{column} continues the prompt with a turn of {answer[n]['role'][:40]}")
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
        prompt=_format_prompt(record, prompt_format, field_system, field_prompt),
        chosen=_format_answer(record, "chosen", chosen_format, field_chosen),
        rejected=_format_answer(record, "rejected", rejected_format, field_rejected),
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
        prompt=_format_prompt(record, prompt_format, field_system, field_prompt),
        completion=_format_answer(record, "completion", completion_format, field_completion),
        label=fields.boolean(record, field_label),
        rendered=True,
    )


def _format_prompt(record: Record, prompt_format: str, field_system: str, field_prompt: str) -> str:
    prompt = fields.text(record, field_prompt)
    if not prompt.strip():
        raise Unusable("empty prompt", field_prompt)
    return _fill("prompt_format", prompt_format, system=fields.optional_text(record, field_system), prompt=prompt)


def _format_answer(record: Record, name: str, answer_format: str, column: str) -> str:
    return _fill(f"{name}_format", answer_format, **{name: _refuse_empty(fields.text(record, column), column)})


def _fill(option: str, text: str | None, **texts: str) -> str:
    # Never str.format: {prompt.__class__} would reach into Python.
    if text is not None and not isinstance(text, str):
        raise UsageError(f"prepare.format_args: {option} is {fields.type_name(text)}; expected text.")
    pieces = _parse_format(option, text or "{" + option.removesuffix("_format") + "}", tuple(texts))
    return "".join(literal + texts.get(name, "") for literal, name in pieces)


@lru_cache
def _parse_format(option: str, text: str, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split a format into pieces of text, each with the name that follows it."""
    places = " and ".join("{" + name + "}" for name in names)
    expected = f"expected text with {places} in it, and {{{{ for a brace"
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"prepare.format_args: {option} {text!r} is not a format ({error}); {expected}.") from None
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
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **fields.template_inputs(record))


@data_format("prompt", "answers", makes=Ranking, name="zephyr.nectar")
def zephyr_nectar(record: Record) -> Ranking:
    """Axolotl zephyr.nectar: prompt and answers, each with a rank of which 1 is the best, written out as Zephyr's template."""
    prompt, answers = fields.text(record, "prompt"), fields.get_column(record, "answers")
    if not prompt.strip():
        raise Unusable("empty prompt")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise Unusable("wrong type", f"answers is {fields.type_name(answers)}; expected a list of {{answer, rank}}")
    return Ranking(
        prompt=f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n",
        # Axolotl takes the two of the highest rank numbers, which are the worst.
        answers=tuple(Candidate(fields.text(answer, "answer"), -fields.number(answer, "rank")) for answer in answers),
        rendered=True,
    )
