"""What a chat template writes around the texts of a conversation, found once for all conversations of one shape.

The template is rendered once with `Opaque` texts: strings that can be placed, joined and stripped, but not looked into. What it
then writes is the same for any texts, with each text put where its Opaque stood: a frame. A look inside that only asks
yes or no (`'</think>' in content`) is answered no and noted, and the frame then serves texts of which that is true. Any
other look ends the attempt, and conversations of that shape are rendered one by one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.preparing.example import Message, Unusable

# What is seen of a text by whatever gets past Opaque: private characters around what escaping, case, replacing or
# wrapping would change. A frame with any of it in is not used.
_OPENING = "\ue000"
MARK = _OPENING + "\"'<&>\\ \n\tAa\u00df\ue001"
# Texts on which a new frame is tried: with spaces around, with what templates look for, and long. And what this
# template has for literals: alone, and within a text.
_TRIALS = (" \n%d\t ", "<think>\na\n</think>\n\n%d", "%d \"'<&> " * 64)
_MOST_LITERALS = 64
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


class Inspected(Exception):
    """The template looked into a text, so that what it writes depends on it."""


class Slot(NamedTuple):
    """A place in a frame: which text goes there, and how it is stripped."""

    which: int
    strip: str

    def of(self, texts: Sequence[str]) -> str:
        return _STRIPS[self.strip](texts[self.which])


class Guard(NamedTuple):
    """A question to a text that the template asked, and that must have no for an answer."""

    slot: Slot
    question: str
    argument: Any


Piece = str | Slot


class Frame(NamedTuple):
    pieces: tuple[Piece, ...]
    guards: tuple[Guard, ...]

    def holds(self, texts: Sequence[str]) -> bool:
        return not any(_QUESTIONS[guard.question](guard.slot.of(texts), guard.argument) for guard in self.guards)

    def fill(self, texts: Sequence[str]) -> str:
        return "".join([piece if isinstance(piece, str) else piece.of(texts) for piece in self.pieces])


class Opaque(str):
    """A text, or several with others around and between, that can be placed, joined and stripped, but not looked into."""

    pieces: tuple[Piece, ...]
    guards: list[Guard]

    def __new__(cls, pieces: tuple[Piece, ...], guards: list[Guard]) -> "Opaque":
        made = super().__new__(cls, "".join([piece if isinstance(piece, str) else MARK for piece in pieces]))
        made.pieces, made.guards = pieces, guards
        return made

    def _no(self, question: str, argument: Any = None) -> bool:
        literals = argument if isinstance(argument, tuple) else (argument,)
        slot = self.pieces[0]
        asked = question == "empty" or all(_is_literal(literal) for literal in literals)
        if len(self.pieces) > 1 or isinstance(slot, str) or not asked:
            raise Inspected(question)
        self.guards.append(Guard(slot, question, argument))
        return False

    def _stripped(self, end: int, how: str) -> "Opaque":
        pieces = list(self.pieces)
        while isinstance(pieces[end], str) and not _STRIPS[how](str(pieces[end])):
            del pieces[end]
        at_end = pieces[end]
        if isinstance(at_end, str):
            pieces[end] = _STRIPS[how](at_end)
        elif at_end.strip not in (how, "strip"):
            pieces[end] = Slot(at_end.which, how if at_end.strip == "whole" else "strip")
        bare = pieces[end]
        if isinstance(bare, Slot) and len(pieces) > 1:
            # If nothing were left of it, what is behind it would be stripped too.
            self.guards.append(Guard(bare, "empty", None))
        return Opaque(tuple(pieces), self.guards)

    def strip(self, chars: Any = None) -> "Opaque":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: Any = None) -> "Opaque":
        return self._stripped(0, "lstrip") if chars is None else _inspected("lstrip")

    def rstrip(self, chars: Any = None) -> "Opaque":
        return self._stripped(-1, "rstrip") if chars is None else _inspected("rstrip")

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> str:
        return join([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return join([other, self]) if isinstance(other, str) else NotImplemented

    def __contains__(self, other: object) -> bool:
        return self._no("contains", other)

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return _inspected("startswith") if bounds else self._no("startswith", prefix)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return _inspected("endswith") if bounds else self._no("endswith", suffix)

    def __eq__(self, other: object) -> bool:
        return self._no("equals", other) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return any(isinstance(piece, str) for piece in self.pieces) or not self._no("empty")

    def __hash__(self) -> int:
        return int(_inspected("hash"))


def _is_literal(value: Any) -> bool:
    return type(value) is str


def holds_opaque(value: Any) -> bool:
    """Whether it is an Opaque, or has one in it."""
    if isinstance(value, dict):
        return any(map(holds_opaque, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_opaque, value))
    return isinstance(value, Opaque)


def refuse_opaque(what: str, *values: Any) -> None:
    """Before something sees them that would look at the mark inside of an Opaque as if it were a text."""
    if any(map(holds_opaque, values)):
        raise Inspected(what)


def _inspected(what: str) -> Any:
    raise Inspected(what)


def _refuse(name: str) -> Any:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        raise Inspected(name)

    return method


# What says of which type it is does not look inside; everything else that a string can do does.
_HARMLESS = {"__new__", "__init__", "__class__", "__getattribute__", "__init_subclass__", "__subclasshook__"} | {
    "__setattr__", "__delattr__", "__dir__", "__sizeof__", "__doc__", "__getstate__"
}  # fmt: skip
for _name in set(dir(str)) - _HARMLESS - set(vars(Opaque)):
    setattr(Opaque, _name, _refuse(_name))


def join(texts: Iterable[str]) -> str:
    """As `"".join`, but an Opaque among them stays one."""
    pieces: list[Piece] = []
    guards: list[Guard] | None = None
    for text in texts:
        guards = text.guards if isinstance(text, Opaque) else guards
        for piece in _pieces(text):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return Opaque(tuple(pieces), guards) if guards is not None else "".join(map(str, pieces))


def _pieces(text: str) -> tuple[Piece, ...]:
    if isinstance(text, Opaque):
        return text.pieces
    return (str(text),) if text else ()


def trace(render: Callable[[list[Message]], str], shape: Sequence[str], literals: Sequence[str] = ()) -> Frame | None:
    """The frame of conversations whose turns have these roles; None where what is written depends on the texts."""
    guards: list[Guard] = []
    try:
        written = render(_turns(shape, [Opaque((Slot(which, "whole"),), guards) for which in range(len(shape))]))
    except Unusable:
        return None  # refused, or looked into
    frame = Frame(_pieces(written), tuple(dict.fromkeys(guards)))
    if any(isinstance(piece, str) and _OPENING in piece for piece in frame.pieces):
        return None  # a text got out otherwise than by being placed
    trials = [*_TRIALS, *(form for text in literals[:_MOST_LITERALS] for form in (text, f"a {text} %d"))]
    return frame if all(_serves(frame, render, shape, trial) for trial in trials) else None


def _serves(frame: Frame, render: Callable[[list[Message]], str], shape: Sequence[str], trial: str) -> bool:
    """Whether it says the same as the template of such texts."""
    texts = [trial.replace("%d", str(which)) for which in range(len(shape))]
    if not frame.holds(texts):
        return True
    try:
        return render(_turns(shape, texts)) == frame.fill(texts)
    except Unusable:
        return False


def _turns(shape: Sequence[str], texts: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in zip(shape, texts, strict=True)]


def find(written: str) -> tuple[str, Slot, str] | None:
    """What is before and after the one Opaque, or the one MARK, in a text; None where there is not exactly one."""
    if not isinstance(written, Opaque):
        before, _, after = written.partition(MARK)
        return (before, Slot(0, "whole"), after) if written.count(MARK) == 1 else None
    at = [n for n, piece in enumerate(written.pieces) if isinstance(piece, Slot)]
    slot = written.pieces[at[0]]
    before, after = ("".join(map(str, pieces)) for pieces in (written.pieces[: at[0]], written.pieces[at[0] + 1 :]))
    return (before, slot, after) if isinstance(slot, Slot) and len(at) == 1 and MARK not in before + after else None


def after(whole: Frame, asked: Frame) -> tuple[Piece, ...] | None:
    """What `whole` has after all that `asked` has; None where it does not begin with it."""
    left = list(whole.pieces)
    for piece in asked.pieces:
        if not left:
            return None
        if left[0] == piece:
            left.pop(0)
        elif isinstance(piece, str) and isinstance(left[0], str) and left[0].startswith(piece):
            left[0] = left[0][len(piece) :]
        else:
            return None
    return tuple(left)
