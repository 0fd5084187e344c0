"""From an example to the text that the model sees.

With a chat template, the prompt is what the model sees when it is asked: its turns and the generation prompt. An answer
is the rest of the rendered whole. Where the template would change an answer's text (some drop what is between thinking
tags), the answer is put in its place as it is. Where the template has no place for a system message, its text goes
before the first user turn, as Gemma's own users are told to do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from pipeline.preparing import frames
from pipeline.preparing.chat_template import ChatTemplate
from pipeline.preparing.encoder import Text
from pipeline.preparing.example import Example, Label, Message, Turns, Unusable
from pipeline.preparing.frames import Frame, Opaque, Slot

_CHECKED_ALWAYS, _CHECKED_EVERY = 4, 64
_MOST_SHAPES, _LONGEST_SHAPE = 512, 64
_KEYS = ["role", "content"]


class FrameMismatch(Exception):
    """A frame gave another text than the template: it must not be used."""


class Templater:
    """`counts` says how often something had to be done: merged_system, restored."""

    def __init__(self, template: ChatTemplate | None) -> None:
        """Without a template, text is taken as it is."""
        self.template = template
        self.use_frames = template is not None
        self.counts: Counter[str] = Counter()
        self._frames: dict[tuple[str, ...], tuple[Frame, Frame] | None] = {}
        self._uses: Counter[tuple[str, ...]] = Counter()
        with ChatTemplate.limits():
            self._merges_system = template is not None and not _prints_system(template)

    def start_over(self) -> None:
        """Forget what was counted. What a frame is checked on then depends on the records alone, not on those before."""
        self.counts.clear()
        self._uses.clear()

    def render(self, example: Example) -> Text:
        if self.template is None or example.rendered:
            texts = tuple(_as_text(answer) for answer in example.answers)
            return Text(_as_text(example.prompt), texts, plain=True, closed=example.rendered)
        self._check_tools(example)
        prompt = self.prompt_turns(example)
        turns = [_as_messages(answer, "assistant") for answer in example.answers]
        if self.use_frames and not example.tools and not example.template_kwargs:
            framed = self._render_framed(prompt, turns)
            if framed:
                return framed
        return self._render_one(prompt, turns, example)

    def _check_tools(self, example: Example) -> None:
        """A call that the template does not print would be an empty turn; tools that it does not print are counted."""
        assert self.template is not None
        if example.tools and not self.template.knows_tools:
            self.counts["unseen_tools"] += 1
        if not self.template.knows_tool_calls:
            turns = chain.from_iterable(
                each for each in (example.prompt, *example.answers) if not isinstance(each, str)
            )
            if any(turn.get("tool_calls") for turn in turns):
                raise Unusable("template prints no tool calls")

    def prompt_turns(self, example: Example) -> list[Message]:
        """The prompt's turns as the template gets them."""
        prompt = _as_messages(example.prompt, "user")
        if prompt[-1]["role"] == "assistant":
            raise Unusable("prompt ends with an assistant turn")
        if self._merges_system and prompt[0]["role"] == "system":
            self.counts["merged_system"] += 1
            prompt = _merge_system(prompt)
        return prompt

    # -- by the template itself --------------------------------------------------------------------------------------

    def _render_one(self, prompt: list[Message], answers: list[list[Message]], example: Example) -> Text:
        asked = self._apply(prompt, example, add_generation_prompt=True)
        return Text(asked, tuple(self._answer(prompt, asked, answer, example) for answer in answers))

    def _apply(self, messages: list[Message], example: Example, *, add_generation_prompt: bool) -> str:
        assert self.template is not None
        return self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=example.tools,
            kwargs=example.template_kwargs,
        )

    def _answer(self, prompt: list[Message], asked: str, answer: list[Message], example: Example) -> str:
        if answer[0]["role"] != "assistant":
            raise Unusable("answer is no assistant turn", f"its role is {answer[0]['role']!r}")
        whole = self._apply([*prompt, *answer], example, add_generation_prompt=False)
        if whole.startswith(asked) and _keeps(whole, len(asked), answer):
            return whole[len(asked) :]
        if len(answer) == 1 and answer[0].get("content") and not answer[0].get("tool_calls"):
            return self._restored(prompt, asked, answer[0], example)
        what = "several turns" if len(answer) > 1 else "tool calls"
        raise Unusable("template rewrites the answer", f"and it has {what}, so that it cannot be put back")

    def _restored(self, prompt: list[Message], asked: str, answer: Message, example: Example) -> str:
        """The answer as it is, where the template puts an answer that it does not change."""
        place = self._place(prompt, answer, example, Opaque((Slot(0, "whole"),), []))
        # A template that takes any answer apart, thoughts or none, takes this one apart too and leaves it whole.
        place = place or self._place(prompt, answer, example, frames.MARK)
        if place is None:
            raise Unusable("template rewrites the answer", "and shows no place for it")
        before, slot, after = place
        text = slot.of([answer["content"]])
        self.counts["restored"] += 1
        if before.startswith(asked):
            return before[len(asked) :] + text + after
        begun = asked.removeprefix(before)
        if asked.startswith(before):  # the generation prompt has begun the answer, with an opening tag perhaps
            return text.removeprefix(begun) + after
        raise Unusable("template rewrites the prompt", "with an answer added, it no longer begins as it did when asked")

    def _place(
        self, prompt: list[Message], answer: Message, example: Example, content: str
    ) -> tuple[str, Slot, str] | None:
        try:
            return frames.find(
                self._apply([*prompt, answer | {"content": content}], example, add_generation_prompt=False)
            )
        except Unusable:
            return None  # refused, or looked into

    # -- by frames ---------------------------------------------------------------------------------------------------

    def _render_framed(self, prompt: list[Message], answers: list[list[Message]]) -> Text | None:
        # In this order, as the frame was made: a template may go through a message's keys.
        if any(list(turn) != _KEYS for turn in chain(prompt, *answers)) or any(len(a) != 1 for a in answers):
            return None
        shape = (*[turn["role"] for turn in prompt], answers[0][0]["role"])
        if any(answer[0]["role"] != "assistant" for answer in answers):
            return None
        if shape not in self._frames:
            worth = len(shape) <= _LONGEST_SHAPE and len(self._frames) < _MOST_SHAPES
            self._frames[shape] = self._trace(shape) if worth else None
        known = self._frames[shape]
        if known is None:
            return None
        asked, rest = known
        texts = [turn["content"] for turn in prompt]
        wholes = [[*texts, answer[0]["content"]] for answer in answers]
        if rest.guards and not all(rest.holds(whole) for whole in wholes):
            return None
        text = Text(asked.fill(texts), tuple([rest.fill(whole) for whole in wholes]))
        self._uses[shape] += 1
        n = self._uses[shape]
        if n <= _CHECKED_ALWAYS or n % _CHECKED_EVERY == 0:
            self._check(prompt, answers, text)
        return text

    def _trace(self, shape: Sequence[str]) -> tuple[Frame, Frame] | None:
        """Frames of the prompt, and of an answer after it with the questions that the template asks of either."""
        assert self.template is not None
        template = self.template
        literals = template.literals
        asked = frames.trace(lambda turns: template.render(turns, add_generation_prompt=True), shape[:-1], literals)
        whole = frames.trace(lambda turns: template.render(turns, add_generation_prompt=False), shape, literals)
        rest = frames.after(whole, asked) if whole and asked else None
        if whole is None or asked is None or rest is None:
            return None
        # The answer stands once in what is left, and nothing else does.
        if [piece.which for piece in rest if isinstance(piece, Slot)] != [len(shape) - 1]:
            return None
        return asked, Frame(rest, tuple(dict.fromkeys((*asked.guards, *whole.guards))))

    def _check(self, prompt: list[Message], answers: list[list[Message]], text: Text) -> None:
        plain = Label(prompt="", completion="", label=True)
        before = self.counts.copy()
        try:
            same = self._render_one(prompt, answers, plain) == text
        except Unusable:
            same = False
        self.counts = before
        if not same:
            raise FrameMismatch(", ".join(turn["role"] for turn in prompt))


def _as_messages(turns: Turns, role: str) -> list[Message]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _as_text(turns: Turns) -> str:
    if not isinstance(turns, str):
        raise Unusable("messages where plain text is asked for", "set prepare.template: chat")
    return turns


def _keeps(whole: str, begins: int, answer: list[Message]) -> bool:
    """Whether every turn of the answer is there, its spaces aside, at or a little before where the answer begins."""
    for turn in answer:
        content = turn.get("content") or ""
        if content.strip() not in whole[begins:]:
            bare = "".join(content.split())
            if bare not in "".join(whole[max(0, begins - len(content)) :].split()):
                return False
    return True


def _merge_system(prompt: list[Message]) -> list[Message]:
    system, *rest = prompt
    if not rest or rest[0]["role"] != "user":
        raise Unusable(
            "template refuses", "it has no place for a system message, and no user turn follows to put it into"
        )
    first = rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}
    return [first, *rest[1:]]


def _prints_system(template: ChatTemplate) -> bool:
    """Whether a system message reaches the text. Where even a user turn alone is refused, the records shall say so."""
    system, user = {"role": "system", "content": "Syst\u00e9mique"}, {"role": "user", "content": "x"}
    try:
        template.render([user], add_generation_prompt=True)
    except Unusable:
        return True
    try:
        return system["content"] in template.render([system, user], add_generation_prompt=True)
    except Unusable:
        return False


def shorter_prompts(example: Example) -> list[Example]:
    """The example without its oldest turns, one exchange less each time; a system message stays."""
    if isinstance(example.prompt, str):
        return []
    n_system = 1 if example.prompt[0]["role"] in ("system", "developer") else 0
    head, turns = example.prompt[:n_system], example.prompt[n_system:]
    begins = [n for n, turn in enumerate(turns) if n and turn["role"] == "user"]
    return [replace(example, prompt=[*head, *turns[n:]]) for n in begins]
