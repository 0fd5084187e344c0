"""The text of a prompt and its answers is what the model sees when it is asked, and what it would have said."""

from typing import Any

import pytest

from prefcache.pipeline.preparing import template_cache
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import ExampleText
from prefcache.pipeline.preparing.example import IMAGE_MARK, Label, Message, Pair, Turns, Unusable
from prefcache.pipeline.preparing.render_chat import ChatRenderer, shorter_prompts
from tests.helpers.tokenizers import (
    CHATML,
    DATE,
    GEMMA_CHAT,
    LLAVA_ONEVISION_CHAT,
    QWEN3_CHAT,
    R1_CHAT,
    SMOLVLM_CHAT,
    TEMPLATES,
    build,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "why red green?"}
SYSTEM = {"role": "system", "content": "the cat sings"}
REPLY = {"role": "assistant", "content": "blue fish"}
ASKED = "<|im_start|>assistant\n"


def renderer(text: str | None, **tokens: str) -> ChatRenderer:
    return ChatRenderer(ChatTemplate(text, tokens or SPECIAL, DATE) if text is not None else None)


def assistant(text: str, **more: Any) -> list[Message]:
    return [{"role": "assistant", "content": text, **more}]


def outcome(made: ChatRenderer, example: Pair | Label) -> ExampleText | Unusable:
    try:
        return made.render(example)
    except Unusable as error:
        return error


def rendered(template: str | None, prompt: Turns, answers: tuple[Turns, ...], asked: Any) -> ExampleText | Unusable:
    """What comes of it, with the template cache as without."""
    example: Pair | Label
    if len(answers) == 2:
        example = Pair(prompt=prompt, chosen=answers[0], rejected=answers[1], **asked)
    else:
        example = Label(prompt=prompt, completion=answers[0], label=True, **asked)
    cached, one_by_one = renderer(template), renderer(template)
    one_by_one.reset(use_cache=False)
    found, expected = outcome(cached, example), outcome(one_by_one, example)
    assert cached.counts == one_by_one.counts
    if isinstance(expected, Unusable):
        assert isinstance(found, Unusable) and (found.reason, found.detail) == (expected.reason, expected.detail)
    else:
        assert found == expected
    return expected


def said(template: str | None, prompt: Turns, *answers: Turns, **asked: Any) -> ExampleText:
    found = rendered(template, prompt, answers or ("yes",), asked)
    assert isinstance(found, ExampleText), (found.reason, found.detail)
    return found


def refusal(template: str | None, prompt: Turns, *answers: Turns, **asked: Any) -> Unusable:
    found = rendered(template, prompt, answers or ("yes",), asked)
    assert isinstance(found, Unusable), found
    return found


# -- prompt and answer are Transformers' own text --------------------------------------------------------------------

PROMPTS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "many turns": [USER, REPLY, USER],
    "odd text": [{"role": "user", "content": "  ünï \n\n日本 <|im_end|> \ue000"}],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("name", ["chatml", "qwen3", "zephyr", "generation", "mistral", "llama-2", "loop"])
def test_text_is_that_of_apply_chat_template(name, prompt):
    tokenizer = build("byte-level", bos=True, template=TEMPLATES[name])
    if name in ("mistral", "loop") and prompt[0] is SYSTEM:
        return  # they have no place for it
    found = said(TEMPLATES[name], prompt, assistant("the dog runs"), assistant("a"))
    assert found.prompt == tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    for text, answer in zip(found.answers, ("the dog runs", "a"), strict=True):
        whole = tokenizer.apply_chat_template([*prompt, *assistant(answer)], tokenize=False)
        assert found.prompt + text == whole
    assert not found.plain


WHY = "<|im_start|>user\nwhy?<|im_end|>\n"
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
SEVERAL_TURNS = [*assistant("one"), USER, *assistant("two")]
NAMES = "{% for m in messages %}{{ m.name }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "prompt", "answers", "expected"),
    [
        # A prompt ends with the generation prompt, and an answer with its end.
        (CHATML, "why?", ["the dog", "a cat"], (WHY + ASKED, "the dog<|im_end|>\n", "a cat<|im_end|>\n")),
        (CHATML, [{"role": "user", "content": "why?"}], [assistant("the dog")], (WHY + ASKED, "the dog<|im_end|>\n")),
        # An answer of several turns is rendered whole.
        (
            CHATML,
            "why?",
            [SEVERAL_TURNS],
            (WHY + ASKED, f"one<|im_end|>\n<|im_start|>user\nwhy red green?<|im_end|>\n{ASKED}two<|im_end|>\n"),
        ),
        # Without a generation prompt the header belongs to the answer.
        (CHATML.partition("{% if add_generation_prompt")[0], "why?", ["a"], (WHY, f"{ASKED}a<|im_end|>\n")),
        (TRIMMING, "  why?\n", ["\n the dog ", " a\t"], (WHY + ASKED, "the dog<|im_end|>\n", "a<|im_end|>\n")),
        # Llama 2's joins the system message and the first turn before it strips the whole.
        (
            TEMPLATES["llama-2"],
            [SYSTEM, {"role": "user", "content": " why? \n"}],
            [" the dog "],
            ("<s>[INST] <<SYS>>\nthe cat sings\n<</SYS>>\n\n why? [/INST]", " the dog </s>"),
        ),
        # Messages may have more keys than role and content.
        (NAMES, [USER | {"name": "ann"}], [assistant("a", name="bob")], ("ann:why red green?;", "bob:a;")),
        # A system message without a place goes before the first question, also where the template just leaves it out.
        (
            GEMMA_CHAT,
            [SYSTEM, USER],
            ["blue"],
            (
                "<s><|im_start|>user\nthe cat sings\n\nwhy red green?<|im_end|>\n<|im_start|>model\n",
                "blue<|im_end|>\n",
            ),
        ),
        (
            TEMPLATES["loop"],
            [SYSTEM, USER],
            ["blue"],
            ("User: the cat sings\n\nwhy red green?</s>Assistant:", " blue</s>"),
        ),
    ],
)
def test_the_text_is_what_the_template_writes(template, prompt, answers, expected):
    assert said(template, prompt, *answers) == ExampleText(expected[0], expected[1:])


def test_spaces_that_a_macro_strips_are_stripped_after_many_conversations_too():
    # The cache is compared with the template now and then; what differs must not hide between the times.
    many = renderer(TEMPLATES["macro"])
    for n in range(40):
        spaces = " " * (n % 2 if n > 20 else 0)
        found = many.render(Label(prompt=f"{spaces}why {n}?{spaces}\n", completion=f"{spaces}x ", label=True))
        assert found == ExampleText(f"<|im_start|>user\nwhy {n}?<|im_end|>\n{ASKED}", ("x<|im_end|>\n",))


# -- tools and arguments ---------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "find"}}]}


def test_tools_and_arguments_reach_the_template():
    found = said(QWEN3_CHAT, [SYSTEM, USER], "yes", tools=TOOLS, template_kwargs={"enable_thinking": False})
    assert found.prompt.startswith("<|im_start|>system\nthe cat sings\n\n# Tools\n<tools>\n" + '{"type": "function"')
    assert found.prompt.endswith(f"{ASKED}<think>\n\n</think>\n\n")
    tokenizer = build("byte-level", template=QWEN3_CHAT)
    assert found.prompt == tokenizer.apply_chat_template(
        [SYSTEM, USER], tokenize=False, add_generation_prompt=True, tools=TOOLS, enable_thinking=False
    )


def test_a_rows_own_arguments_go_before_the_tokenizers_special_tokens():
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    assert said(template, [USER], "yes").answers[0] != "assistant yes[END]"
    found = said(template, [USER], "yes", template_kwargs={"eos_token": "[END]"})
    assert found == ExampleText("user why red green?[END]", ("assistant yes[END]",))


def test_where_thinking_is_switched_off_the_answer_follows_the_empty_thoughts():
    # The template's own whole has no empty thoughts, so the answer is put behind those that were asked for.
    found = said(QWEN3_CHAT, "why?", "blue", template_kwargs={"enable_thinking": False})
    assert found == ExampleText(
        f"<|im_start|>user\nwhy?<|im_end|>\n{ASKED}<think>\n\n</think>\n\n", ("blue<|im_end|>\n",)
    )


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_an_answer_may_be_a_call_without_text(content):
    call = {key: value for key, value in CALL.items() if key != "content"} | content
    if not content:
        call["content"] = ""
    found = said(QWEN3_CHAT, [USER], [call], [*assistant("blue")], tools=TOOLS)
    assert found.answers == ('\n<tool_call>\n{"name": "find"}\n</tool_call><|im_end|>\n', "blue<|im_end|>\n")


def test_an_answer_may_call_and_go_on():
    turns = [CALL, {"role": "tool", "content": "42"}, *assistant("it is 42")]
    found = said(QWEN3_CHAT, [USER], turns, tools=TOOLS)
    assert found.answers == (
        '\n<tool_call>\n{"name": "find"}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n{ASKED}it is 42<|im_end|>\n",
    )


# In the style of templates that join arguments to their own text, as OpenAI sends them.
JOINING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls %}{{ '[' + call.function.arguments + ']' }}{% endfor %}",
)
WITH_ARGUMENTS = CALL | {"tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"at": "sea"}}}]}


def test_arguments_are_text_for_a_template_that_takes_text_alone():
    assert said(JOINING, [USER], [WITH_ARGUMENTS]).answers == ('[{"at": "sea"}]<|im_end|>\n',)
    found = said(QWEN3_CHAT, [USER], [WITH_ARGUMENTS]).answers[0]
    assert '{"name": "find", "arguments": {"at": "sea"}}' in found


def test_thoughts_reach_a_template_that_prints_them_and_are_counted_where_they_do_not():
    thinking = assistant("blue", reasoning_content="red, green")
    assert said(QWEN3_CHAT, [USER], thinking).answers == ("<think>\nred, green\n</think>\n\nblue<|im_end|>\n",)
    assert counted(QWEN3_CHAT, ([USER], thinking)) == {}
    assert counted(CHATML, ([USER], thinking), ([USER], assistant("blue"))) == {"unseen_thoughts": 1}
    # Qwen's template does not read this one.
    assert counted(QWEN3_CHAT, ([USER], assistant("blue", thinking="red, green"))) == {"unseen_thoughts": 1}


def test_thoughts_that_the_template_drops_from_earlier_turns_are_counted():
    again = [{"role": "user", "content": "sure?"}, *assistant("blue")]
    assert counted(QWEN3_CHAT, ([USER], [*assistant(THOUGHTS), *again])) == {"dropped_thoughts": 1}
    assert counted(QWEN3_CHAT, ([USER], [*assistant("blue"), *again])) == {}


# -- templates that change an answer ---------------------------------------------------------------------------------

STRIPS_THINKING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}",
)
THOUGHTS = "<think>\nred, green\n</think>\n\nblue"


def counted(text: str, *pairs: tuple[Turns, Turns]) -> dict[str, int]:
    made = renderer(text)
    for prompt, answer in pairs:
        made.render(Label(prompt=prompt, completion=answer, label=True))
    return dict(made.counts)


def test_thoughts_that_a_template_strips_are_put_back():
    counting = STRIPS_THINKING.replace(
        "message.content.split('</think>')[-1]",
        "(message.content.split('</think>')[-1] if '</think>' in message.content else message.content)",
    )
    found = said(counting, "why?", THOUGHTS, "blue")
    assert found.answers == (f"{THOUGHTS}<|im_end|>\n", "blue<|im_end|>\n")
    assert counted(counting, ("why?", THOUGHTS), ("why?", "blue")) == {"restored": 1}


def test_a_template_that_takes_every_answer_apart_has_a_place_for_it_too():
    assert said(STRIPS_THINKING, "why?", THOUGHTS, "blue").answers == (f"{THOUGHTS}<|im_end|>\n", "blue<|im_end|>\n")


def test_thoughts_stay_as_they_are_in_a_template_that_writes_its_own():
    # Qwen 3 rewrites the spaces around thoughts; an answer is what was said.
    for thoughts in (THOUGHTS, "<think>red</think>blue", "<think>\n\n</think>\n\nblue"):
        found = said(QWEN3_CHAT, "why?", thoughts)
        assert found.prompt == f"<|im_start|>user\nwhy?<|im_end|>\n{ASKED}"
        assert "".join(found.answers[0].split()) == "".join(f"{thoughts}<|im_end|>".split()), thoughts
    # And opens those that were not opened, which is its own way of writing them.
    assert said(QWEN3_CHAT, "why?", "red</think>blue").answers == ("<think>\nred\n</think>\n\nblue<|im_end|>\n",)


def test_an_earlier_turns_thoughts_are_the_templates_affair():
    found = said(QWEN3_CHAT, [USER, *assistant(THOUGHTS), USER], "a")
    tokenizer = build("byte-level", template=QWEN3_CHAT)
    turns = [USER, *assistant(THOUGHTS), USER]
    assert found.prompt == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<think>" not in found.prompt


R1_PROMPT = f"<s><|im_start|>user\nwhy?<|im_end|>{ASKED}<think>\n"


def test_a_generation_prompt_that_opens_the_thoughts_is_followed_by_the_rest():
    found = said(R1_CHAT, "why?", THOUGHTS)
    assert found == ExampleText(R1_PROMPT, ("red, green\n</think>\n\nblue<|im_end|>",))


def test_an_answer_without_the_opening_follows_it_as_it_is():
    assert said(R1_CHAT, "why?", "red\n</think>\nblue").answers == ("red\n</think>\nblue<|im_end|>",)
    assert said(R1_CHAT, "why?", "blue", THOUGHTS) == ExampleText(
        R1_PROMPT, ("blue<|im_end|>", "red, green\n</think>\n\nblue<|im_end|>")
    )


def test_spaces_alone_are_no_change():
    # The template's own spaces, as with trimming; not an answer put back.
    squeezing = CHATML.replace("message['content']", "message['content'].split() | join(' ')")
    found = said(squeezing, "why?", "the  dog\n runs")
    assert found.answers == ("the dog runs<|im_end|>\n",)
    assert counted(squeezing, ("why?", "the  dog\n runs")) == {}


# -- system messages and refusals ------------------------------------------------------------------------------------


def test_a_merged_system_message_is_counted():
    assert counted(GEMMA_CHAT, ([SYSTEM, USER], "blue"), ([USER], "blue")) == {"merged_system": 1}


DROPPING = CHATML.replace("{{ message['content'] }}", "{{ message.content if message.role != 'assistant' }}")
SHOUTING = CHATML.replace("message['content']", "message['content'] | upper")


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "reason", "detail"),
    [
        (DROPPING, "why?", "the dog", "template rewrites the answer", "and shows no place for it"),
        # An answer that stands in the prompt already is not taken for the answer.
        (DROPPING, "blue", "blue", "template rewrites the answer", "and shows no place for it"),
        (SHOUTING, "WHY?", SEVERAL_TURNS, "template rewrites the answer", "several turns"),
        ("{{ messages | length }} turns\n" + CHATML, "why?", "the dog", "template rewrites the prompt", "when asked"),
        (GEMMA_CHAT, [SYSTEM, {"role": "tool", "content": "42"}], "blue", "template refuses", "no place for a system"),
        (GEMMA_CHAT, [USER, USER], "blue", "template refuses", "roles must alternate"),
        ("{{ raise_exception('closed') }}", [SYSTEM, USER], "blue", "template refuses", "TemplateError: closed"),
        (CHATML, [USER, REPLY], "the dog", "prompt ends with an assistant turn", ""),
        (CHATML, [USER], [USER, *assistant("a")], "answer is no assistant turn", "'user'"),
        (None, [USER], "the dog", "messages where plain text is asked for", "prepare.template: chat"),
    ],
)
def test_what_cannot_be_rendered_makes_the_record_unusable(template, prompt, answer, reason, detail):
    found = refusal(template, prompt, answer)
    assert found.reason == reason and detail in found.detail


def test_the_messages_are_not_changed():
    prompt, answer = [dict(SYSTEM), dict(USER)], assistant(THOUGHTS)
    said(GEMMA_CHAT, prompt, answer)
    assert prompt == [SYSTEM, USER] and answer == assistant(THOUGHTS)


# -- plain text ------------------------------------------------------------------------------------------------------


def test_plain_text_is_taken_as_it_is():
    assert said(None, "why red", " green dog", " cat") == ExampleText("why red", (" green dog", " cat"), plain=True)


def test_text_that_is_rendered_already_gets_no_template():
    found = said(CHATML, f"<s>why?{ASKED}", "the dog</s>", rendered=True)
    assert found == ExampleText(f"<s>why?{ASKED}", ("the dog</s>",), plain=True, closed=True)


# -- counting and checking -------------------------------------------------------------------------------------------


def test_starting_over_forgets_what_was_counted():
    made = renderer(GEMMA_CHAT)
    made.render(Label(prompt=[SYSTEM, USER], completion="blue", label=True))
    made.reset(use_cache=True)
    assert made.counts == {}


def test_checking_the_template_cache_counts_nothing_twice():
    made = renderer(GEMMA_CHAT)
    for n in range(10):
        made.render(Label(prompt=[SYSTEM, USER], completion=f"blue {n}", label=True))
    assert made.counts == {"merged_system": 10}


def test_the_most_shapes_are_kept_and_all_are_right(monkeypatch):
    monkeypatch.setattr("prefcache.pipeline.preparing.template_cache._MOST_SHAPES", 2)
    made = renderer(CHATML)
    for n in range(1, 6):
        prompt = [USER, REPLY] * n + [USER]
        found = made.render(Label(prompt=prompt, completion="x", label=True))
        assert found.prompt.count("why red green?") == n + 1
    assert sum(known is not None for known in made.cache._skeletons.values()) == 2


# -- models that see images ------------------------------------------------------------------------------------------


def test_text_alone_comes_from_the_template_cache_even_if_contents_are_parts(monkeypatch):
    made, pair = renderer(SMOLVLM_CHAT), Pair(prompt=[SYSTEM, USER], chosen="blue", rejected="red")
    first = made.render(pair)
    assert first.answers == (" blue<end_of_utterance>\n", " red<end_of_utterance>\n")
    monkeypatch.setattr(template_cache, "_CHECKED_ALWAYS", 0)
    monkeypatch.setattr(ChatTemplate, "render", None)  # it is not called again
    assert made.render(pair) == first


def test_an_answer_follows_a_generation_prompt_that_differs_in_spaces():
    # LLaVA-OneVision's template writes "assistant" and a space before an answer, and no space when it asks.
    found = said(LLAVA_ONEVISION_CHAT, [USER], "the dog", "blue")
    assert found.prompt == f"<|im_start|>user \n{USER['content']}<|im_end|><|im_start|>assistant\n"
    assert found.answers == ("the dog<|im_end|>", "blue<|im_end|>")
    marked = ChatRenderer(ChatTemplate(LLAVA_ONEVISION_CHAT, SPECIAL, DATE, mark_generation=True), "assistant")
    text = marked.render(Label(prompt=[USER], completion="the dog", label=True))
    assert (text.prompt, text.answers) == (found.prompt, found.answers[:1])
    assert text.counted == ([(0, len("the dog"))],)


def test_pictures_reach_the_template_in_their_places():
    prompt = [SYSTEM, {"role": "user", "content": f"{IMAGE_MARK}why{IMAGE_MARK}?"}]
    found = said(SMOLVLM_CHAT, prompt, "blue", images=("a", "b"))
    assert found.prompt == (
        f"<|im_start|>System: {SYSTEM['content']}<end_of_utterance>\nUser:<image>why<image>?<end_of_utterance>\nAssistant:"
    )
    assert refusal(None, f"{IMAGE_MARK}why?", "blue", images=("a",)).reason == "image in plain text"
    assert (
        refusal(SMOLVLM_CHAT, f"{IMAGE_MARK}why?", "blue", images=("a",), rendered=True).reason == "image in plain text"
    )


def test_a_merged_system_message_keeps_its_pictures_in_order():
    prompt = [
        {"role": "system", "content": f"one {IMAGE_MARK}"},
        {"role": "user", "content": f"two {IMAGE_MARK}"},
    ]
    blind = SMOLVLM_CHAT.replace("{{ line['text'] }}", "{{ line['text'] if message.role != 'system' }}")
    assert "User: one <image>\n\ntwo <image><end" in said(blind, prompt, "blue", images=("a", "b")).prompt


# -- without the oldest turns ----------------------------------------------------------------------------------------


def numbered(*roles: str) -> list[Message]:
    return [{"role": role, "content": str(n)} for n, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("roles", "left"),
    [
        ("u", []),
        ("s u", []),
        ("u a u", ["2"]),
        ("s u a u", ["03"]),
        ("u a u a u", ["234", "4"]),
        ("d u a u a u", ["0345", "05"]),
        ("u a t a u", ["4"]),  # a tool's turn belongs to the question before it
        ("u u", ["1"]),
        ("a u a u", ["123", "3"]),
    ],
)
def test_prompts_without_their_oldest_turns(roles, left):
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "t": "tool"}
    prompt = numbered(*[names[role] for role in roles.split()])
    shorter = shorter_prompts(Label(prompt=prompt, completion="x", label=True))
    assert ["".join(turn["content"] for turn in each.prompt) for each in shorter] == left
    assert shorter_prompts(Label(prompt="text", completion="x", label=True)) == []


def test_pictures_go_with_their_turns():
    contents = {"system": IMAGE_MARK, "user": f"{IMAGE_MARK}{IMAGE_MARK}?", "assistant": "a"}
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    prompt = [{"role": role, "content": contents[role]} for role in roles]
    images = tuple("s123456")
    shorter = shorter_prompts(Label(prompt=prompt, completion="x", label=True, images=images))
    assert ["".join(each.images) for each in shorter] == ["s3456", "s56"]
