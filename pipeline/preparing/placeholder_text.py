"""A text that a chat template may place, join and strip, but not read.

Rendered with opaque texts, a template shows what it writes around any texts, and where each text goes. A question that
only asks yes or no (`'</think>' in content`, `content | length > 0`) is answered no, or that there is a text, and noted
as a guard: the result then holds only for texts for which the answer is right. Any other look into a text raises Inspected.
"""

from collections.abc import Callable, ItemsView, Iterable, Sequence, ValuesView
from typing import Any, NamedTuple, TypeVar

# What a text looks like to whatever gets past OpaqueText: private characters around what escaping, case, replacing or
# wrapping would change.
MARK_START = "\ue000"
MARK = MARK_START + "\"'<&>\\ \n\tAa\u00df\ue001"
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
Chars = str | None  # to strip; None: spaces of any kind
Class = TypeVar("Class", bound=type)


class Inspected(Exception):
    """The template looked into a text, so that what it writes depends on it."""


class Slot(NamedTuple):
    """The place of a text: which one goes there, and the characters that are stripped off it, one set after another.

    The ends do not depend on each other: a text of nothing but such characters ends up empty in any order.
    """

    which: int
    left: tuple[Chars, ...] = ()
    right: tuple[Chars, ...] = ()

    def fill(self, texts: Sequence[str]) -> str:
        text = texts[self.which]
        for chars in self.left:
            text = text.lstrip(chars)
        for chars in self.right:
            text = text.rstrip(chars)
        return text

    def lstrip(self, chars: Chars) -> "Slot":
        return self._replace(left=_add_strip(self.left, chars))

    def rstrip(self, chars: Chars) -> "Slot":
        return self._replace(right=_add_strip(self.right, chars))


def _add_strip(strips: tuple[Chars, ...], chars: Chars) -> tuple[Chars, ...]:
    """Add a strip to those before it. Where one set is within the next or the last, the larger one does all."""
    if chars == "" or (strips and _is_within(chars, strips[-1])):
        return strips
    if strips and _is_within(strips[-1], chars):
        return _add_strip(strips[:-1], chars)
    return (*strips, chars)


def _is_within(chars: Chars, others: Chars) -> bool:
    if chars is None or others is None:
        return others is None and not (chars or "").strip()
    return set(chars) <= set(others)


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

    def strip(self, chars: Any = None, /) -> "OpaqueText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: Any = None, /) -> "OpaqueText":
        return self._strip_end(0, "lstrip", chars)

    def rstrip(self, chars: Any = None, /) -> "OpaqueText":
        return self._strip_end(-1, "rstrip", chars)

    def _strip_end(self, end: int, how: str, chars: Any) -> "OpaqueText":
        if chars is not None and type(chars) is not str:
            raise Inspected(how)  # an OpaqueText, or what str refuses
        pieces = list(self.pieces)
        while isinstance(pieces[end], str) and not getattr(pieces[end], how)(chars):
            del pieces[end]
        pieces[end] = getattr(pieces[end], how)(chars)
        outermost = pieces[end]
        if isinstance(outermost, Slot) and len(pieces) > 1:
            # If nothing of it were left, the next piece would be stripped too.
            self.guards.append(Guard(outermost, "empty", None))
        return OpaqueText(tuple(pieces), self.guards)

    # -- questions that are answered no --

    def __contains__(self, other: object) -> bool:
        return self._answer_no("contains", other)

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        """Return the text alone: the separator is not in it."""
        is_whole = type(maxsplit) is int and maxsplit == -1 and not self._answer_no("contains", sep)
        return [self] if is_whole else _refuse("split")

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

    def __html__(self) -> str:
        """Refuse to be escaped, which would copy the mark."""
        return str(_refuse("escape"))

    def _answer_no(self, question: str, argument: Any = None) -> bool:
        literals = argument if isinstance(argument, tuple) else (argument,)
        slot = self.pieces[0]
        is_literal = question == "empty" or all(type(literal) is str for literal in literals)
        if len(self.pieces) > 1 or isinstance(slot, str) or not is_literal:
            raise Inspected(question)
        self.guards.append(Guard(slot, question, argument))
        return False


class OpaqueLength:
    """The length of an OpaqueText, which may only be compared with 0."""

    def __init__(self, text: OpaqueText) -> None:
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return _refuse("length")

    def __bool__(self) -> bool:
        return bool(self._text)

    def __gt__(self, other: object) -> bool:
        return bool(self) if type(other) is int and other == 0 else _refuse("length")

    def __eq__(self, other: object) -> bool:
        return not self > other

    def __hash__(self) -> int:
        return int(_refuse("length"))

    def __index__(self) -> int:
        return int(_refuse("length"))

    def __repr__(self) -> str:
        return str(_refuse("length"))


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
        return (before, Slot(0), after) if text.count(MARK) == 1 else None
    slots = [(n, piece) for n, piece in enumerate(text.pieces) if isinstance(piece, Slot)]
    n, slot = slots[0]
    before, after = ("".join(map(str, pieces)) for pieces in (text.pieces[:n], text.pieces[n + 1 :]))
    return (before, slot, after) if len(slots) == 1 and MARK not in before + after else None


def refuse_opaque(what: str, *values: Any) -> None:
    """Raise Inspected before something that would take the mark inside an OpaqueText for its text, or its length."""
    if any(map(_contains_opaque, values)):
        raise Inspected(what)


def _contains_opaque(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_contains_opaque, value.values()))
    if isinstance(value, list | tuple | ValuesView | ItemsView):
        return any(map(_contains_opaque, value))
    return isinstance(value, OpaqueText | OpaqueLength)
