"""Keys are found as bytes would be: exactly, in any order, however alike they are."""

import random

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stored.keys import KeyIndex, concat, keys_of


def column(keys: list[bytes | None], chunks: int = 1) -> pa.ChunkedArray:
    cut = -(-len(keys) // chunks) or 1
    parts = [pa.array(keys[i : i + cut], pa.binary(16)) for i in range(0, len(keys), cut)]
    return pa.chunked_array(parts, pa.binary(16))


def some_keys(dice: random.Random, n: int, alike: bool) -> list[bytes]:
    # Alike: with the same first eight bytes, or the same last ones, as no hash gives them.
    halves = [dice.randbytes(8) for _ in range(3)] + [b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7]
    half = (lambda: dice.choice(halves)) if alike else (lambda: dice.randbytes(8))
    return [half() + half() for _ in range(n)]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_an_index_is_what_a_dict_would_be(seed, alike):
    dice = random.Random(seed)
    keys = some_keys(dice, dice.randint(1, 60), alike)
    keys += dice.choices(keys, k=dice.randint(0, 20))
    index = KeyIndex(keys_of([column(keys[:7]), column(keys[7:], 3)]))
    by_key = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    assert len(index) == len(by_key) and index.rank.tolist() == [by_key[key] for key in keys]
    asked = dice.sample(keys, len(keys) // 2) + some_keys(dice, 30, alike)
    places, ranks = index.find(keys_of([column(asked)]))
    found = {int(place): int(rank) for place, rank in zip(places, ranks, strict=True)}
    assert found == {i: by_key[key] for i, key in enumerate(asked) if key in by_key}


def test_an_empty_index_finds_nothing():
    places, ranks = KeyIndex(keys_of([column([])])).find(keys_of([column([b"k" * 16])]))
    assert len(places) == len(ranks) == 0
    assert len(KeyIndex(concat([])).find(concat([]))[0]) == 0


def test_slices_and_nulls_keep_their_places():
    keys = [bytes([i]) * 16 for i in range(9)]
    part = column([*keys[:4], None, *keys[4:]]).slice(2, 5)
    found = keys_of([part])
    assert (found.high[[0, 1, 3, 4]] >> np.uint64(56)).tolist() == [2, 3, 4, 5] and len(found) == 5


def test_keys_ascend_only_where_each_is_larger_than_the_last():
    a, b, c = b"\0" * 15 + b"\1", b"\0" * 7 + b"\1" + b"\0" * 8, b"\xff" * 16
    assert keys_of([column([a, b, c])]).ascend()
    for wrong in ([a, c, b], [b, a], [a, a]):
        assert not keys_of([column(wrong)]).ascend()
    assert keys_of([column([])]).ascend()


def test_the_checksum_is_over_all_bytes_in_order():
    a, b = b"a" * 16, b"b" * 16
    sums = {keys_of([column(keys)]).checksum() for keys in ([a, b], [b, a], [a], [])}
    assert len(sums) == 4 and keys_of([column([a]), column([b])]).checksum() in sums
