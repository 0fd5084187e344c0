"""The pictures of an experiment's prompts, as pages show them: where they stand in a text, and small copies to send."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from prefcache.pipeline.stored.images import StoredImages
from prefcache.pipeline.thumbnails import LONGEST, Thumbnail, fit, make_thumbnail, split_at_tags

LONGEST_WHOLE = 4096  # pixels of the longer side on a picture's own page
_MOST_DECODED = 2  # at once: each may take hundreds of MiB


@dataclass(frozen=True)
class ShownImage:
    """A picture of a prompt, with the size of its thumbnail."""

    id: str  # in hex, as in addresses and SQL
    tag: str
    width: int
    height: int


class ImageReader:
    """Finds pictures by their ids and makes thumbnails of them, which are kept for a while."""

    def __init__(self, images: StoredImages) -> None:
        self.stored = images
        self._decoding = threading.BoundedSemaphore(_MOST_DECODED)
        self.thumbnail = lru_cache(512)(lambda image: self._shrink(image, LONGEST))
        self.whole = lru_cache(4)(lambda image: self._shrink(image, LONGEST_WHOLE))

    def list(self, images: Iterable[bytes] | None) -> "list[ShownImage]":
        """Return the pictures of a row's column `images`."""
        facts = [(image, self.stored.facts(image)) for image in images or ()]
        return [ShownImage(image.hex(), each.tag, *fit(each.width, each.height)) for image, each in facts]

    def _shrink(self, image: bytes, longest: int) -> Thumbnail | None:
        with self._decoding:
            return make_thumbnail(self.stored.encoded(image), longest)


def place(text: str, images: Iterable[ShownImage]) -> Iterator[tuple[str, ShownImage | None]]:
    """Split a prompt where its pictures stand: yield text and the picture after it, if there is one."""
    by_tag = {image.tag: image for image in images}
    for piece, tag in split_at_tags(text):
        image = by_tag.get(tag)
        yield piece + ("" if image else tag), image


def drop_tags(text: str, images: Iterable[ShownImage]) -> str:
    """Return a prompt without the tags of these pictures, for a list that shows them next to it."""
    return " ".join(piece for piece, _ in place(text, images)).strip()
