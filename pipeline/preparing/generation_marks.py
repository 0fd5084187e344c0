"""Marks around what a chat template itself says the assistant generates (`{% generation %}`), inside the text it renders."""

from collections.abc import Sequence

from prefcache.pipeline.preparing.encoder import ExampleText, Span

# Not characters: Unicode keeps them out of any text that is exchanged.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def split_marks(text: str) -> tuple[str, list[Span]]:
    """Return the text without marks, and begin and end of each marked part of it."""
    plain, *rest = text.split(OPEN)
    spans = []
    for piece in rest:
        inside, _, outside = piece.partition(CLOSE)
        if inside:
            spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + outside
    return plain, spans


def read_marks(prompt: str, answers: Sequence[str]) -> ExampleText:
    """Return an example of these texts, whose marks say what counts."""
    texts, counted = zip(*map(split_marks, answers), strict=True)
    return ExampleText(split_marks(prompt)[0], texts, counted=counted)


def clip_start(spans: Sequence[Span], begin: int) -> list[Span]:
    """Return the spans of the text that is left from `begin` on."""
    return [(max(a, begin) - begin, b - begin) for a, b in spans if b > begin]


def has_marks(text: str) -> bool:
    return OPEN in text or CLOSE in text
