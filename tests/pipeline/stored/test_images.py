"""Stored pictures are found by their ids, and files that they were read from are watched."""

import os
import time

import pyarrow as pa
import pytest

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.images import decode
from prefcache.pipeline.schema import IMAGE_FILES, IMAGES
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.images import StoredImages, explain_changed_files
from prefcache.pipeline.stored.records import TableEntry
from tests.helpers.illustrated import encode, id_of, image_row
from tests.helpers.vision_models import picture

PICTURES = [decode(encode(picture(8, 6, seed))) for seed in range(5)]


def commit(folder, name, rows, schema) -> TableEntry:
    data = artifact.arrow_stream(pa.Table.from_pylist(rows, schema=schema))
    return TableEntry(**artifact.commit_file(folder / name, data, rows=len(rows)))


def test_pictures_are_found_by_their_ids_in_any_shard(tmp_path):
    rows = list(map(image_row, PICTURES))
    entries = [commit(tmp_path, f"{n}.arrow", part, IMAGES) for n, part in enumerate((rows[:2], rows[2:]))]
    stored = StoredImages(tmp_path, entries)
    assert len(stored) == 5
    for each in PICTURES:
        image = id_of(each)
        assert image in stored and stored.encoded(image) == each.encoded
        assert (stored.facts(image).tag, stored.facts(image).pixels) == (each.tag, each.hash)
        assert (stored.pixels(image) == each.pixels).all()


def test_an_id_may_end_in_zeros(tmp_path):
    ids = [bytes(16), b"a" * 15 + b"\0", b"a" * 16]
    rows = [image_row(each) | {"image": image} for each, image in zip(PICTURES, ids, strict=False)]
    stored = StoredImages(tmp_path, [commit(tmp_path, "0.arrow", rows, IMAGES)])
    assert [stored.facts(image).pixels for image in ids] == [each.hash for each in PICTURES[:3]]


def test_pictures_of_an_earlier_version_without_their_number_of_tokens_are_read(tmp_path):
    rows = [image_row(each) for each in PICTURES[:2]]
    earlier = IMAGES.remove(IMAGES.get_field_index("n_tokens"))
    entries = [commit(tmp_path, "0.arrow", rows[:1], earlier), commit(tmp_path, "1.arrow", rows[1:], IMAGES)]
    stored = StoredImages(tmp_path, entries)
    assert stored.table["n_tokens"].to_pylist() == [None, rows[1]["n_tokens"]]
    assert (stored.pixels(id_of(PICTURES[0])) == PICTURES[0].pixels).all()


def test_an_unknown_id_says_what_to_do(tmp_path):
    stored = StoredImages(tmp_path, [commit(tmp_path, "0.arrow", [image_row(PICTURES[0])], IMAGES)])
    assert id_of(PICTURES[1]) not in stored and bytes(16) not in StoredImages(tmp_path, [])
    with pytest.raises(IntegrityError, match=f"has no image {id_of(PICTURES[1]).hex()}.* prepare again"):
        stored.encoded(id_of(PICTURES[1]))


def test_a_shard_that_holds_something_else_says_what_to_do(tmp_path):
    entry = commit(tmp_path, "0.arrow", [image_row(PICTURES[0])], IMAGES)
    (tmp_path / "0.arrow").write_bytes(bytes(entry.bytes))
    other = commit(tmp_path, "1.arrow", [], IMAGE_FILES)
    for each in (entry, other):
        with pytest.raises(IntegrityError, match=f"{each.file} cannot be read .* prepare again"):
            len(StoredImages(tmp_path, [each]).table)


def test_other_pixels_than_were_prepared_are_refused(tmp_path):
    row = image_row(PICTURES[0])
    other, broken = row | {"encoded": PICTURES[1].encoded}, row | {"encoded": PICTURES[0].encoded[:40]}
    for rows, found in (([other], "other pixels"), ([broken], "broken image")):
        stored = StoredImages(tmp_path, [commit(tmp_path, "0.arrow", rows, IMAGES)])
        with pytest.raises(IntegrityError, match=f"decodes to {found}"):
            stored.pixels(id_of(PICTURES[0]))


def test_files_that_changed_are_counted_and_one_is_named(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for path, each in zip(paths, PICTURES, strict=False):
        path.write_bytes(each.encoded)
    rows = [{"path": str(path), "n_bytes": path.stat().st_size, "xxh3_128": artifact.checksum(path)} for path in paths]
    rows.append({"path": str(tmp_path / "none.png"), "n_bytes": None, "xxh3_128": None})
    entries = [commit(tmp_path, "files.arrow", rows, IMAGE_FILES)]
    now = time.time_ns()
    assert explain_changed_files(tmp_path, entries, now) is None
    os.utime(paths[0], (2e9, 2e9))  # read again, and the same
    assert explain_changed_files(tmp_path, entries, now) is None
    paths[1].write_bytes(PICTURES[1].encoded[:-1] + b"x")
    assert explain_changed_files(tmp_path, entries, 0) == f"{paths[1]} has changed"
    assert explain_changed_files(tmp_path, entries, time.time_ns() + 10**12) is None  # not touched since
    paths[2].unlink()
    (tmp_path / "none.png").touch()
    assert (
        explain_changed_files(tmp_path, entries, 0)
        == f"3 files of images have changed: {paths[1]} has changed, for one"
    )


def test_a_file_of_another_size_has_changed_whatever_its_times(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"12345")
    row = {"path": str(path), "n_bytes": 4, "xxh3_128": "0" * 32}
    entry = commit(tmp_path, "files.arrow", [row], IMAGE_FILES)
    assert explain_changed_files(tmp_path, [entry], time.time_ns() + 10**12) == f"{path} has changed"
