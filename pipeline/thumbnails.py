"""Pictures as pages show them: small copies, re-encoded, so that no byte of the data's own files reaches a browser."""

import base64
import io
from collections.abc import Iterator
from typing import NamedTuple

from prefcache.pipeline.images import TAG, UnusableImage, decode

LONGEST = 240  # pixels of a thumbnail's longer side
_QUALITY = 80


class Thumbnail(NamedTuple):
    jpeg: bytes
    width: int
    height: int

    @property
    def url(self) -> str:
        """The picture itself as an address, for a page that loads nothing."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def make_thumbnail(encoded: bytes, longest: int = LONGEST) -> Thumbnail | None:
    """Make a copy whose longer side has at most `longest` pixels; None if the bytes no longer decode."""
    # Imported where pictures are decoded: most data has none.
    from PIL import Image

    try:
        pixels = decode(encoded).pixels
    except UnusableImage:
        return None
    width, height = fit(pixels.shape[1], pixels.shape[0], longest)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), reducing_gap=2.0).save(file, "JPEG", quality=_QUALITY)
    return Thumbnail(file.getvalue(), width, height)


def fit(width: int, height: int, longest: int = LONGEST) -> tuple[int, int]:
    """Shrink a size in proportion until neither side is longer than that; a smaller one stays as it is."""
    scale = min(1.0, longest / max(width, height, 1))
    return max(1, round(width * scale)), max(1, round(height * scale))


def split_at_tags(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text before each tag of a picture with that tag, and what follows the last one with ""."""
    at = 0
    for match in TAG.finditer(text):
        yield text[at : match.start()], match[0]
        at = match.end()
    yield text[at:], ""
