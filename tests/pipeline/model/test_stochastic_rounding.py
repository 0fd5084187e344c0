"""Rounding at random is right on average, exact where nothing is to round, and the same however a tensor is divided."""

import math

import pytest
import torch

from prefcache.pipeline.model.stochastic_rounding import advance_key, make_key, random_bits, round_stochastically

CPU = torch.device("cpu")
N = 1 << 18


def bits(n: int, key: int) -> torch.Tensor:
    return random_bits(n, torch.tensor(key, dtype=torch.int32), CPU)


def rounded(value: float, key: int) -> torch.Tensor:
    return round_stochastically(torch.full((N,), value), bits(N, key) & 0xFFFF).double()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_between_two_numbers_is_rounded_to_both_and_to_itself_on_average(share, sign):
    # Above 1, numbers of bf16 are 2^-7 apart.
    found = rounded(sign * (1 + share * 2**-7), make_key(3, 1))
    assert set(found.tolist()) == {sign * 1.0, sign * (1 + 2**-7)}
    # The mean of N draws of 0 or 1 deviates by 5 standard deviations in one of two million cases.
    away = float((found.abs().mean() - 1) * 2**7)
    assert away == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / N))


@pytest.mark.parametrize("value", [0.0, -1.5, 2.0**-126, math.inf, -math.inf])
def test_what_bf16_has_stays_what_it_is(value):
    assert set(rounded(value, 5).tolist()) == {value}


def test_what_is_not_a_number_stays_that():
    assert rounded(math.nan, 5).isnan().all()


def test_every_bit_is_set_half_of_the_time_and_on_its_own():
    x = bits(N, make_key(0, 7))
    planes = torch.stack([(x >> i & 1).double() for i in range(32)]) * 2 - 1
    products = planes @ planes.T / N - torch.eye(32, dtype=torch.float64)
    assert planes.mean(1).abs().max() < 5 / math.sqrt(N) and products.abs().max() < 5.5 / math.sqrt(N)


def test_the_bits_of_two_steps_and_of_two_neighbours_have_nothing_in_common():
    one, other = (bits(N, make_key(0, step)).double() / 2**31 for step in (1, 2))
    for a, b in ((one, other), (one[1:], one[:-1]), (one[1:], other[:-1])):
        # Uniform between -1 and 1, with a variance of 1/3.
        assert abs(float((a * b).mean())) * 3 < 5 / math.sqrt(N)


@pytest.mark.parametrize("key", [0, -1, 2**31 - 1, -(2**31)])
def test_a_chunk_is_rounded_as_it_is_in_the_whole(key):
    whole = bits(1000, key)
    for start in (1, 600, 999):
        assert torch.equal(bits(1000 - start, advance_key(key, start)), whole[start:])
    assert advance_key(key, 1 << 40) in range(-(2**31), 2**31)
