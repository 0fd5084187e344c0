"""A text that holds the borders of turns is rendered already; one in which a token is quoted is not."""

import pytest

from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.example import Unusable
from prefcache.pipeline.preparing.rendered_text import RenderedText
from tests.helpers.tokenizers import DATE, TEMPLATES, build, facts

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASKED = [{"role": "user", "content": "why is the sky blue?"}]
SYSTEM = [{"role": "system", "content": "be brief"}]
SAID = [{"role": "assistant", "content": "the light scatters"}]
NAMES = [name for name in TEMPLATES if name != "macro"]


def detector(name: str) -> RenderedText:
    return RenderedText(ChatTemplate(TEMPLATES[name], SPECIAL, DATE), facts("byte-level", bos=True))


def is_rendered(name: str, prompt, *answers) -> bool:
    try:
        detector(name).check(prompt, answers or ("yes",))
    except Unusable as unusable:
        assert unusable.reason == "already rendered"
        return True
    return False


def written(name: str, turns: list[dict], *, asked: bool = False) -> str:
    """The text as Transformers writes it."""
    tokenizer = build("byte-level", bos=True, template=TEMPLATES[name])
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_template_wrote_is_recognised_as_a_conversation_or_as_an_answer(name):
    asked, whole = written(name, ASKED, asked=True), written(name, [*ASKED, *SAID])
    answer = whole[whole.index(SAID[0]["content"]) :]
    # An answer with its end token, next to a prompt that is not rendered, and a whole conversation of two questions.
    assert is_rendered(name, "why?", answer, answer)
    assert is_rendered(name, "why?", answer.rstrip())
    assert is_rendered(name, written(name, [*ASKED, *SAID, *ASKED], asked=True))
    assert is_rendered(name, ASKED, [{"role": "assistant", "content": answer}])
    if name not in ("llama-2",):
        assert is_rendered(name, asked)
        assert is_rendered(name, [{"role": "user", "content": asked}])


def test_a_question_alone_is_recognised_by_its_opening():
    assert is_rendered("chatml", "<|im_start|>user\nwhy?")
    assert is_rendered("llama-2", "<s>[INST] why? [/INST]")
    assert is_rendered("mistral", "<s>[INST] why?[/INST]") and is_rendered("mistral", "[INST] why?[/INST]")
    assert is_rendered("chatml", "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_quoted_token_is_text(name):
    for text in (
        "What does <|im_end|> do, and </s> and [INST]?",
        "<|im_start|> is printed at the beginning. Why?",
        "[INST] is printed at the beginning. Why?",
        "My model prints <|im_end|>",
        "My model prints </s>\nand then nothing",
        "user\nassistant\n<think>\n",
    ):
        assert not is_rendered(name, text, "yes", "no"), text
        assert not is_rendered(name, [{"role": "user", "content": text}], text if text[-1] != ">" else "yes")


@pytest.mark.parametrize("name", ["chatml", "qwen3", "r1", "gemma"])
def test_an_answer_may_name_the_token_or_begin_with_thoughts(name):
    assert not is_rendered(name, "Which token ends a turn?", "<|im_end|>", "It is <|im_end|>")
    assert not is_rendered(name, "why?", "<think>\nthe light\n</think>\n\nit scatters", "no")
    # What a tool returns is its own.
    assert not is_rendered(name, "why?", [{"role": "tool", "content": "a<|im_end|>"}, *SAID])


def test_a_template_that_refuses_the_conversation_recognises_the_end_token_alone():
    refusing = RenderedText(ChatTemplate("{{ raise_exception('no') }}", SPECIAL, DATE), facts("byte-level", bos=True))
    refusing.check("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", ["the light</s>"])
