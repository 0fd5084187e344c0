"""Skeletons of the chat templates of published models: for which conversations there is one, and that it is exact."""

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.example import Pair, Unusable
from prefcache.pipeline.preparing.placeholder_text import MARK
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from tests.helpers.real_tokenizers import fetch_or_skip, read_template, trl_templates
from tests.helpers.tokenizers import DATE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Prompts of one, two and three questions, some with a system message.
SHAPES = ("u", "su", "suau", "uauau")
NEMOTRON = ("3_5_lightning", "3_nano", "3_super", "3_ultra")
FETCHED = ("qwen3", "qwen2_5", "llama3_1")  # gptoss comes without a template; TRL has one for it
# Templates and shapes without a skeleton, and why. Every other template has one for each shape.
REWRITES = "begins an answer with a thought when it asks for one, and without when it prints one"
MISSING = (
    dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], (" ".join(SHAPES), REWRITES))
    | dict.fromkeys([f"nemotron_{kind}" for kind in NEMOTRON], (" ".join(SHAPES), REWRITES))
    | {
        "cohere2": ("su suau", "compares a system message with others"),
        "muse_glimmer": ("su suau", "replaces words of a system message"),
    }
)
TEMPLATES = [*trl_templates(), *(f"npm {name}" for name in FETCHED)]
# What templates look for or strip, in every order.
PIECES = [
    "<think>", "</think>", "<think>\n\n</think>\n\n", "<tool_response>", "</tool_response>", "/no_think", "[INST]", "<|channel>",
    "<channel|>", "<|im_end|>", "\n", "\n\n", " ", "\t", "\r", "\u3000", "x", "why?", "4", "é", "{{ x }}", "{% x %}", "<b>", MARK,
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@functools.cache
def template_of(name: str) -> ChatTemplate:
    text = read_template(fetch_or_skip(name.removeprefix("npm "))) if name.startswith("npm ") else trl_templates()[name]
    assert text is not None
    return ChatTemplate(text, SPECIAL, DATE, mark_generation=True)


@functools.cache
def renderer(name: str, *, use_cache: bool) -> ChatRenderer:
    renderer = ChatRenderer(template_of(name), train_on="assistant")
    renderer.reset(use_cache=use_cache)
    return renderer


def pair_of(shape: str, said: list[str]) -> Pair:
    *asked, chosen, rejected = said
    prompt = [{"role": ROLES[letter], "content": text} for letter, text in zip(shape, asked, strict=True)]
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def render(renderer: ChatRenderer, pair: Pair) -> Any:
    """Return the text and what was counted, or why there is none."""
    renderer.reset(use_cache=renderer._use_cache)
    try:
        return renderer.render(pair), dict(renderer.counts)
    except Unusable as error:
        return error.reason, error.detail


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_usual_conversations_have_skeletons(name):
    found = renderer(name, use_cache=True)
    assert found.cache is not None
    missing = []
    for shape in SHAPES:
        *asked, chosen, rejected = list("abcdefgh")[: len(shape) + 2]
        prompt = found._prompt_turns(pair_of(shape, [*asked, chosen, rejected]))
        text = found.cache.render(prompt, [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)])
        missing += [] if text else [shape]
    expected, _ = MISSING.get(name.removesuffix("_training"), ("", ""))
    assert missing == expected.split()


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
@settings(max_examples=12)
def test_a_skeleton_gives_what_the_template_gives(name, data):
    shape = data.draw(st.sampled_from(SHAPES))
    pair = pair_of(shape, data.draw(st.lists(texts, min_size=len(shape) + 2, max_size=len(shape) + 2)))
    assert render(renderer(name, use_cache=True), pair) == render(renderer(name, use_cache=False), pair)
