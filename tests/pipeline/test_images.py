"""Pictures: the same pixels whatever the file, and no file that costs more than it should."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from prefcache.pipeline import images
from prefcache.pipeline.images import UnusableImage, decode
from tests.helpers.vision_models import picture


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refuse(encoded):
    with pytest.raises(UnusableImage) as caught:
        decode(encoded)
    return caught.value


def png(width, height, depth=8, colour=2, data=b""):
    """A PNG by its specification: signature, IHDR, IDAT, IEND."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# -- the same pixels -------------------------------------------------------------------------------------------------


def test_a_picture_is_its_pixels_whatever_the_container():
    image = picture(7, 5)
    found = [
        decode(encode(image, kind, **options))
        for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}))
    ]
    assert {each.hash for each in found} == {found[0].hash} and len({each.encoded for each in found}) == 3
    assert [each.format for each in found] == ["PNG", "BMP", "WebP"]
    assert (found[0].width, found[0].height) == (7, 5)
    assert np.array_equal(found[0].pixels, np.asarray(image))


def test_another_pixel_or_shape_is_another_picture():
    image, shape = picture(6, 4), picture(6, 4).tobytes()
    other = image.copy()
    other.putpixel((0, 0), (1, 2, 3))
    turned = Image.frombytes("RGB", (4, 6), shape)
    assert len({decode(encode(each)).hash for each in (image, other, turned)}) == 3


def test_the_hash_is_blake2b_over_size_and_rgb():
    from hashlib import blake2b

    image = picture(3, 2)
    assert decode(encode(image)).hash == blake2b(struct.pack("<II", 3, 2) + image.tobytes(), digest_size=16).digest()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    image = picture(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert np.array_equal(decode(encoded).pixels, np.asarray(expected))
    assert (orientation == 1) == np.array_equal(decode(encoded).pixels, np.asarray(image))


def test_transparency_is_put_onto_white():
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 102))  # 102 / 255 = 0.4, so 0.6 of white remains
    assert decode(encode(clear)).pixels.tolist() == [[[255, 255, 255]]]
    assert decode(encode(half)).pixels.tolist() == [[[153, 153, 153]]]
    for mode in ("LA", "P"):
        assert decode(encode(clear.convert(mode))).pixels.tolist() == [[[255, 255, 255]]], mode
    gif = Image.new("P", (1, 1), 0)
    gif.putpalette([10, 20, 30])
    assert decode(encode(gif, "GIF", transparency=0)).pixels.tolist() == [[[255, 255, 255]]]
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))).pixels.tolist() == [[[255] * 3]]


def test_palette_grey_one_bit_and_cmyk_become_rgb():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.putpixel((1, 0), 1)
    assert decode(encode(image)).pixels.tolist() == [[[9, 8, 7], [1, 2, 3]]]
    assert decode(encode(Image.new("L", (1, 1), 77))).pixels.tolist() == [[[77, 77, 77]]]
    assert decode(encode(Image.new("1", (1, 1), 1))).pixels.tolist() == [[[255, 255, 255]]]
    cmyk = decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)).pixels
    assert np.abs(cmyk.astype(int) - [255, 0, 0]).max() <= 3  # no cyan, all magenta and yellow: red


def test_the_first_picture_of_a_camera_s_jpeg_is_used():
    first, second = picture(8, 8, 1), picture(8, 8, 2)
    encoded = encode(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert decode(encoded).format == "JPEG"
    assert np.array_equal(decode(encoded).pixels, np.asarray(Image.open(io.BytesIO(encode(first, "JPEG", quality=95)))))


def test_pixels_are_decoded_again_once_others_took_their_place(monkeypatch):
    monkeypatch.setattr(images, "_RECENT_BYTES", 3 * 7 * 5)
    first = decode(encode(picture(7, 5, 1)))
    decode(encode(picture(7, 5, 2)))
    assert images._recent.find(first.hash) is None
    assert images.hash_pixels(first.pixels) == first.hash


# -- files that are refused ------------------------------------------------------------------------------------------


def test_text_and_other_formats_are_named():
    tiff = encode(picture(4, 4), "TIFF")
    avif = b"\0\0\0\x20ftypavif" + bytes(40)
    for encoded, found in (
        (b"", "found no bytes"),
        (b"hello", "found another one"),
        (tiff, "found TIFF"),
        (avif, "found AVIF"),
        (b"<html>404", "found HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a pointer of Git LFS"),
    ):
        error = refuse(encoded)
        assert (error.reason, error.detail) == (
            "unknown image format",
            f"{found}; expected PNG, JPEG, WebP, GIF or BMP",
        )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_broken(kind):
    encoded = encode(picture(40, 40), kind)
    for n in (len(encoded) // 2, len(encoded) * 9 // 10):
        assert refuse(encoded[:n]).reason == "broken image", n
        assert refuse(encoded[:n]).detail.startswith("damaged or cut off ("), n


def test_animations_are_refused():
    frames = [picture(4, 4, seed) for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        error = refuse(encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100))
        assert error.reason == "animated image", kind


def test_more_than_8_bits_per_channel_are_refused():
    grey = encode(Image.fromarray(np.full((2, 2), 40_000, np.uint16)))
    colour = png(1, 1, depth=16, colour=2, data=bytes(7))
    for encoded in (grey, colour):
        assert refuse(encoded).reason == "more than 8 bits per channel"


def test_a_bomb_is_refused_by_its_header():
    start = time.monotonic()
    for size in ((20_000, 20_000), (1 << 30, 1 << 30), (images.MOST_PIXELS + 1, 1)):
        assert refuse(png(*size)).reason == "image too large"
    bmp = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    assert refuse(bmp).reason == "image too large"
    assert time.monotonic() - start < 1
    error = refuse(png(9_000, 9_000))
    assert (error.n_found, error.n_limit) == (81_000_000, images.MOST_PIXELS)


def test_no_pixels_are_no_picture():
    for size in ((0, 4), (4, 0), (0, 0)):
        assert refuse(png(*size)).reason == "broken image"


def test_a_file_beyond_the_limit_is_not_decoded(monkeypatch):
    encoded = encode(picture(40, 40))
    monkeypatch.setattr(images, "MOST_BYTES", len(encoded) - 1)
    error = refuse(encoded)
    assert (error.reason, error.n_found, error.n_limit) == ("image too large", len(encoded), len(encoded) - 1)


def test_a_jpeg_of_countless_scans_is_refused():
    """Each scan passes over all pixels: some kilobytes would take minutes."""
    encoded = encode(picture(16, 16), "JPEG", progressive=True)
    at = encoded.rindex(b"\xff\xda")
    assert decode(encoded).width == 16
    assert refuse(encoded[:at] + encoded[at:-2] * 200 + encoded[-2:]).reason == "image takes too much"


def test_no_damage_raises_anything_else():
    random = np.random.default_rng(0)
    outcomes = set()
    for kind, options in (("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}), ("BMP", {})):
        exif = {"exif": Image.Exif()} if kind in ("PNG", "JPEG", "WEBP") else {}
        if exif:
            exif["exif"][0x0112] = 6
        whole = encode(picture(30, 20), kind, **options, **exif)
        for _ in range(150):
            damaged = bytearray(whole)
            for at in random.integers(0, len(damaged), random.integers(1, 6)):
                damaged[at] = random.integers(0, 256)
            try:
                outcomes.add(decode(bytes(damaged)).format)
            except UnusableImage as error:
                outcomes.add(error.reason)
    assert {"broken image", "PNG", "JPEG"} <= outcomes
