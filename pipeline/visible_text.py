"""Make text from data, models and files visible: on a terminal, on a page, in a model card.

Characters that would control a terminal, reorder the text around them or stay invisible are shown by name: `␛[31m`, `<U+202E>`.
Escaping markup is up to the caller.
"""

import os
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TextIO

_MOST_MARKS = 4  # on one character; more would reach over the lines around it
_PICTURES = 0x2400  # where Unicode's pictures of the first 32 characters begin
_NON_JOINER, _JOINER = "\u200c", "\u200d"
_VIRAMA = 9  # combining class of the sign that joins consonants in Indic scripts
# Scripts whose letters change shape with the side on which they are joined.
_JOINED = ("ADLAM", "ARABIC", "HANIFI", "MANDAIC", "MANICHAEAN", "MONGOLIAN", "NKO", "PHAGS-PA", "SOGDIAN", "SYRIAC")


def visible(text: str, most: int | None = None) -> str:
    """Replace control, format, separator, private and unassigned characters by their names; cut after `most` characters."""
    if most is not None and len(text) > most:
        return f"{visible(text[:most])}…"
    return text if _is_plain(text) else "".join(_show(text))


def visible_pieces(pieces: Sequence[str]) -> list[str]:
    """Do the same to each piece of one text: a joiner's neighbours may be in other pieces."""
    text = "".join(pieces)
    if _is_plain(text):
        return list(pieces)
    shown, begin, found = _show(text), 0, []
    for piece in pieces:
        found.append("".join(shown[begin : begin + len(piece)]))
        begin += len(piece)
    return found


def visible_tokens(texts: Sequence[str]) -> list[str]:
    """Do the same to the tokens of a text, and mark line ends and tabs as well, which take part in the layout."""
    pieces = visible_pieces(texts)
    return [
        piece.replace("\n", "\N{RETURN SYMBOL}\n").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}\t") for piece in pieces
    ]


def format_bytes(n: int) -> str:
    """Return `1.6 GB`: a size of files in decimal units, as disks are sold and `ls --si` counts."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # Below 999.5 it does not round up to 1,000.
        if n >= size * 0.9995:
            return f"{n / size:.3g} {unit}" if n < 999.5 * size else f"{n / size:,.0f} {unit}"
    return count(n, "byte")


def count(n: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 row`, `1,234 rows`."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def wrap_for(file: TextIO, text: str, indent: int | None = None) -> str:
    """Wrap text between words if the file is a terminal. A pipe gets lines whole, so that grep finds all of one."""
    if not file.isatty():
        return text
    try:
        width = int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        try:
            width = os.get_terminal_size(file.fileno()).columns or 80
        except OSError:
            width = 80
    return wrap_words(text, width, indent)


def wrap_words(text: str, width: int, indent: int | None = None) -> str:
    """Break lines that are too wide between words, never within one: commands, ids and paths are copied whole.

    Lines that follow begin with `indent` blanks, or with as many as the first one.
    """
    return "\n".join(_wrap_line(line, width, indent) for line in text.split("\n"))


def _wrap_line(line: str, width: int, indent: int | None) -> str:
    blanks = " " * (len(line) - len(line.lstrip(" ")) if indent is None else indent)
    return textwrap.fill(
        line, width, subsequent_indent=blanks, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )


def visible_json(text: str) -> str:
    """Escape the same characters in JSON, which does not change its meaning: only strings contain them."""
    if text.isprintable():
        return text
    return "".join(c if _is_seen(text, i) else _escape(c) for i, c in enumerate(text))


def _is_plain(text: str) -> bool:
    """Tell quickly whether nothing needs replacing, which is the usual case."""
    return text.isascii() and text.replace("\n", "").replace("\t", "").isprintable()


def _show(text: str) -> list[str]:
    """Return what to show for each character."""
    shown, marks = [], 0
    for i, character in enumerate(text):
        marks = marks + 1 if _category(character) in ("Mn", "Me") else 0
        if marks > _MOST_MARKS:
            is_last = i + 1 == len(text) or _category(text[i + 1]) not in ("Mn", "Me")
            shown.append(f"<{marks - _MOST_MARKS} more marks>" if is_last else "")
        else:
            shown.append(character if _is_seen(text, i) else _name(character))
    return shown


def _is_seen(text: str, i: int) -> bool:
    character = text[i]
    if character in (_JOINER, _NON_JOINER):
        return _is_joining(text, i)
    return character in "\n\t" or not _category(character).startswith(("C", "Zl", "Zp"))


def _is_joining(text: str, i: int) -> bool:
    """Tell whether a joiner or non-joiner changes how its neighbours look, as in Persian words, Indic clusters and emoji."""
    before, after = text[i - 1] if i else " ", text[i + 1] if i + 1 < len(text) else " "
    if _VIRAMA in (unicodedata.combining(before), unicodedata.combining(after)):
        return True
    sides = [_is_of_joined_script(before), _is_of_joined_script(after)]
    if text[i] == _NON_JOINER:
        return all(sides)
    # Parts of an emoji, which may have a skin tone or a variation selector.
    is_emoji = (_category(before) == "So" or before == "\ufe0f" or "\U0001f3fb" <= before <= "\U0001f3ff") and (
        _category(after) == "So"
    )
    return any(sides) or is_emoji


@lru_cache(4096)
def _is_of_joined_script(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_JOINED)


@lru_cache(4096)
def _category(character: str) -> str:
    return unicodedata.category(character)


def _name(character: str) -> str:
    return chr(_PICTURES + ord(character)) if ord(character) < 32 else f"<U+{ord(character):04X}>"


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
