"""A text that a chat template may place, join and strip, but not read.

Rendered with opaque texts, a template shows what it writes around any texts, and where each text goes. A question that
only asks yes or no (`'</think>' in content`) is answered no and noted as a guard: the result then holds only for texts
for which the answer is no. Any other look into a text raises Inspected.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

# What a text looks like to whatever gets past OpaqueText: private characters around what escaping, case, replacing or
# wrapping would change.
MARK_START = "\ue000"
MARK = MARK_START + "\"'<&>\\ \n\tAa\u00df\ue001"
_STRIPS: dict[str, Callable[[str], str]] = {
    "whole": str,
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
}
_QUESTIONS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda text, other: other in text,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "equals": str.__eq__,
    "empty": lambda text, _: not text,
}
# These do not look into a str; every other method that OpaqueText does not define itself is refused.
_HARMLESS = {"__new__", "__init__", "__class__", "__getattribute__", "__init_subclass__", "__subclasshook__"} | {
    "__setattr__", "__delattr__", "__dir__", "__sizeof__", "__doc__", "__getstate__"
}  # fmt: skip
Class = TypeVar("Class", bound=type)


class Inspected(Exception):
    """The template looked into a text, so that what it writes depends on it."""


class Slot(NamedTuple):
    """The place of a text: which one goes there, and how it is stripped."""

    which: int
    strip: str

    def fill(self, texts: Sequence[str]) -> str:
        return _STRIPS[self.strip](texts[self.which])


class Guard(NamedTuple):
    """A question about a text that the template asked, and to which the answer has to be no."""

    slot: Slot
    question: str
    argument: Any

    def holds(self, texts: Sequence[str]) -> bool:
        return not _QUESTIONS[self.question](self.slot.fill(texts), self.argument)


Piece = str | Slot


def _refuse(what: str) -> Any:
    raise Inspected(what)


def _refuse_inherited_methods(cls: Class) -> Class:
    """Make every method that a class inherits from str raise Inspected."""
    for name in set(dir(str)) - _HARMLESS - set(vars(cls)):
        setattr(cls, name, lambda *_, name=name, **__: _refuse(name))
    return cls


@_refuse_inherited_methods
class OpaqueText(str):
    """A text, or several with others around and between. All OpaqueTexts of one rendering share a list of guards."""

    pieces: tuple[Piece, ...]
    guards: list[Guard]

    def __new__(cls, pieces: tuple[Piece, ...], guards: list[Guard]) -> "OpaqueText":
        text = super().__new__(cls, "".join([piece if isinstance(piece, str) else MARK for piece in pieces]))
        text.pieces, text.guards = pieces, guards
        return text

    # -- placing and joining --

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> str:
        return join([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return join([other, self]) if isinstance(other, str) else NotImplemented

    # -- stripping --

    def strip(self, chars: Any = None) -> "OpaqueText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: Any = None) -> "OpaqueText":
        return self._strip_end(0, "lstrip") if chars is None else _refuse("lstrip")

    def rstrip(self, chars: Any = None) -> "OpaqueText":
        return self._strip_end(-1, "rstrip") if chars is None else _refuse("rstrip")

    def _strip_end(self, end: int, how: str) -> "OpaqueText":
        pieces = list(self.pieces)
        while isinstance(pieces[end], str) and not _STRIPS[how](str(pieces[end])):
            del pieces[end]
        outermost = pieces[end]
        if isinstance(outermost, str):
            pieces[end] = _STRIPS[how](outermost)
        else:
            if outermost.strip not in (how, "strip"):
                outermost = Slot(outermost.which, how if outermost.strip == "whole" else "strip")
                pieces[end] = outermost
            if len(pieces) > 1:
                # If nothing of it were left, the next piece would be stripped too.
                self.guards.append(Guard(outermost, "empty", None))
        return OpaqueText(tuple(pieces), self.guards)

    # -- questions that are answered no --

    def __contains__(self, other: object) -> bool:
        return self._answer_no("contains", other)

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return _refuse("startswith") if bounds else self._answer_no("startswith", prefix)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return _refuse("endswith") if bounds else self._answer_no("endswith", suffix)

    def __eq__(self, other: object) -> bool:
        return self._answer_no("equals", other) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return any(isinstance(piece, str) for piece in self.pieces) or not self._answer_no("empty")

    def __hash__(self) -> int:
        return int(_refuse("hash"))

    def _answer_no(self, question: str, argument: Any = None) -> bool:
        literals = argument if isinstance(argument, tuple) else (argument,)
        slot = self.pieces[0]
        is_literal = question == "empty" or all(type(literal) is str for literal in literals)
        if len(self.pieces) > 1 or isinstance(slot, str) or not is_literal:
            raise Inspected(question)
        self.guards.append(Guard(slot, question, argument))
        return False


def join(texts: Iterable[str]) -> str:
    """Join texts as `"".join` does; with an OpaqueText among them, the result is one too."""
    pieces: list[Piece] = []
    guards: list[Guard] | None = None
    for text in texts:
        guards = text.guards if isinstance(text, OpaqueText) else guards
        for piece in text_pieces(text):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return OpaqueText(tuple(pieces), guards) if guards is not None else "".join(map(str, pieces))


def text_pieces(text: str) -> tuple[Piece, ...]:
    if isinstance(text, OpaqueText):
        return text.pieces
    return (str(text),) if text else ()


def split_at_slot(text: str) -> tuple[str, Slot, str] | None:
    """Return what stands before and after the one OpaqueText, or the one MARK; None unless there is exactly one."""
    if not isinstance(text, OpaqueText):
        before, _, after = text.partition(MARK)
        return (before, Slot(0, "whole"), after) if text.count(MARK) == 1 else None
    slots = [(n, piece) for n, piece in enumerate(text.pieces) if isinstance(piece, Slot)]
    n, slot = slots[0]
    before, after = ("".join(map(str, pieces)) for pieces in (text.pieces[:n], text.pieces[n + 1 :]))
    return (before, slot, after) if len(slots) == 1 and MARK not in before + after else None


def refuse_opaque(what: str, *values: Any) -> None:
    """Raise Inspected before something that would take the mark inside an OpaqueText for its text."""
    if any(map(_contains_opaque, values)):
        raise Inspected(what)


def _contains_opaque(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_contains_opaque, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_contains_opaque, value))
    return isinstance(value, OpaqueText)
