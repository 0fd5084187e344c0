"""Batches hold every sequence once, within the budget, the longest first."""

import random

import pytest

from pipeline.packing import token_budget_batches


def test_batches_by_hand():
    # Sorted 7, 5, 3, 2, 1 with budget 10: [7]; [5, 3] is 5 * 2 = 10; [2, 1] is 2 * 2 = 4.
    assert token_budget_batches([3, 7, 1, 5, 2], 10) == [[1], [3, 0], [4, 2]]


def test_equal_lengths_keep_their_order():
    assert token_budget_batches([4, 4, 4], 8) == [[0, 1], [2]]


def test_a_length_above_the_budget_is_alone():
    assert token_budget_batches([3, 99, 3], 10) == [[1], [0, 2]]


def test_nothing_makes_no_batches():
    assert token_budget_batches([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_index_once_within_the_budget_and_longest_first(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))]
    budget = rng.randint(1, 300)
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    # No batch could have taken the first of the next.
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget
