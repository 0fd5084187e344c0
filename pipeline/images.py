"""Pictures: their bytes as they came, decoded to RGB the same way everywhere, and named by their pixels.

    orientation   as EXIF says, applied
    transparency  put onto white
    palette, grey, CMYK   converted to RGB

A picture is known by a hash of its pixels, so neither its file's name nor its format matters. Reading one fails with
UnusableImage, whose reason can be counted.
"""

import io
import struct
import warnings
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 64 << 20  # more would take 192 MiB once decoded
SHORTEST_TAG = 12  # hex digits


class UnusableImage(Exception):
    """A picture that cannot be used. Reason and detail can be counted."""

    def __init__(
        self, reason: str, detail: str = "", *, n_found: int | None = None, n_limit: int | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.n_found, self.n_limit = reason, detail, n_found, n_limit


class Picture(NamedTuple):
    """A picture of the data: its bytes, and what they decode to."""

    encoded: bytes  # as they came: PNG, JPEG, WebP, ...
    format: str
    pixels: np.ndarray  # RGB, [height, width, 3]
    hash: bytes  # of the pixels

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def tag(self) -> str:
        return image_tag(self.width, self.height, self.hash)


def decode(encoded: bytes) -> Picture:
    """Decode a picture's bytes; UnusableImage if it is broken, animated, too large or has more than 8 bits per channel."""
    # Imported where pictures are decoded: most commands, and most data, have none.
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(encoded)) as image:
                kind = image.format or ""
                if (n_frames := getattr(image, "n_frames", 1)) > 1:
                    raise UnusableImage("animated image", "frames", n_found=n_frames, n_limit=1)
                if image.width * image.height > MOST_PIXELS:
                    raise UnusableImage(
                        "image too large", "pixels", n_found=image.width * image.height, n_limit=MOST_PIXELS
                    )
                pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise UnusableImage("broken image", type(error).__name__) from None
    return Picture(encoded, kind, pixels, hash_pixels(pixels))


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_tag(width: int, height: int, pixel_hash: bytes) -> str:
    """How a picture stands in text: [image 640x480 3f2a91c0d4e5]."""
    return f"[image {width}x{height} {pixel_hash.hex()[:SHORTEST_TAG]}]"


def hash_pixels(pixels: np.ndarray) -> bytes:
    """blake2b-128 over (width, height, RGB bytes)."""
    height, width, _ = pixels.shape
    digest = blake2b(struct.pack("<II", width, height), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
