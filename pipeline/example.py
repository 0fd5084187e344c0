"""An example: one record in our one shape, whatever file it came from."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Turns = str | list[Message]


@dataclass(frozen=True)
class Example:
    """A prompt and two answers to it, each as plain text or as messages with role and content."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


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
        return str(turns[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in turns)
