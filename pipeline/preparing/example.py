"""An example: one record in our one shape, whatever file it came from.

A `Pair` has a chosen and a rejected answer, a `Label` one answer and a yes or no. A `Ranking` holds several answers in
order of merit; it becomes pairs before anything else sees it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]
Turns = str | list[Message]


# Not frozen: that makes them three times slower to make, and there are millions.
@dataclass(slots=True, kw_only=True)
class Asked:
    """A prompt, as plain text (one user turn) or as messages, and what the chat template is told beside it."""

    prompt: Turns
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    rendered: bool = False
    """The texts are already what the model sees: no template is applied."""

    def asked(self) -> dict[str, Any]:
        """What is asked, for an example of the same question."""
        return {
            "prompt": self.prompt,
            "tools": self.tools,
            "template_kwargs": self.template_kwargs,
            "rendered": self.rendered,
        }


@dataclass(slots=True, kw_only=True)
class Pair(Asked):
    chosen: Turns
    rejected: Turns
    chosen_score: float | None = None
    rejected_score: float | None = None

    @property
    def answers(self) -> tuple[Turns, ...]:
        return self.chosen, self.rejected


@dataclass(slots=True, kw_only=True)
class Label(Asked):
    completion: Turns
    label: bool

    @property
    def answers(self) -> tuple[Turns, ...]:
        return (self.completion,)


class Ranked(NamedTuple):
    """One answer of a ranking. The higher `standing` wins, equal ones tie; `score` is the data's own grade, if any."""

    turns: Turns
    standing: float
    score: float | None = None


@dataclass(slots=True, kw_only=True)
class Ranking(Asked):
    answers: tuple[Ranked, ...]


Example = Pair | Label


class Unusable(Exception):
    """Why a record cannot become an example, and goes to quarantine: a reason that can be counted, and the detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def plain_text(turns: Turns) -> str:
    """What a person reads: one turn's text, or `role: text` lines of several."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return _content(turns[0])
    return "\n".join(f"{message['role']}: {_content(message)}" for message in turns)


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
