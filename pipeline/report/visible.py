"""Text from data and models as it can be shown: what would act on the page around it, or not be seen, is named instead.

Markup is not this module's matter: the template escapes whatever it is given.
"""

import unicodedata

_MOST_MARKS = 4  # on one character; more would reach over the lines around it
_MOST = 1500  # characters of one text
# Line ends, tabs, and what joins letters of some scripts or the parts of an emoji.
_AS_THEY_ARE = "\n\t\u200c\u200d"
_PICTURES = 0x2400  # where Unicode's pictures of the first 32 characters begin


def visible(text: str, most: int = _MOST) -> str:
    """`text` with every control, direction, separating and unassigned character by its name."""
    more = len(text) - most
    shown = _few_marks("".join(map(_character, text[:most])))
    return f"{shown} ... ({more:,} more characters)" if more > 0 else shown


def _character(character: str) -> str:
    category = unicodedata.category(character)
    if character in _AS_THEY_ARE or not (category.startswith("C") or category in ("Zl", "Zp")):
        return character
    return chr(_PICTURES + ord(character)) if ord(character) < 32 else f"<U+{ord(character):04X}>"


def _few_marks(text: str) -> str:
    """Without all but the first of the marks that are heaped on one character."""
    kept, marks = [], 0
    for character in text + "\0":
        is_mark = unicodedata.category(character) in ("Mn", "Me")
        if not is_mark and marks > _MOST_MARKS:
            kept.append(f"<{marks - _MOST_MARKS} more marks>")
        marks = marks + 1 if is_mark else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return "".join(kept[:-1])
