"""Prompts for an engine that expands images itself: one placeholder for the tokens of each image.

`prepare` has expanded what the chat template writes (preparing/image_text.py); here the tokens of each image are found again.
"""

from typing import NamedTuple

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import TokenSequence


class Span(NamedTuple):
    """The tokens of a prompt that stand for a picture."""

    begin: int
    end: int


class Placeholders:
    def __init__(self, images: PromptImages) -> None:
        self._images = images
        self.ids = images.processor.encode_text(images.processor.placeholder)

    def find(self, sequence: TokenSequence) -> list[Span]:
        """Return where each picture's tokens are; UsageError if they merge with the text around them."""
        prompt, at, spans = sequence.prompt_ids.astype("<i4").tobytes(), 0, list[Span]()
        for image in sequence.images:
            ids = self._images.replacement(image).ids.astype("<i4")
            if (begin := find_ids(prompt, ids.tobytes(), at)) is None:
                raise UsageError(
                    "The tokens of a picture merge with the text around them in some prompts, so that this engine cannot be asked for "
                    "exactly these tokens. Set score.engine=transformers."
                )
            at = begin + len(ids)
            spans.append(Span(begin, at))
        return spans


def find_ids(ids: bytes, wanted: bytes, start: int) -> int | None:
    """Return the first place, from `start` on, at which these ids stand; both are little-endian int32."""
    at = ids.find(wanted, 4 * start)
    while at % 4 and at >= 0:
        at = ids.find(wanted, at + 1)
    return at // 4 if at >= 0 else None
