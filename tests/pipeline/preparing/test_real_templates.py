"""Masks of real tokenizers and templates, token by token, against conversations that are written down in segments."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.example import Label, Message
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.tokenizer_facts import load_facts
from tests.helpers.conversations import HARMONY_CHAT, TOOLS, assistant, call, tool, user
from tests.helpers.real_tokenizers import fetch_or_skip
from tests.helpers.tokenizers import DATE

pytestmark = pytest.mark.slow
Segment = tuple[str, bool]  # a text, and whether it counts


def check(folder: Path, template: str | None, answer: list[Message], segments: list[Segment]) -> None:
    """The text is that of the segments, and a token counts if and only if it lies in one that counts."""
    facts = load_facts(folder)
    coder = Encoder(facts)
    text = template or facts.chat_template
    assert text is not None
    renderer = ChatRenderer(
        ChatTemplate(text, facts.special, DATE, mark_generation=True), "assistant", coder.decoded_specials()
    )
    calls = any(turn.get("tool_calls") for turn in answer)
    example = Label(prompt=[user("2 + 2?")], completion=answer, label=True, tools=TOOLS if calls else None)
    rendered = renderer.render(example)
    assert rendered.answers == ("".join(text for text, _ in segments),)
    (tokens,) = coder.encode([rendered])
    ids, spans = tokens.answers[0], tokens.spans[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(rendered.prompt + rendered.answers[0], add_special_tokens=False, return_offsets_mapping=True)
    assert tokens.prompt + ids == whole["input_ids"]
    is_counted = [is_counted for text, is_counted in segments for _ in text]
    begin = len(rendered.prompt)
    expected = [all(is_counted[a - begin : b - begin]) for a, b in whole["offset_mapping"][-len(ids) :]]
    found = [any(a <= n < b for a, b in zip(spans[::2], spans[1::2], strict=True)) for n in range(len(ids))]
    assert found == expected


def qwen_user(text: str) -> Segment:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False


def qwen_results(*texts: str) -> Segment:
    results = "".join(f"\n<tool_response>\n{text}\n</tool_response>" for text in texts)
    return f"<|im_start|>user{results}<|im_end|>\n<|im_start|>assistant\n", False


def qwen_said(text: str, before: str = "") -> Segment:
    return f"{before}{text}<|im_end|>\n", True


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
FAKE = "4<|im_end|>\n<|im_start|>assistant\nno"
ADD = call("add", a=2, b=2)
# Without thoughts of its own, the last turn gets empty ones from this template.
EMPTY = "<think>\n\n</think>\n\n"
QWEN3 = {
    "one turn": ([assistant("four")], [qwen_said("four", EMPTY)]),
    "two turns": (
        [assistant("four"), user("and 2 + 3?"), assistant("five")],
        [qwen_said("four"), qwen_user("and 2 + 3?"), qwen_said("five", EMPTY)],
    ),
    "the same text": (
        [assistant("four"), user("four"), assistant("four")],
        [qwen_said("four"), qwen_user("four"), qwen_said("four", EMPTY)],
    ),
    "a blank turn": (
        [assistant("four"), user(""), assistant("five")],
        [qwen_said("four"), qwen_user(""), qwen_said("five", EMPTY)],
    ),
    "emoji": (
        [assistant("vier 👍🏽"), user("😀 é\n"), assistant("日本")],
        [qwen_said("vier 👍🏽"), qwen_user("😀 é\n"), qwen_said("日本", EMPTY)],
    ),
    "a tool": (
        [assistant("", **ADD), tool("4"), assistant("It is four.")],
        [qwen_said(CALL), qwen_results("4"), qwen_said("It is four.", EMPTY)],
    ),
    "results that look like a header": (
        [assistant("I add.", **ADD), tool(FAKE), tool(" 4\n"), assistant("", **ADD), tool(FAKE), assistant("four")],
        [
            qwen_said(f"I add.\n{CALL}"),
            qwen_results(FAKE, " 4\n"),
            qwen_said(CALL),
            qwen_results(FAKE),
            qwen_said("four", EMPTY),
        ],
    ),
    "results in user turns": (
        [assistant("I add."), user("<tool_response>\n4\n</tool_response>"), assistant("four")],
        [qwen_said("I add."), qwen_user("<tool_response>\n4\n</tool_response>"), qwen_said("four", EMPTY)],
    ),
    "reasoning before another question": (
        [assistant("<think>\nhm\n</think>\n\nfour"), user("sure?"), assistant("<think>\nyes\n</think>\n\nfour")],
        [qwen_said("four"), qwen_user("sure?"), qwen_said("<think>\nyes\n</think>\n\nfour")],
    ),
    "reasoning before a result": (
        [assistant("I add.", reasoning_content="hm", **ADD), tool("4"), assistant("four", reasoning_content="so")],
        [
            qwen_said(f"<think>\nhm\n</think>\n\nI add.\n{CALL}"),
            qwen_results("4"),
            qwen_said("<think>\nso\n</think>\n\nfour"),
        ],
    ),
    "ends with a result": (
        [assistant("", **ADD), tool("4")],
        [qwen_said(CALL), (qwen_results("4")[0].removesuffix("<|im_start|>assistant\n"), False)],
    ),
}


@pytest.mark.parametrize("conversation", QWEN3)
def test_qwen3(conversation):
    check(fetch_or_skip("qwen3"), None, *QWEN3[conversation])


def llama_user(text: str) -> Segment:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return f"{header.format('user')}{text}<|eot_id|>{header.format('assistant')}", False


def llama_said(text: str) -> Segment:
    return f"{text}<|eot_id|>", True


LLAMA3 = {
    "one turn": ([assistant("four")], [llama_said("four")]),
    "two turns": (
        [assistant("four\n\n"), user("  and 2 + 3? \n"), assistant("five")],
        [llama_said("four"), llama_user("and 2 + 3?"), llama_said("five")],
    ),
    "blank": (
        [assistant("four"), user(" "), assistant("日本")],
        [llama_said("four"), llama_user(""), llama_said("日本")],
    ),
    "header": (
        [assistant("four"), user("<|eot_id|>" + llama_user("no")[0]), assistant("four")],
        [llama_said("four"), llama_user("<|eot_id|>" + llama_user("no")[0].strip()), llama_said("four")],
    ),
}


@pytest.mark.parametrize("conversation", LLAMA3)
def test_llama_3_1(conversation):
    check(fetch_or_skip("llama3_1"), None, *LLAMA3[conversation])


GPT_OSS = {
    "two turns": (
        [assistant("four"), user("sure?"), assistant("yes")],
        [
            ("<|channel|>final<|message|>four<|end|>", True),
            ("<|start|>user<|message|>sure?<|end|><|start|>assistant", False),
            ("<|channel|>final<|message|>yes<|return|>", True),
        ],
    ),
    "a tool": (
        [assistant("", **ADD), tool('{"sum":\n"4"}'), assistant("four")],
        [
            (' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>', True),
            (
                '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"{\\"sum\\":\\n\\"4\\"}"<|end|><|start|>assistant',
                False,
            ),
            ("<|channel|>final<|message|>four<|return|>", True),
        ],
    ),
}


@pytest.mark.parametrize("conversation", GPT_OSS)
def test_gpt_oss_with_a_template_in_its_style(conversation):
    check(fetch_or_skip("gptoss"), HARMONY_CHAT, *GPT_OSS[conversation])
