"""Which characters of an answer with several turns the model wrote, in the text that a chat template makes of it.

Between two assistant turns stands a gap: headers, user turns, tool results, and the header that also ends a generation prompt.
What a template writes at the edges of a gap is learned once for each kind of gap, from small conversations with sentinels for
texts. In the answer, where sentinels show the position of each text, the gap must have exactly these edges; else the answer is
refused, as nothing tells what counts.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from prefcache.pipeline.preparing.encoder import Span
from prefcache.pipeline.preparing.example import Message, Unusable
from prefcache.pipeline.spans import count_common

Render = Callable[[list[Message], bool], str]  # messages, whether to add the generation prompt
# Letters and digits only, which no template strips or escapes.
_PREFIX, _SUFFIX = "prefcache0", "0sentinel"
_REMEDY = "prepare.train_on: all counts every token after the prompt"


class Edges(NamedTuple):
    """What stands in a gap before its first text and after its last one. A gap between assistant turns may have no text."""

    opening: str  # the next turn's header, after the assistant's end token; without a text, that end
    closing: str  # the turn's end and the assistant's header
    lead: str  # what the template writes before the assistant's text, as a part of its turn


class Place(NamedTuple):
    """Where a text stands. Spaces around it may have been kept or stripped."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]


class Conversation(NamedTuple):
    prompt: list[Message]
    answer: list[Message]
    whole: str  # as the template writes it
    render: Render


class TurnBorders:
    """Finds what counts; remembers the edges of each kind of gap of one template."""

    def __init__(self, end_tokens: Iterable[str]) -> None:
        """`end_tokens`: tokens that may end a turn. Some templates end the last turn with another one than those before."""
        self._end_tokens = tuple(end_tokens)
        self._edges: dict[tuple[Any, ...], Edges] = {}

    def find_counted(self, conversation: Conversation) -> list[Span]:
        """Return begin and end, in the whole, of what each assistant turn of the answer wrote; the first begins at 0."""
        answer, whole = conversation.answer, conversation.whole
        written = [n for n, turn in enumerate(answer) if turn["role"] == "assistant"]
        gaps = list(pairwise([*written, len(answer)] if written[-1] < len(answer) - 1 else written))
        places = _find_places(conversation, sorted({n for gap in gaps for n in _texts_of_gap(*gap)}))
        turns, start = [], 0
        for before, after in gaps:
            begin, end = self._find_gap(conversation, before, after, places)
            turns.append((start, begin))
            start = end
        if written[-1] == len(answer) - 1:
            turns.append((start, len(whole)))
        if any(begin > end for begin, end in turns):
            raise _uncertain("the turns are not in their order")
        return turns

    def _find_gap(self, conversation: Conversation, before: int, after: int, places: dict[int, Place]) -> Span:
        """Return begin and end of the gap between two assistant turns, or after the last one."""
        prompt, answer, whole, render = conversation
        gap = answer[before + 1 : after]
        kind = (_last_call(answer[before]), *[(turn["role"], turn.get("name")) for turn in gap])
        if kind not in self._edges:
            self._edges[kind] = self._learn(prompt, answer[before], gap, render)
        opening, closing, lead = self._edges[kind]
        if not gap:
            for text, more in product(places[after].begins, (lead, "")):
                if whole.endswith(opening + closing + more, 0, text):
                    return text - len(more) - len(closing), text - len(more)
            raise _uncertain("two assistant turns in a row are not written one after the other")
        begins = [n - len(opening) for n in places[before + 1].begins if whole.endswith(opening, 0, n)]
        ends = [n + len(closing) for n in places[after - 1].ends if whole.startswith(closing, n)]
        if after == len(answer):
            ends = [len(whole)]
        if not begins or not ends:
            roles = ", ".join(turn["role"] for turn in gap)
            raise _uncertain(f"the template writes something else around these turns than it does elsewhere: {roles}")
        return begins[0], ends[0]

    # -- what a template writes ----------------------------------------------------------------------------------------

    def _learn(self, prompt: list[Message], before: Message, gap: list[Message], render: Render) -> Edges:
        """Learn the edges of such a gap, from conversations whose texts are sentinels."""
        written, first, last, after = (_sentinel(name) for name in ("written", "first", "last", "after"))
        spoken = [*prompt, _write(before, written)]
        end = _cut_between(render(spoken, False), written)
        if len(gap) > 1:
            spoken += [gap[0] | {"content": first}, *gap[1:-1], gap[-1] | {"content": last}]
        elif gap:
            first = last
            spoken.append(gap[0] | {"content": last})
        else:
            last = written
        asked = _cut_between(render(spoken, True), last)
        answered = _cut_between(render([*spoken, {"role": "assistant", "content": after}], False), last, after)
        if not answered.startswith(asked):
            # A generation prompt may also begin the answer, with an opening tag perhaps.
            if not asked.startswith(answered):
                raise _uncertain("the generation prompt is not how an assistant turn begins")
            asked = answered
        lead = answered[len(asked) :]
        if not gap:
            return Edges(*self._split_end(asked, end), lead)
        _, opening = self._split_end(_cut_between(render(spoken, False), written, first), end)
        return Edges(opening, asked, lead)

    def _split_end(self, text: str, end: str) -> tuple[str, str]:
        """Split what follows an assistant's text into the end of its turn and the header of the next.

        `end` is what follows the last turn of a conversation.
        """
        if text.startswith(end):
            return end, text[len(end) :]
        # Another token may end the last turn than those before.
        for n in range(count_common(text, end), -1, -1):
            ours, last = (
                max((token for token in self._end_tokens if each.startswith(token, n)), key=len, default="")
                for each in (text, end)
            )
            if ours and last:
                return text[: n + len(ours)], text[n + len(ours) :]
        raise _uncertain("the template shows no end of an assistant turn")


def _texts_of_gap(before: int, after: int) -> tuple[int, ...]:
    """Return the turns whose texts show where a gap is: its first and its last, or the assistant turn right after."""
    return (before + 1, after - 1) if after > before + 1 else (after,)


def _last_call(turn: Message) -> Any:
    """Return the function that a turn calls last: a template may repeat its name before the result."""
    calls = turn.get("tool_calls") or []
    return (calls[-1].get("function") or calls[-1]).get("name") if calls else None


def _write(turn: Message, text: str) -> Message:
    """Return an assistant turn that ends with this text: in the arguments of its last call, or as its content."""
    if not turn.get("tool_calls"):
        return {"role": "assistant", "content": text}
    *calls, last = turn["tool_calls"]
    inner = last.get("function")
    call = dict(inner or last)
    call["arguments"] = json.dumps({"x": text}) if isinstance(call.get("arguments"), str) else {"x": text}
    return turn | {"tool_calls": [*calls, last | {"function": call} if inner else call]}


def _sentinel(name: str) -> str:
    return f"{_PREFIX}{name}{_SUFFIX}"


def _cut_between(text: str, begin: str, end: str = "") -> str:
    """Return what stands between two sentinels, or after one."""
    if any(text.count(sentinel) != 1 for sentinel in (begin, end) if sentinel):
        raise _uncertain("the template does not write each text once")
    after = text.partition(begin)[2]
    return after.partition(end)[0] if end else after


# -- where the texts stand ---------------------------------------------------------------------------------------------


def _find_places(conversation: Conversation, turns: Sequence[int]) -> dict[int, Place]:
    """Find the texts of some turns in the whole, by rendering the conversation again with sentinels in them.

    They stand around a text, or around what is left of it without spaces, which templates may strip; or in the middle, if the
    template looks at the ends of a text.
    """
    prompt, answer, whole, render = conversation
    texts = {n: content if isinstance(content := answer[n].get("content"), str) else "" for n in turns}
    for find_cuts in (_cut_around, _cut_inside_spaces, _cut_middle):
        cuts, marked = {n: find_cuts(text) for n, text in texts.items()}, list(answer)
        for n, text in texts.items():
            pieces = [text[a:b] for a, b in pairwise([0, *cuts[n], len(text)])]
            marked[n] = answer[n] | {"content": _sentinel(str(n)).join(pieces)}
        plain, positions = _remove_sentinels(render([*prompt, *marked], False), turns)
        if plain == whole and all(len(positions[n]) == len(cuts[n]) for n in turns):
            return {n: _find_place(texts[n], cuts[n], positions[n], whole) for n in turns}
    raise _uncertain("the template does not write the texts as they are")


def _cut_around(text: str) -> tuple[int, ...]:
    return 0, len(text)


def _cut_inside_spaces(text: str) -> tuple[int, ...]:
    begin = len(text) - len(text.lstrip())
    return begin, max(begin, len(text.rstrip()))


def _cut_middle(text: str) -> tuple[int, ...]:
    return (sum(_cut_inside_spaces(text)) // 2,)


def _remove_sentinels(text: str, turns: Sequence[int]) -> tuple[str, dict[int, list[int]]]:
    """Return the text without sentinels, and where in it those of each turn stood."""
    positions: dict[int, list[int]] = {n: [] for n in turns}
    pieces = re.split("|".join(f"({_sentinel(str(n))})" for n in turns), text)
    plain, step = pieces[0], len(turns) + 1
    for at in range(1, len(pieces), step):
        (n,) = (n for n, found in zip(turns, pieces[at : at + step - 1], strict=True) if found)
        positions[n].append(len(plain))
        plain += pieces[at + step - 1]
    return plain, positions


def _find_place(text: str, cuts: Sequence[int], positions: Sequence[int], whole: str) -> Place:
    first, last = _cut_inside_spaces(text)
    before = [text[a : cuts[0]] for a in dict.fromkeys((0, first)) if a <= cuts[0]]
    after = [text[cuts[-1] : b] for b in dict.fromkeys((len(text), last)) if b >= cuts[-1]]
    return Place(
        tuple(positions[0] - len(piece) for piece in before if whole.endswith(piece, 0, positions[0])),
        tuple(positions[-1] + len(piece) for piece in after if whole.startswith(piece, positions[-1])),
    )


def _uncertain(detail: str) -> Unusable:
    return Unusable("turns cannot be told apart", f"{detail}; {_REMEDY}")
