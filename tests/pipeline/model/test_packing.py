"""Batches hold every sequence once, within the budget, the longest first."""

import random

import numpy as np
import pytest

from prefcache.pipeline.model.packing import (
    balanced_batches,
    group_by_prompt,
    pack_rows,
    row_tokens,
    token_budget_batches,
)
from prefcache.pipeline.schema import TokenSequence
from tests.helpers.models import TREE_TOKENS, answers, tree


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [
        # Sorted 7, 5, 3, 2, 1: [7]; [5, 3] is 5 * 2 = 10; [2, 1] is 2 * 2 = 4.
        ([3, 7, 1, 5, 2], 10, [[1], [3, 0], [4, 2]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),  # equal lengths keep their order
        ([3, 99, 3], 10, [[1], [0, 2]]),
        ([], 10, []),
    ],
)
def test_batches_by_hand(lengths, budget, batches):
    assert token_budget_batches(lengths, budget) == batches


@pytest.mark.parametrize("seed", range(20))
def test_every_index_once_within_the_budget_and_longest_first(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))]
    budget = rng.randint(1, 300)
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    # No batch could have taken the first of the next.
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    # A prompt of 3 with answers of 2 and 4: 3 + 1 + 3 = 7 tokens; one of 5 with two of 1: 5; one of 2 with 3: 4.
    sequences = [*answers(3, 2, 4), *answers(5, 1, 1), *answers(2, 3)]
    groups = group_by_prompt(sequences)
    assert groups == [[0, 1], [2, 3], [4]] and group_by_prompt([*sequences[1:], sequences[0]])[0] == [0, 4]
    assert [row_tokens(sequences, group) for group in groups] == [7, 5, 4]
    # Budget 9: 7 alone, for 5 more is 12; then 5 and 4.
    assert pack_rows(sequences, groups, 9) == [[[1, 0]], [[2, 3], [4]]]


def test_a_group_above_the_budget_is_cut_where_its_tree_allows_and_what_its_parts_share_is_repeated():
    prompt, ids = [7, 7, 7, 7], ([5, 6, 1, 1, 1], [5, 6, 2], [4, 1, 1], [5, 6, 1, 1])
    sequences = [TokenSequence(np.array(prompt), np.array(answer)) for answer in ids]
    # By ids, descending: 5 6 2 is 4 + 2; 5 6 1 1 1 adds 2 after 5 6, and 5 6 1 1 nothing; 4 1 1 adds 2.
    assert row_tokens(sequences, [0, 1, 2, 3]) == 6 + 2 + 0 + 2
    assert pack_rows(sequences, [[0, 1, 2, 3]], 10) == [[[1, 0, 3, 2]]]
    assert pack_rows(sequences, [[0, 1, 2, 3]], 9) == [[[1, 0, 3]], [[2]]]
    # 5 6 1 1 1 after 5 6 2 would be 8: in a part of its own it is 4 + 4.
    assert pack_rows(sequences, [[0, 1, 2, 3]], 7) == [[[0]], [[3]], [[1]], [[2]]]


def test_the_tokens_of_a_tree():
    assert row_tokens(tree(), range(8)) == TREE_TOKENS
    assert [row_tokens(tree(), [0, 4, 5]), row_tokens(tree(), [3, 0])] == [20 + 13, 20 + 13]


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sequence_once_within_the_budget(seed):
    rng = random.Random(seed)
    sequences = [
        each
        for n in range(rng.randint(1, 20))
        for each in answers(rng.randint(1, 30) + 31 * n, *(rng.randint(1, 20) for _ in range(rng.randint(1, 5))))
    ]
    sequences += tree()
    budget = rng.randint(5, 200)
    rows = pack_rows(sequences, group_by_prompt(sequences), budget)
    assert sorted(i for row in rows for group in row for i in group) == list(range(len(sequences)))
    for row in rows:
        n_tokens = sum(row_tokens(sequences, group) for group in row)
        assert n_tokens <= budget or [len(group) for group in row] == [1]


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 1000])
def test_balanced_batches_hold_everything_once_within_the_budget(budget):
    rng = random.Random(0)
    sizes = [rng.randint(1, 19) for _ in range(50)]
    batches = balanced_batches(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(batch) == 1 or sum(sizes[i] for i in batch) <= budget for batch in batches)


@pytest.mark.parametrize(
    ("sizes", "budget", "batches"),
    [
        # 24 tokens in rows of 12: 9 + 3 and 5 + 4 + 3, not 9, 5 + 4 + 3 and 3.
        ([9, 5, 4, 3, 3], 12, [[3, 4, 5], [3, 9]]),
        # 20 in two would be 12 and 8: three of 6 + 1, 6 + 1 and 6.
        ([6, 6, 6, 1, 1], 11, [[1, 6], [1, 6], [6]]),
        ([3, 4, 3], 10, [[3, 3, 4]]),
        ([], 10, []),
    ],
)
def test_balanced_batches_are_few_and_of_one_size(sizes, budget, batches):
    assert sorted(sorted(sizes[i] for i in batch) for batch in balanced_batches(sizes, budget)) == batches
