"""A key is a hash of exactly the tokens scored and of where the answer begins."""

import hashlib

import numpy as np
import pytest

from prefcache.pipeline.schema import (
    ANSWERS,
    PREPARED,
    TokenSequence,
    image_id,
    key_of_bytes,
    keys_of_prefixes,
    sequence_key,
)


def test_key_is_blake2b_128_of_version_boundary_and_ids():
    # Version 1, 2 prompt ids, then the ids 1, 258 | 3, each as a little-endian int32; 258 = 1 * 256 + 2.
    raw = b"\x01\0\0\0" + b"\x02\0\0\0" + b"\x01\0\0\0" + b"\x02\x01\0\0" + b"\x03\0\0\0"
    key = sequence_key([1, 258], [3])
    assert key == hashlib.blake2b(raw, digest_size=16).digest()
    # Written down, so that no library and no refactoring changes the name of a cached row.
    assert key.hex() == "5cb266fb45a4537edba45229f79f62bd"


def test_key_with_images_has_their_ids_between_prompt_and_answer():
    # Version 2, 1 prompt id, the id 1, 2 images with their ids of 16 bytes, then the answer's id 3.
    images = (bytes(range(16)), b"\xff" * 16)
    raw = b"\x02\0\0\0" + b"\x01\0\0\0" + b"\x01\0\0\0" + b"\x02\0\0\0" + b"".join(images) + b"\x03\0\0\0"
    key = sequence_key([1], [3], images)
    assert key == hashlib.blake2b(raw, digest_size=16).digest()
    assert key == TokenSequence(np.array([1]), np.array([3]), images=images).key()
    assert key.hex() == "fac4ba8c88faa255e3e1a27c94e65d85"
    # Another order, another number or none is another key; none is the key that a prompt of text alone always had.
    assert len({sequence_key([1], [3], each) for each in (images, images[::-1], images[:1], ())}) == 4
    assert sequence_key([1], [3], ()) == sequence_key([1], [3])


def test_an_image_id_tells_pixels_processors_and_companions_apart():
    pixels, processor = b"p" * 16, b"q" * 16
    # blake2b-128 over the pixels' hash, the processor's id and a byte for whether it is one of several.
    assert image_id(pixels, processor) == hashlib.blake2b(pixels + processor + b"\0", digest_size=16).digest()
    others = [image_id(processor, pixels), image_id(pixels, pixels), image_id(pixels, processor, one_of_several=True)]
    assert len({image_id(pixels, processor), *others}) == 4


def test_prefixes_of_an_answer_to_an_image_have_the_keys_of_such_answers():
    images = (b"i" * 16,)
    prompt, answer = np.arange(3, dtype="<i4"), np.array([5, 6, 7], "<i4")
    keys = keys_of_prefixes(prompt.tobytes(), answer.tobytes(), [1, 3], images)
    assert list(keys) == [sequence_key(prompt, answer[:n], images) for n in (1, 3)]


def test_moving_the_boundary_changes_the_key():
    keys = {sequence_key([1, 2, 3][:n], [1, 2, 3][n:]) for n in range(4)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "other", [([1, 2], [3, 5]), ([1, 9], [3, 4]), ([2, 1], [3, 4]), ([1, 2], [3]), ([1, 2], [3, 4, 0])]
)
def test_another_token_changes_the_key(other):
    assert sequence_key(*other) != sequence_key([1, 2], [3, 4])


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<i8", ">i4", ">i8", "<u4"])
def test_the_dtype_of_the_ids_does_not_change_the_key(dtype):
    prompt, completion = np.array([1, 2], dtype), np.array([30000], dtype)
    assert sequence_key(prompt, completion) == sequence_key([1, 2], [30000])


def test_a_strided_view_has_the_key_of_its_values():
    ids = np.arange(10, dtype=np.int32)
    assert sequence_key(ids[::2], ids[1::2]) == sequence_key([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])


def test_an_id_too_large_for_32_bits_is_refused_not_wrapped():
    # 2**32 + 1 would wrap to 1 and take another sequence's row.
    with pytest.raises(OverflowError):
        sequence_key([2**32 + 1], [2])


def test_a_sequence_counts_both_parts_and_knows_its_key():
    sequence = TokenSequence(np.array([1, 2]), np.array([3]))
    assert sequence.n_tokens == 3
    assert sequence.key() == sequence_key([1, 2], [3])


def test_the_key_of_bytes_is_that_of_their_ids():
    prompt, completion = np.arange(5, dtype="<i4"), np.array([7, -1], "<i4")
    assert key_of_bytes(prompt.tobytes(), completion.tobytes()) == sequence_key(prompt, completion)
    assert key_of_bytes(b"", b"") == sequence_key([], [])


@pytest.mark.parametrize("lengths", [[], [0], [3], [0, 1, 2, 3], [1, 3], [2, 2]])
def test_the_keys_of_prefixes_are_those_of_sequences_that_end_there(lengths):
    prompt, completion = np.arange(5, dtype="<i4"), np.array([7, -1, 9], "<i4")
    found = keys_of_prefixes(prompt.tobytes(), completion.tobytes(), lengths)
    assert list(found) == [sequence_key(prompt, completion[:n]) for n in lengths]


@pytest.mark.parametrize("kind", PREPARED)
def test_every_answer_has_its_ids_their_number_and_a_key(kind):
    for answer in ANSWERS[kind]:
        assert {f"{answer}_ids", f"{answer}_cut_ids", f"{answer}_key", f"n_{answer}"} <= set(PREPARED[kind].names)
