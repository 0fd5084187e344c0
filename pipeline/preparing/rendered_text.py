"""Text that is rendered already: it holds what the chat template writes between turns, and would be rendered twice.

What the template writes there is found by rendering a conversation of marks, and which of it are the tokenizer's own
tokens. Only the borders of turns count: what ends one and begins the next, what begins the text, and what ends an answer.
A token that somebody quotes in a sentence does not count.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.example import Turns, Unusable
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts

_USER, _ANSWER, _NEXT = "\ue000user\ue001", "\ue000answer\ue001", "\ue000next\ue001"
_AROUND = 24  # characters shown before and after what was found


class Border(NamedTuple):
    """What the template writes between two turns, from its first token of the tokenizer's on."""

    before: str  # spaces, if any stand before that token
    token: str
    rest: str  # what follows it, without spaces around
    is_header: bool  # the rest begins with a token, which opens the next turn


class RenderedText:
    """Finds borders of turns in the texts of an example."""

    def __init__(self, template: ChatTemplate, tokenizer: TokenizerFacts) -> None:
        tokens = sorted(filter(None, tokenizer.added_tokens), key=len, reverse=True)
        find_token = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._within: list[re.Pattern[str]] = []
        self._openings: list[tuple[str, str]] = []  # how a text begins, and what else has to be in it
        self._ends: list[tuple[str, bool]] = []  # how an answer ends, and whether it does so after a letter
        self._tokens: set[str] = set()
        self._begin = tokenizer.special.get("bos_token") or ""
        with ChatTemplate.limits():
            gaps = _gaps(template)
        if gaps is None or find_token is None:
            return
        to_answer, to_next, to_last = (_border(gap, find_token) for gap in gaps)
        for border in filter(None, (to_answer, to_next, to_last)):
            self._tokens.add(border.token)
            if border.rest:
                self._within.append(re.compile(re.escape(border.token) + r"\s*" + re.escape(border.rest)))
        if to_next and to_next.is_header:
            # A token alone may be quoted at the beginning; a text that is rendered goes on to the answer's token.
            needed = to_answer.token if to_answer and find_token.fullmatch(to_next.rest) else ""
            self._openings.append((to_next.rest, needed))
            self._tokens.update(find_token.findall(to_next.rest))
        if to_next:
            self._ends.append((to_next.before + to_next.token, not to_next.before))
        if end := tokenizer.special.get("eos_token"):
            self._ends.append((end, True))
            self._tokens.add(end)

    def check(self, prompt: Turns, answers: Iterable[Turns]) -> None:
        """Raise Unusable for an example that is rendered already."""
        if not self._tokens:
            return
        texts = list(_texts(prompt, answers))
        together = "\0".join([text for _, text, _ in texts])
        # Nearly every example ends here.
        if not any(map(together.__contains__, self._tokens)):
            return
        for name, text, is_answer in texts:
            if found := self._find(text, is_answer):
                raise Unusable("already rendered", f"{name} has {found!r}")

    def _find(self, text: str, is_answer: bool) -> str | None:
        """Return the border that a text has, with a little of what stands around it."""
        for pattern in self._within:
            if match := pattern.search(text):
                return text[max(0, match.start() - _AROUND) : match.end() + _AROUND]
        bare = text.strip()
        begun = bare.removeprefix(self._begin).lstrip()
        for header, needed in self._openings:
            for begin in (bare, begun):
                if begin.startswith(header) and needed in begin[len(header) :]:
                    return begin[: len(header) + _AROUND]
        for end, is_close in self._ends if is_answer else ():
            answer = bare.removesuffix(end)
            if len(answer) < len(bare) and answer.strip() and not (is_close and answer[-1].isspace()):
                return bare[-len(end) - _AROUND :]
        return None


def _texts(prompt: Turns, answers: Iterable[Turns]) -> Iterator[tuple[str, str, bool]]:
    """Return every text, where it stands, and whether the assistant says it."""
    for name, turns, is_answer in (("the prompt", prompt, False), *(("an answer", turns, True) for turns in answers)):
        if isinstance(turns, str):
            yield name, turns, is_answer
            continue
        for turn in turns:
            content = turn.get("content")
            if isinstance(content, str) and turn["role"] != "tool":
                yield name, content, turn["role"] == "assistant"


def _gaps(template: ChatTemplate) -> Sequence[str] | None:
    """Return what the template writes after a question, after an answer, and after the next question."""
    says = ((_USER, "user"), (_ANSWER, "assistant"), (_NEXT, "user"))
    try:
        text = template.render([{"role": role, "content": mark} for mark, role in says], add_generation_prompt=True)
    except Unusable:
        return None
    pieces = re.split("|".join((_USER, _ANSWER, _NEXT)), text)
    return pieces[1:] if len(pieces) == len(says) + 1 else None


def _border(gap: str, find_token: re.Pattern[str]) -> Border | None:
    first = find_token.search(gap)
    if first is None or gap[: first.start()].strip():
        return None
    rest = gap[first.end() :].strip()
    return Border(gap[: first.start()], first.group(), rest, find_token.match(rest) is not None)
