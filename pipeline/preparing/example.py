"""An example: one record in the one shape that everything after the formats works on.

A `Pair` has a chosen and a rejected answer, a `Label` one answer and a yes or no. A `Ranking` holds several answers in
order of merit; expand_rankings.py turns it into pairs.

A picture of the prompt is one character of its text, IMAGE_MARK, so that whatever works on text works on it too. The pictures
themselves are in `images`, in the order of their marks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, Any]
Turns = str | list[Message]
# Not a character: Unicode keeps it out of any text that is exchanged.
IMAGE_MARK = "\ufdd2"


# Not frozen: there are millions of them, and a frozen dataclass takes three times as long to create.
@dataclass(slots=True, kw_only=True)
class Context:
    """What the answers of an example share."""

    prompt: Turns  # plain text (one user turn) or messages
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    rendered: bool = False  # the texts are already what the model sees: no template is applied
    columns: dict[str, float] = field(default_factory=dict)  # those of schema.DATA_COLUMNS that the record has
    # Of the prompt, one for each IMAGE_MARK: values as the data has them, and images.Picture once they are loaded.
    images: tuple[Any, ...] = ()

    def context(self) -> dict[str, Any]:
        """Return these fields, for another example with the same prompt."""
        return {
            "prompt": self.prompt,
            "tools": self.tools,
            "template_kwargs": self.template_kwargs,
            "rendered": self.rendered,
            "columns": self.columns,
            "images": self.images,
        }


@dataclass(slots=True, kw_only=True)
class Pair(Context):
    chosen: Turns
    rejected: Turns
    implicit: bool = False  # where the answers begin was found in plain text, and may be moved back to a token's border

    @property
    def answers(self) -> tuple[Turns, ...]:
        return self.chosen, self.rejected


@dataclass(slots=True, kw_only=True)
class Label(Context):
    completion: Turns
    label: bool

    @property
    def answers(self) -> tuple[Turns, ...]:
        return (self.completion,)


class Candidate(NamedTuple):
    """One answer of a ranking. The higher `standing` wins, equal ones tie; `score` is the data's own grade, if any."""

    turns: Turns
    standing: float
    score: float | None = None


@dataclass(slots=True, kw_only=True)
class Ranking(Context):
    answers: tuple[Candidate, ...]


Example = Pair | Label


class Unusable(Exception):
    """Send a record to quarantine. Reason and detail can be counted; what was found, and the limit, are numbers of their own."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        n_found: int | None = None,
        n_limit: int | None = None,
        n_tokens: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail
        self.n_found, self.n_limit, self.n_tokens = n_found, n_limit, n_tokens

    @property
    def description(self) -> str:
        """The detail with its numbers: `tokens in prompt and answer, against prepare.max_length: 1,203, limit 1,024`."""
        named = [
            *([f"{self.n_found:,}"] if self.n_found is not None else []),
            *([f"limit {self.n_limit:,}"] if self.n_limit is not None else []),
        ]
        return ": ".join(filter(None, (self.detail, ", ".join(named))))


def plain_text(turns: Turns, images: Sequence[Any] = ()) -> str:
    """Return what a person reads: the text of one turn with its tool calls, or `role: text` lines of several.

    A picture is shown as its tag; `images` are the loaded pictures of these turns.
    """
    if isinstance(turns, str):
        text = turns
    elif len(turns) == 1:
        text = _turn_text(turns[0])
    else:
        text = "\n".join(f"{message['role']}: {_turn_text(message)}" for message in turns)
    if IMAGE_MARK not in text:
        return text
    text, *rest = text.split(IMAGE_MARK)
    for image, piece in zip(images, rest, strict=True):
        # A tag is a word of its own, though templates often join picture and text.
        text += f"{' ' if text[-1:].isalnum() else ''}{image.tag}{' ' if piece[:1].isalnum() else ''}{piece}"
    return text


def count_images(turns: Turns) -> int:
    """Count the places of pictures."""
    if isinstance(turns, str):
        return turns.count(IMAGE_MARK)
    contents = (turn.get("content") for turn in turns)
    return sum(content.count(IMAGE_MARK) for content in contents if isinstance(content, str))


def _turn_text(message: Message) -> str:
    text = content if isinstance(content := message.get("content"), str) else ""
    if calls := message.get("tool_calls"):
        called = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
        return "\n".join(filter(None, (text, json.dumps(called, ensure_ascii=False, default=str))))
    return text
