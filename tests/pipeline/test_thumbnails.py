"""Thumbnails: small, in proportion, encoded anew, and none of what no longer decodes."""

import io

import numpy as np
import pytest
from PIL import Image

from prefcache.pipeline.images import decode
from prefcache.pipeline.thumbnails import LONGEST, fit, make_thumbnail, split_at_tags
from tests.helpers.illustrated import encode
from tests.helpers.vision_models import picture


@pytest.mark.parametrize(
    ("size", "expected"),
    # The longer side becomes 240; a small picture stays; a side never vanishes.
    [((640, 480), (240, 180)), ((480, 640), (180, 240)), ((30, 20), (30, 20)), ((5000, 4), (240, 1))],
)
def test_a_thumbnail_has_the_size_that_pages_reserve_for_it(size, expected):
    thumbnail = make_thumbnail(encode(Image.new("RGB", size, "red")))
    assert (thumbnail.width, thumbnail.height) == fit(*size) == expected
    with Image.open(io.BytesIO(thumbnail.jpeg)) as image:
        assert (image.format, image.size) == ("JPEG", expected)


def test_even_noise_makes_a_small_file():
    encoded = encode(picture(1200, 900))
    assert len(encoded) > 3_000_000
    assert len(make_thumbnail(encoded).jpeg) < 60_000


def test_a_thumbnail_shows_the_picture_as_the_model_sees_it():
    # Left half transparent, which is put onto white; the right half green.
    image = Image.new("RGBA", (480, 480), (0, 0, 0, 0))
    image.paste((0, 128, 0, 255), (240, 0, 480, 480))
    with Image.open(io.BytesIO(make_thumbnail(encode(image)).jpeg)) as shown:
        pixels = np.asarray(shown).astype(int)
    assert abs(pixels[120, 30] - 255).max() < 4 and abs(pixels[120, 210] - (0, 128, 0)).max() < 4


def test_nothing_of_the_file_but_its_pixels_is_kept():
    file = io.BytesIO()
    image = picture(64, 64)
    exif = image.getexif()
    exif[0x010E] = "<script>alert(1)</script>"
    image.save(file, "JPEG", exif=exif, comment=b"<script>alert(2)</script>")
    assert b"<script>" in file.getvalue()
    assert b"<script>" not in make_thumbnail(file.getvalue()).jpeg


@pytest.mark.parametrize("broken", [b"", b"<script>alert(1)</script>", encode(picture(64, 64))[:200]])
def test_what_does_not_decode_has_no_thumbnail(broken):
    assert make_thumbnail(broken) is None


def test_a_text_is_split_at_the_tags_that_pictures_have():
    tag, other = (decode(encode(picture(8, 8, seed))).tag for seed in (1, 2))
    assert list(split_at_tags(f"a{tag}{other}b")) == [("a", tag), ("", other), ("b", "")]
    for text in ("", "why?", "[image 8x8 0123]", "[image 8x8 0123456789AB]"):
        assert list(split_at_tags(text)) == [(text, "")]


def test_an_address_holds_the_picture_itself():
    thumbnail = make_thumbnail(encode(picture(8, 8)))
    assert thumbnail.url.startswith("data:image/jpeg;base64,/9j/")
    assert max(thumbnail.width, thumbnail.height) < LONGEST
