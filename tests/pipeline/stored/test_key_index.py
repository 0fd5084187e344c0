"""Keys are found as bytes would be: exactly, in any order, however alike they are."""

import random

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.stored.key_index import KeyIndex, concat, read_keys


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
    index = KeyIndex(read_keys([column(keys[:7]), column(keys[7:], 3)]))
    by_key = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    assert len(index) == len(by_key) and index.rank.tolist() == [by_key[key] for key in keys]
    asked = dice.sample(keys, len(keys) // 2) + some_keys(dice, 30, alike)
    places, ranks = index.find(read_keys([column(asked)]))
    found = {int(place): int(rank) for place, rank in zip(places, ranks, strict=True)}
    assert found == {i: by_key[key] for i, key in enumerate(asked) if key in by_key}


def test_an_empty_index_finds_nothing():
    places, ranks = KeyIndex(read_keys([column([])])).find(read_keys([column([b"k" * 16])]))
    assert len(places) == len(ranks) == 0
    assert len(KeyIndex(concat([])).find(concat([]))[0]) == 0


def test_slices_and_nulls_keep_their_places():
    keys = [bytes([i]) * 16 for i in range(9)]
    part = column([*keys[:4], None, *keys[4:]]).slice(2, 5)
    found = read_keys([part])
    assert (found.high[[0, 1, 3, 4]] >> np.uint64(56)).tolist() == [2, 3, 4, 5] and len(found) == 5


def test_keys_ascend_only_where_each_is_larger_than_the_last():
    a, b, c = b"\0" * 15 + b"\1", b"\0" * 7 + b"\1" + b"\0" * 8, b"\xff" * 16
    assert read_keys([column([a, b, c])]).is_ascending()
    for wrong in ([a, c, b], [b, a], [a, a]):
        assert not read_keys([column(wrong)]).is_ascending()
    assert read_keys([column([])]).is_ascending()


def test_every_key_is_compared_with_its_own_neighbour():
    """As (first half, last half): those of the first key say nothing of the others."""

    def ascend(*keys: tuple[int, int]) -> bool:
        return read_keys(
            [column([high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in keys])]
        ).is_ascending()

    assert ascend((1, 5), (2, 1), (2, 2)) and ascend((1, 5), (1, 6), (2, 0))
    assert not ascend((1, 5), (2, 7), (2, 6)) and not ascend((1, 5), (2, 1), (1, 6))


def test_keys_that_share_their_first_half_are_all_found():
    keys = [b"\1" * 8 + bytes([i]) * 8 for i in range(5)]
    places, ranks = KeyIndex(read_keys([column(keys)])).find(read_keys([column(keys[::-1])]))
    assert dict(zip(places.tolist(), ranks.tolist(), strict=True)) == {0: 4, 1: 3, 2: 2, 3: 1, 4: 0}


def test_a_rank_takes_four_bytes():
    """There is one for each key that is wanted, which may be hundreds of millions."""
    assert KeyIndex(read_keys([column(some_keys(random.Random(0), 100, False))])).rank.dtype == np.int32


def test_the_checksum_is_over_all_bytes_in_order():
    a, b = b"a" * 16, b"b" * 16
    sums = {read_keys([column(keys)]).checksum() for keys in ([a, b], [b, a], [a], [])}
    assert len(sums) == 4 and read_keys([column([a]), column([b])]).checksum() in sums
