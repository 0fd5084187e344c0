"""A part names its pictures by their ids and stores each once, as it came."""

from dataclasses import dataclass
from hashlib import blake2b

from prefcache.pipeline.image_processor import Replacement
from prefcache.pipeline.images import decode
from prefcache.pipeline.preparing import part_images
from prefcache.pipeline.preparing.part_images import PartImages
from prefcache.pipeline.stored import artifact
from tests.helpers.illustrated import encode
from tests.helpers.project import entry_of
from tests.helpers.vision_models import picture

A, B, C = (decode(encode(picture(6, 4, seed))) for seed in range(3))


@dataclass
class Processor:
    id: bytes = b"p" * 16
    counts_pictures: bool = False

    def replace(self, picture, *, one_of_several):
        return Replacement("", picture.pixels, n_tokens=picture.width * picture.height // (2 if one_of_several else 1))


def name(shown, *, several: bool = False) -> bytes:
    return blake2b(shown.hash + b"p" * 16 + bytes([several]), digest_size=16).digest()


def test_each_picture_is_written_once_however_often_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(part_images, "_BLOCK_BYTES", len(A.encoded))  # so that there are several blocks
    with PartImages(Processor(), tmp_path / "part.images") as images:
        assert images.add([A, B]) == (name(A), name(B))
        assert images.add([]) == ()
        assert images.add([B, C, B]) == (name(B), name(C), name(B))
    assert artifact.damage(tmp_path, entry_of(images.entry)) is None
    rows = artifact.open_arrow_stream(tmp_path / "part.images").to_pylist()
    assert [(row["image"], row["pixels"], row["encoded"]) for row in rows] == [
        (name(each), each.hash, each.encoded) for each in (A, B, C)
    ]
    facts = ("width", "height", "format", "one_of_several", "n_tokens")
    assert {tuple(row[name] for name in facts) for row in rows} == {(6, 4, "PNG", False, 24)}


def test_one_of_several_is_another_image_to_a_processor_that_counts(tmp_path):
    with PartImages(Processor(counts_pictures=True), tmp_path / "part.images") as images:
        assert images.add([A]) == (name(A),)
        assert images.add([A, B]) == (name(A, several=True), name(B, several=True))
    rows = artifact.open_arrow_stream(tmp_path / "part.images").to_pylist()
    assert [(row["one_of_several"], row["n_tokens"]) for row in rows] == [(False, 24), (True, 12), (True, 12)]


def test_without_pictures_there_is_no_file(tmp_path):
    with PartImages(None, tmp_path / "part.images") as images:
        assert images.add([]) == ()
    assert images.entry is None and not list(tmp_path.iterdir())


def test_without_a_path_pictures_are_only_named():
    with PartImages(Processor(), None) as images:
        assert images.add([A]) == (name(A),)
    assert images.entry is None
