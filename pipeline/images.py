"""Pictures: files of pixels, decoded to RGB the same way everywhere, and named by a hash of their pixels.

In the whole project a *picture* is such a file, an *image* is a picture in a prompt: its id (schema.image_id) also names the
processor that prepares it for the model (image_processor.py). *Features* are what a model's vision tower computes of an image
(model/vision.py).

    orientation   as EXIF says, applied
    transparency  put onto white
    palette, grey, CMYK   converted to RGB; colour profiles are not applied
    several pictures in a JPEG (MPO)   the first one

Neither a file's name nor its format matters to the hash. Decoding fails with UnusableImage, whose reason can be counted.
The header is checked before anything is decoded, so that a hostile file costs little memory and time.
"""

import io
import re
import struct
import threading
import warnings
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 64 << 20  # of a picture as it is stored
MOST_PIXELS = 64 << 20  # more would take 192 MiB once decoded
_TAG_DIGITS = 12  # hex digits
TAG = re.compile(rf"\[image \d+x\d+ [0-9a-f]{{{_TAG_DIGITS}}}\]")  # what image_tag returns
_FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP"}  # by Pillow's names
_SEVERAL_IN_JPEG = "MPO"
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# A scan passes over all of a JPEG's pixels, and may be a few bytes long. Cameras and encoders write about ten.
_MOST_SCANS = 100
_RECENT_BYTES = 128 << 20
# First bytes of files. Formats that are not read are listed for the error message.
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
)
_TRANSPOSED = {  # the values of EXIF's orientation
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112


class UnusableImage(Exception):
    """A picture that cannot be used. Reason and detail can be counted."""

    def __init__(
        self, reason: str, detail: str = "", *, n_found: int | None = None, n_limit: int | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.n_found, self.n_limit = reason, detail, n_found, n_limit


class Picture(NamedTuple):
    """A picture of the data: its bytes, and what is known of its pixels, which take far more memory."""

    encoded: bytes  # the unchanged file: PNG, JPEG, WebP, ...
    format: str
    width: int
    height: int
    hash: bytes  # of the pixels

    @property
    def pixels(self) -> np.ndarray:
        """RGB, [height, width, 3], read-only; decoded again unless that was done a moment ago."""
        pixels = _recent.find(self.hash)
        if pixels is None:
            pixels = _decode_pixels(self.encoded)[1]
            _recent.keep(self.hash, pixels)
        return pixels

    @property
    def tag(self) -> str:
        return image_tag(self.width, self.height, self.hash)


class _RecentPixels:
    """The pixels of the pictures decoded last, so that one that is named, processed and stored is decoded once."""

    def __init__(self) -> None:
        self._pixels: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, pixel_hash: bytes) -> np.ndarray | None:
        return self._pixels.get(pixel_hash)

    def keep(self, pixel_hash: bytes, pixels: np.ndarray) -> None:
        with self._lock:
            self._pixels[pixel_hash] = pixels
            while len(self._pixels) > 1 and sum(each.nbytes for each in self._pixels.values()) > _RECENT_BYTES:
                self._pixels.popitem(last=False)


_recent = _RecentPixels()


def decode(encoded: bytes) -> Picture:
    """Decode a picture's bytes; UnusableImage if it is broken, animated, too large or has more than 8 bits per channel."""
    kind, pixels = _decode_pixels(encoded)
    picture = Picture(encoded, kind, pixels.shape[1], pixels.shape[0], hash_pixels(pixels))
    _recent.keep(picture.hash, pixels)
    return picture


def find_format(encoded: bytes) -> str | None:
    """Name a file's format by its first bytes; None if they are unknown."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP"
    if encoded[4:8] == b"ftyp":
        return encoded[8:12].decode("ascii", "backslashreplace").upper().strip()  # AVIF, HEIC, MP4
    return next((name for start, name in _SIGNATURES if encoded.startswith(start)), None)


def _decode_pixels(encoded: bytes) -> tuple[str, np.ndarray]:
    # Imported where pictures are decoded: most commands, and most data, have none.
    from PIL import Image, WebPImagePlugin  # noqa: F401 (else Pillow would import every format to find WebP)

    kind = find_format(encoded)
    if kind is None or kind not in _FORMATS.values():
        found = f"found {kind}" if kind else "found another one" if encoded else "found no bytes"
        raise UnusableImage("unknown image format", f"{found}; expected PNG, JPEG, WebP, GIF or BMP")
    if len(encoded) > MOST_BYTES:
        raise UnusableImage("image too large", "bytes", n_found=len(encoded), n_limit=MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=list(_FORMATS)) as image:
                _check_header(image, encoded)
                image.load()
                turn = _TRANSPOSED.get(image.getexif().get(_ORIENTATION, 1))
                rgb = _to_rgb(image)
                pixels = np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)
    except UnusableImage:
        raise
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise UnusableImage("image too large", "pixels", n_limit=MOST_PIXELS) from None
    except Exception as error:  # A damaged file makes a decoder raise whatever its parts raise.
        raise UnusableImage("broken image", f"damaged or cut off ({type(error).__name__})") from None
    pixels.flags.writeable = False
    return kind, pixels


def _check_header(image: "Image.Image", encoded: bytes) -> None:
    """Refuse a picture by its header, before its pixels are decoded."""
    n_pixels = image.width * image.height
    if n_pixels > MOST_PIXELS:
        raise UnusableImage("image too large", "pixels", n_found=n_pixels, n_limit=MOST_PIXELS)
    if n_pixels < 1:
        raise UnusableImage("broken image", "no pixels")
    if image.format != _SEVERAL_IN_JPEG and getattr(image, "is_animated", False):
        raise UnusableImage("animated image", image.format or "")
    # Pillow drops the lower byte of a colour of 16 bits, but cuts grey of 16 bits off at 255.
    has_16_bits = image.format == "PNG" and encoded[24] == 16
    if has_16_bits or image.mode not in _MODES:
        raise UnusableImage("more than 8 bits per channel", "16-bit PNG" if has_16_bits else f"mode {image.mode}")
    if image.format in ("JPEG", _SEVERAL_IN_JPEG) and (n_scans := encoded.count(b"\xff\xda")) > _MOST_SCANS:
        raise UnusableImage("image takes too much", "scans", n_found=n_scans, n_limit=_MOST_SCANS)


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_tag(width: int, height: int, pixel_hash: bytes) -> str:
    """Return the tag that stands for a picture in text: [image 640x480 3f2a91c0d4e5]."""
    return f"[image {width}x{height} {pixel_hash.hex()[:_TAG_DIGITS]}]"


def hash_pixels(pixels: np.ndarray) -> bytes:
    """blake2b-128 over (width, height, RGB bytes)."""
    height, width, _ = pixels.shape
    digest = blake2b(struct.pack("<II", width, height), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
