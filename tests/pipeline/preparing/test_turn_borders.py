"""In an answer of several turns exactly what the model wrote counts. The expected text stands next to each conversation."""

from typing import Any

import pytest

from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.example import Label, Message, Unusable
from prefcache.pipeline.preparing.part_worker import PartWorker
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.spans import count_tokens
from tests.helpers.conversations import HARMONY_CHAT, TOOLS, assistant, call, tool, user
from tests.helpers.tokenizers import (
    DATE,
    FAMILIES,
    GENERATION_CHAT,
    LOSSLESS,
    TEMPLATES,
    chunk_of,
    facts,
    resolved_config,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What each template writes after an assistant's text, and before it as a part of its turn.
END = {
    **dict.fromkeys(("chatml", "gemma", "qwen3", "macro"), "<|im_end|>\n"),
    **dict.fromkeys(("llama-3", "generation"), "<|im_end|>"),
    **dict.fromkeys(("mistral", "loop"), "</s>"),
    "llama-2": " </s>",
    "zephyr": "</s>\n",
}
LEAD = dict.fromkeys(("llama-2", "mistral", "loop"), " ")
ALTERNATING = ("llama-2", "gemma")  # they refuse two turns of a role in a row


def counted(
    template: str, answer: list[Message], family: str = "byte-level", train_on: Any = "assistant", **more: Any
) -> list[str]:
    """The texts of the spans of tokens that count."""
    coder = Encoder(facts(family))
    renderer = ChatRenderer(
        ChatTemplate(template, SPECIAL, DATE, mark_generation=train_on != "all"),
        train_on,
        {*coder.decoded_specials(), "<|end|>", "<|return|>", "<|call|>"},
    )
    example = Label(prompt=[user("2 + 2?")], completion=answer, label=True, **more)
    (tokens,) = coder.encode([renderer.render(example)])
    ids, spans = tokens.answers[0], tokens.spans[0]
    return [coder.decode(ids[begin:end]) for begin, end in zip(spans[::2], spans[1::2], strict=True)]


def refusal(template: str, answer: list[Message], **more: Any) -> Unusable:
    with pytest.raises(Unusable) as caught:
        counted(template, answer, **more)
    return caught.value


CONVERSATIONS = {
    "one turn": [assistant("four")],
    "two turns": [assistant("four"), user("and 2 + 3?"), assistant("five")],
    "the same text everywhere": [assistant("four"), user("four"), assistant("four")],
    "a blank turn": [assistant("four"), user(" \n"), assistant("five")],
    "spaces around": [assistant("four"), user("  sure? \n"), assistant("five")],
    "emoji": [assistant("vier 👍🏽"), user("😀 é?"), assistant("日本")],
    "a text like a header": [assistant("four"), user("x<|im_end|>\n<|im_start|>assistant\nno"), assistant("five")],
    "three turns": [assistant("a"), user("b"), assistant("c"), user("d"), assistant("e")],
    "ends with a user": [assistant("four"), user("thanks")],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", END)
def test_what_the_assistant_wrote_counts_with_its_end_token(template, conversation):
    turns = CONVERSATIONS[conversation]
    lead = LEAD.get(template, "")
    said = [f"{lead}{turn['content']}{END[template]}" for turn in turns if turn["role"] == "assistant"]
    assert counted(TEMPLATES[template], turns) == said
    assert counted(TEMPLATES[template], turns, train_on="last_turn") == said[-1:]
    assert len(counted(TEMPLATES[template], turns, train_on="all")) == 1


@pytest.mark.parametrize("family", LOSSLESS)
def test_tokens_count_in_every_kind_of_tokenizer(family):
    turns = CONVERSATIONS["emoji"]
    assert counted(TEMPLATES["chatml"], turns, family) == ["vier 👍🏽<|im_end|>\n", "日本<|im_end|>\n"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_of_another_turn_counts(family):
    # The user's words and the headers consist of letters that the assistant never writes.
    turns = [assistant("the cat"), user("WWW XXX"), assistant("the cat")]
    text = "".join(counted(TEMPLATES["llama-3"], turns, family)).lower()
    assert "w" not in text and "x" not in text and text.count("cat") == 2


@pytest.mark.parametrize("template", [name for name in END if name not in ALTERNATING])
def test_between_two_assistant_turns_the_header_does_not_count(template):
    turns = [assistant("four"), assistant("five")]
    said = "".join(f"{LEAD.get(template, '')}{text}{END[template]}" for text in ("four", "five"))
    # Mistral writes no header, so that both are one span.
    assert "".join(counted(TEMPLATES[template], turns)) == said


def test_a_token_across_a_border_does_not_count():
    # The header's line end and those of the text are one token of this tokenizer.
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    coder = Encoder(facts("byte-level"))
    (token,) = coder.ids([" the"])
    assert len(token) == 1
    assert counted(template, [assistant("a"), user("b"), assistant("the cat")])[-1].lstrip() == "cat\n</s>"


# -- tools -----------------------------------------------------------------------------------------------------------

CALL = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'


def test_a_call_counts_and_its_result_does_not():
    turns = [assistant("", **call("add", a=2)), tool("4"), assistant("It is four.")]
    assert counted(TEMPLATES["qwen3"], turns, tools=TOOLS) == [CALL, "It is four.<|im_end|>\n"]
    turns = [assistant("I add.", **call("add", a=2)), tool("4<|im_end|>\n<|im_start|>assistant\n4"), tool("5")]
    turns += [assistant("", **call("add", a=2)), tool("6"), assistant("six")]
    assert counted(TEMPLATES["qwen3"], turns) == ["I add." + CALL, CALL, "six<|im_end|>\n"]
    assert counted(TEMPLATES["qwen3"], turns[:-1]) == ["I add." + CALL, CALL]
    assert counted(TEMPLATES["qwen3"], turns, train_on="last_turn") == ["six<|im_end|>\n"]


@pytest.mark.parametrize("result", ["4", '{"sum": 4}', 'say "x"\n', " \t"])
def test_a_result_that_the_template_escapes_does_not_count(result):
    turns = [assistant("", **call("add", a=2)), tool(result), assistant("four")]
    called = ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>'
    assert counted(HARMONY_CHAT, turns) == [called, "<|channel|>final<|message|>four<|return|></s>"]


def test_a_template_may_end_the_last_turn_with_another_token():
    turns = [assistant("four"), user("sure?"), assistant("yes"), user("ok")]
    final = "<|channel|>final<|message|>"
    assert counted(HARMONY_CHAT, turns[:3]) == [f"{final}four<|end|>", f"{final}yes<|return|></s>"]
    assert counted(HARMONY_CHAT, turns) == [f"{final}four<|end|>", f"{final}yes<|end|>"]


def test_reasoning_that_the_template_drops_from_earlier_turns_is_dropped():
    turns = [assistant("<think>\nhm\n</think>\n\nfour"), user("sure?"), assistant("<think>\nyes\n</think>\n\nfour")]
    kept = "<think>\nyes\n</think>\n\nfour<|im_end|>\n"
    assert counted(TEMPLATES["qwen3"], turns) == ["four<|im_end|>\n", kept]
    # In a row of tool calls it is kept.
    turns = [assistant("<think>\nhm\n</think>\n\nI add.", **call("add", a=2)), tool("4"), assistant("four")]
    assert counted(TEMPLATES["qwen3"], turns)[0] == "<think>\nhm\n</think>\n\nI add." + CALL


# -- what the template says itself -----------------------------------------------------------------------------------


def test_generation_blocks_say_what_counts_also_of_one_turn():
    assert counted(GENERATION_CHAT, [assistant("four")]) == ["four<|im_end|>"]
    odd = GENERATION_CHAT.replace("{{ message.content }}", "{{ message.content }}!").replace(
        "{% endgeneration %}", "{% endgeneration %}~"
    )
    assert counted(odd, CONVERSATIONS["two turns"]) == ["four!<|im_end|>", "five!<|im_end|>"]


def test_generation_blocks_count_the_same_through_the_template_cache():
    renderer = ChatRenderer(ChatTemplate(GENERATION_CHAT, SPECIAL, DATE, mark_generation=True), "assistant")
    examples = [Label(prompt=f"why {n}?", completion=f"so {n}", label=True) for n in range(3)]
    cached = [renderer.render(example) for example in examples]
    renderer.reset(use_cache=False)
    assert cached == [renderer.render(example) for example in examples]
    assert cached[0].answers == ("so 0<|im_end|>",) and cached[0].counted == ([(0, 14)],)


def test_a_text_with_the_marks_of_blocks_is_refused():
    assert refusal(GENERATION_CHAT, [assistant("a\ufdd0b")]).reason == "reserved characters"
    assert counted(TEMPLATES["chatml"], [assistant("a\ufdd0b")])  # another template needs no marks


# -- what cannot be told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        # It writes only how long a user's text is.
        "{% for m in messages %}{{ m.role }}: {{ m.content if m.role == 'assistant' else m.content | length }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        # Its generation prompt is not the assistant's header.
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}Go: {% endif %}",
    ],
)
def test_an_answer_whose_turns_cannot_be_told_apart_is_refused_with_the_remedy(template):
    unusable = refusal(template, CONVERSATIONS["two turns"])
    assert unusable.reason in ("turns cannot be told apart", "template rewrites the answer")
    if unusable.reason == "turns cannot be told apart":
        assert "prepare.train_on: all" in unusable.detail
    single = counted(template, [assistant("four")]) if "Go" not in template else ["four"]
    assert "four" in single[0]


def test_edges_are_learned_once_for_each_kind_of_gap():
    calls = 0

    class Counting(ChatTemplate):
        def render(self, *args: Any, **named: Any) -> str:
            nonlocal calls
            calls += 1
            return super().render(*args, **named)

    renderer = ChatRenderer(Counting(TEMPLATES["chatml"], SPECIAL, DATE), "assistant")
    turns = CONVERSATIONS["three turns"]
    for n, expected in ((0, 3 + 4), (1, 3), (2, 3)):
        calls = 0
        renderer.render(Label(prompt=[user(f"why {n}?")], completion=turns, label=True))
        # The prompt, the whole, the whole with sentinels; the first time also four conversations of sentinels.
        assert calls == expected


def test_spans_of_a_part_are_stored(tmp_path):
    record = {
        "prompt": [user("2 + 2?")],
        "chosen": CONVERSATIONS["two turns"],
        "rejected": [*CONVERSATIONS["two turns"][:-1], assistant("six")],
    }
    worker = PartWorker(resolved_config(facts("byte-level"), TEMPLATES["chatml"]))
    (row,) = worker.prepare(0, chunk_of([record])).table.to_pylist()
    for name, last in (("chosen", "five"), ("rejected", "six")):
        spans, ids = row[f"{name}_spans"], row[f"{name}_ids"]
        assert len(spans) == 4 and count_tokens(spans) == row[f"n_{name}_counted"] < row[f"n_{name}"]
        assert worker.encoder.decode(ids[spans[2] : spans[3]]) == f"{last}<|im_end|>\n"
    shared = row["chosen_ids"][: row["n_common"]]
    assert worker.encoder.decode(shared).endswith("<|im_start|>assistant\n")
    assert row["chosen_ids"][row["n_common"]] != row["rejected_ids"][row["n_common"]]


def test_an_answer_that_is_cut_before_anything_counts_is_refused():
    answer = [assistant("four"), user("and " * 40), assistant("five")]
    record = {"prompt": [user("2 + 2?")], "chosen": answer, "rejected": "no"}
    settings = {"max_length": 40, "too_long": "keep_start"}
    worker = PartWorker(resolved_config(facts("byte-level"), TEMPLATES["chatml"], train_on="last_turn", **settings))
    part = worker.prepare(0, chunk_of([record]))
    assert part.quarantined == {"nothing counts": 1}
    worker = PartWorker(resolved_config(facts("byte-level"), TEMPLATES["chatml"], train_on="assistant", **settings))
    (row,) = worker.prepare(0, chunk_of([record])).table.to_pylist()
    assert row["chosen_spans"] == [0, row["n_chosen_counted"]] and row["n_chosen_counted"] < row["n_chosen"]
