"""From an example to the text that the model sees.

With a chat template, the prompt is what the model sees when it is asked: its turns and the generation prompt. An answer
is the rest of the rendered whole. If the template would change an answer's text (some drop what is between thinking
tags), the original answer is put in its place. If the template has no place for a system message, its text goes before
the first user turn, as Gemma's documentation recommends.

Which parts of an answer count is said by the template's `{% generation %}` blocks, or found by turn_borders.py.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from prefcache.pipeline.config import TrainOn
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import ExampleText, Span
from prefcache.pipeline.preparing.example import Example, Label, Message, Turns, Unusable, count_images
from prefcache.pipeline.preparing.generation_marks import clip_start, has_marks, split_marks
from prefcache.pipeline.preparing.placeholder_text import MARK, OpaqueText, Slot, split_at_slot
from prefcache.pipeline.preparing.template_cache import TemplateCache
from prefcache.pipeline.preparing.turn_borders import Conversation, TurnBorders

_NO_TOOLS = Label(prompt="", completion="", label=True)
# Where messages keep an assistant's thoughts, if not in their text.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class ChatRenderer:
    """`counts` says how often something was changed or missed: merged_system, restored, dropped_thoughts, unseen_tools, unseen_thoughts."""

    def __init__(
        self, template: ChatTemplate | None, train_on: TrainOn = "all", end_tokens: Iterable[str] = ()
    ) -> None:
        """Without a template, text is taken as it is. `end_tokens` may end a turn."""
        self.template, self._train_on = template, train_on
        self._borders = TurnBorders(end_tokens)
        self.counts: Counter[str] = Counter()
        self.cache = TemplateCache(template, self._render_uncached) if template else None
        self._use_cache = True
        with ChatTemplate.limits():
            self._merges_system = template is not None and not _prints_system(template)
            self._writes_arguments = template is not None and template.knows_tool_calls and _joins_arguments(template)
        self._unseen_thoughts = [key for key in _THOUGHTS if template and not re.search(rf"\b{key}\b", template.text)]

    def reset(self, *, use_cache: bool) -> None:
        """Start a part: count from 0, so that its counts and checks depend on its own records alone."""
        self.counts.clear()
        self._use_cache = use_cache
        if self.cache:
            self.cache.reset()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep the counts as they are, for an example that was rendered before."""
        counts = self.counts.copy()
        try:
            yield
        finally:
            self.counts = counts

    def render(self, example: Example) -> ExampleText:
        if example.images and (self.template is None or example.rendered):
            raise Unusable("image in plain text", "only a chat template has a place for images")
        if self.template is None or example.rendered:
            answers = tuple(_as_text(answer) for answer in example.answers)
            return ExampleText(_as_text(example.prompt), answers, plain=True, closed=example.rendered)
        self._check_tools(self.template, example)
        prompt = self._prompt_turns(example)
        turns = [_as_messages(answer, "assistant") for answer in example.answers]
        if self.template.marks_generation(example.tools):
            _refuse_marks(chain(prompt, *turns))
        has_own = example.tools or example.template_kwargs or example.images
        if self.cache and self._use_cache and not has_own:
            text = self.cache.render(prompt, turns)
            if text is not None:
                return text
        return self._render(prompt, turns, example)

    def render_prompt(self, example: Example) -> ExampleText:
        """Render the prompt alone, exactly as `render` does."""
        if self.template is None:
            return ExampleText(_as_text(example.prompt), (), plain=True)
        self._check_tools(self.template, example)
        prompt = self._prompt_turns(example)
        if self.template.marks_generation(example.tools):
            _refuse_marks(prompt)
        return ExampleText(self._split(self._apply(prompt, example, add_generation_prompt=True), example)[0], ())

    def messages(self, example: Example) -> tuple[list[Message], list[list[Message]]]:
        """Return the prompt and the answers as the template gets them."""
        with self.uncounted():
            prompt = self._prompt_turns(example)
        turns = [prompt, *(_as_messages(answer, "assistant") for answer in example.answers)]
        if self._writes_arguments:
            turns = [list(map(_write_arguments, each)) for each in turns]
        return turns[0], turns[1:]

    def _check_tools(self, template: ChatTemplate, example: Example) -> None:
        """Refuse a call that the template does not print: it would be an empty turn. Count tools and thoughts that it skips."""
        if example.tools and not template.knows_tools:
            self.counts["unseen_tools"] += 1
        if not _has_further_keys(example):
            return
        if not template.knows_tool_calls:
            conversations = (turns for turns in (example.prompt, *example.answers) if not isinstance(turns, str))
            if any(turn.get("tool_calls") for turn in chain.from_iterable(conversations)):
                raise Unusable("template prints no tool calls")
        turns = chain.from_iterable(answer for answer in example.answers if not isinstance(answer, str))
        if self._unseen_thoughts and any(turn.get(key) for turn in turns for key in self._unseen_thoughts):
            self.counts["unseen_thoughts"] += 1

    def _prompt_turns(self, example: Example) -> list[Message]:
        """Return the prompt's turns as the template gets them."""
        prompt = _as_messages(example.prompt, "user")
        if prompt[-1]["role"] == "assistant":
            raise Unusable("prompt ends with an assistant turn")
        if self._merges_system and prompt[0]["role"] == "system":
            self.counts["merged_system"] += 1
            system, *rest = prompt
            if not rest or rest[0]["role"] != "user":
                raise Unusable(
                    "template refuses", "it has no place for a system message, and no user turn follows to put it into"
                )
            return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
        return prompt

    # -- by the template itself --------------------------------------------------------------------------------------

    def _render_uncached(self, prompt: list[Message], answers: list[list[Message]]) -> ExampleText:
        with self.uncounted():
            return self._render(prompt, answers, _NO_TOOLS)

    def _render(self, prompt: list[Message], answers: list[list[Message]], example: Example) -> ExampleText:
        asked, _ = self._split(self._apply(prompt, example, add_generation_prompt=True), example)
        rendered = [self._render_answer(prompt, asked, answer, example) for answer in answers]
        texts, counted = zip(*rendered, strict=True)
        return ExampleText(asked, texts, counted=() if all(spans is None for spans in counted) else counted)

    def _apply(self, messages: list[Message], example: Example, *, add_generation_prompt: bool = False) -> str:
        assert self.template is not None
        turns = list(map(_write_arguments, messages)) if self._writes_arguments else messages
        return self.template.render(
            turns,
            add_generation_prompt=add_generation_prompt,
            tools=example.tools,
            kwargs=example.template_kwargs,
        )

    def _split(self, text: str, example: Example) -> tuple[str, list[Span]]:
        """Return what the template wrote without marks, and what it marked."""
        assert self.template is not None
        return split_marks(text) if self.template.marks_generation(example.tools) else (text, [])

    def _render_answer(
        self, prompt: list[Message], asked: str, answer: list[Message], example: Example
    ) -> tuple[str, list[Span] | None]:
        """Return an answer's text, and what of it counts; None for all of it."""
        if answer[0]["role"] != "assistant":
            raise Unusable("answer is no assistant turn", f"its role is {answer[0]['role']!r}")
        whole, marked = self._split(self._apply([*prompt, *answer], example), example)
        if whole.startswith(asked) and self._contains_answer(whole, len(asked), answer):
            counted = self._find_counted(prompt, answer, whole, marked, example)
            return whole[len(asked) :], None if counted is None else clip_start(counted, len(asked))
        if len(answer) == 1 and answer[0].get("content") and not answer[0].get("tool_calls"):
            return self._restore_answer(prompt, asked, answer[0], example)
        what = "several turns" if len(answer) > 1 else "tool calls"
        raise Unusable("template rewrites the answer", f"and it has {what}, so that it cannot be put back")

    def _contains_answer(self, whole: str, begin: int, answer: list[Message]) -> bool:
        """Return whether every turn of the answer is there. Turns before the last may have lost their reasoning."""
        assert self.template is not None
        lost_thoughts = False
        for n, turn in enumerate(answer):
            texts = [turn.get("content") or ""]
            if n < len(answer) - 1 and turn["role"] == "assistant":
                # What follows a text that the template looks for, such as a closing tag.
                kept = [texts[0].rpartition(tag)[2] for tag in self.template.literals if tag in texts[0]]
                # A turn that says nothing else may keep its calls alone.
                texts += [text for text in kept if text.strip() or turn.get("tool_calls")]
            elif turn["role"] != "assistant":
                texts.append(json.dumps(texts[0], ensure_ascii=False)[1:-1])
            is_there = [_contains(whole, begin, text) for text in texts]
            if not any(is_there):
                return False
            lost_thoughts |= turn["role"] == "assistant" and not is_there[0]
        if lost_thoughts:
            self.counts["dropped_thoughts"] += 1
        return True

    def _find_counted(
        self, prompt: list[Message], answer: list[Message], whole: str, marked: list[Span], example: Example
    ) -> list[Span] | None:
        """Return begin and end, in the whole conversation, of what counts of the answer; None for all of it."""
        assert self.template is not None
        if self._train_on == "all":
            return None
        if self.template.marks_generation(example.tools):
            if self._train_on == "assistant" or len(answer) == 1:
                return marked
            last = max(n for n, turn in enumerate(answer) if turn["role"] == "assistant")
            _, earlier = self._split(self._apply([*prompt, *answer[:last]], example), example)
            return marked[len(earlier) :]
        if len(answer) == 1:
            return None

        def render(messages: list[Message], asks: bool) -> str:
            return self._apply(messages, example, add_generation_prompt=asks)

        turns = self._borders.find_counted(Conversation(prompt, answer, whole, render))
        return turns[-1:] if self._train_on == "last_turn" else turns

    def _restore_answer(
        self, prompt: list[Message], asked: str, answer: Message, example: Example
    ) -> tuple[str, list[Span] | None]:
        """Put the original answer where the template puts an answer that it does not change."""
        # A template that takes any answer apart, with thoughts or without, refuses the first content; the second one, a
        # plain text without thoughts, it takes apart too and leaves whole.
        for content in (OpaqueText((Slot(0),), []), MARK):
            try:
                place = split_at_slot(self._apply([*prompt, answer | {"content": content}], example))
            except Unusable:
                place = None  # refused, or looked into
            if place is not None:
                break
        else:
            raise Unusable("template rewrites the answer", "and shows no place for it")
        before, slot, after = place
        whole, marked = self._split(before + slot.fill([answer["content"]]) + after, example)
        before, _ = self._split(before, example)
        self.counts["restored"] += 1
        # The generation prompt may have begun the answer, with an opening tag that the answer has too or has not.
        if before.startswith(asked) or asked.startswith(before):
            begin = len(asked) if whole.startswith(asked) else len(before)
            counted = self._find_counted(prompt, [answer], whole, marked, example)
            return whole[begin:], None if counted is None else clip_start(counted, begin)
        if before.split() == asked.split():
            # LLaVA-OneVision's template writes a space that its generation prompt lacks. The model answers what it is asked.
            begin = len(before)
            counted = self._find_counted(prompt, [answer], whole, marked, example)
            return whole[begin:], None if counted is None else clip_start(counted, begin)
        raise Unusable("template rewrites the prompt", "with an answer added, it no longer begins as it did when asked")


def _has_further_keys(example: Example) -> bool:
    """Return whether a message holds more than a role and a text."""
    for turns in (example.prompt, *example.answers):
        if not isinstance(turns, str):
            for turn in turns:
                if len(turn) != 2 or "content" not in turn:
                    return True
    return False


def _as_messages(turns: Turns, role: str) -> list[Message]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _as_text(turns: Turns) -> str:
    if not isinstance(turns, str):
        raise Unusable("messages where plain text is asked for", "set prepare.template: chat")
    return turns


def _contains(whole: str, begin: int, content: str) -> bool:
    """Return whether a text is there, spaces aside, at or a little before `begin`."""
    if content.strip() in whole[begin:]:
        return True
    bare = "".join(content.split())
    return bare in "".join(whole[max(0, begin - len(content)) :].split())


def _refuse_marks(turns: Iterable[Message]) -> None:
    for turn in turns:
        if has_marks(turn.get("content") or ""):
            raise Unusable("reserved characters", "U+FDD0 or U+FDD1, which mark what the template generates")


def _prints_system(template: ChatTemplate) -> bool:
    """Return whether a system message reaches the text; True if even a user turn is refused, which each record reports."""
    system, user = {"role": "system", "content": "Syst\u00e9mique"}, {"role": "user", "content": "x"}
    try:
        template.render([user], add_generation_prompt=True)
    except Unusable:
        return True
    try:
        return system["content"] in template.render([system, user], add_generation_prompt=True)
    except Unusable:
        return False


def _joins_arguments(template: ChatTemplate) -> bool:
    """Return whether the template takes a call's arguments as text alone, which it joins to what it writes around them."""

    def accepts(arguments: Any) -> bool:
        call = {"id": "call00001", "type": "function", "function": {"name": "x", "arguments": arguments}}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            template.render([{"role": "user", "content": "x"}, calling], add_generation_prompt=False)
        except Unusable:
            return False
        return True

    return not accepts({"x": 1}) and accepts('{"x": 1}')


def _write_arguments(message: Message) -> Message:
    """Return a message whose calls have their arguments as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    written = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = call | {"function": function | {"arguments": text}}
        written.append(call)
    return message | {"tool_calls": written}


def split_system(prompt: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split a prompt into its system message, if it has one, and the other turns."""
    n = 1 if prompt[0]["role"] in ("system", "developer") else 0
    return prompt[:n], prompt[n:]


def shorter_prompts(example: Example) -> list[Example]:
    """Return the example without its oldest turns and their pictures, one exchange less each time; a system message stays."""
    if isinstance(example.prompt, str):
        return []
    head, turns = split_system(example.prompt)
    begins = [n for n, turn in enumerate(turns) if n and turn["role"] == "user"]
    n_head = count_images(head)
    shorter = []
    for n in begins:
        images = (*example.images[:n_head], *example.images[n_head + count_images(turns[:n]) :])
        shorter.append(replace(example, prompt=[*head, *turns[n:]], images=images))
    return shorter
