"""Batches hold every sequence once, within the budget, the longest first."""

import random

import numpy as np
import pytest
from models_for_tests import sequence

from pipeline.model.packing import balanced, by_prompt, n_in_row, packed_rows, token_budget_batches
from pipeline.schema import Sequence


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


def answers(n_prompt: int, *n_completions: int) -> list[Sequence]:
    prompt = sequence(n_prompt, 1).prompt_ids
    return [Sequence(prompt, sequence(1, n, seed=i).completion_ids) for i, n in enumerate(n_completions)]


def test_answers_to_one_prompt_are_found_wherever_they_stand():
    first, second = answers(3, 2, 4), answers(5, 1, 1)
    assert by_prompt([first[0], second[0], second[1], first[1]]) == [[0, 3], [1, 2]]


def test_a_row_by_hand():
    # A prompt of 3 with answers of 2 and 4: 3 + 1 + 3 = 7 tokens; one of 5 with two of 1: 5; one of 2 with 3: 4.
    sequences = [*answers(3, 2, 4), *answers(5, 1, 1), *answers(2, 3)]
    groups = by_prompt(sequences)
    assert [n_in_row(sequences, group) for group in groups] == [7, 5, 4]
    # Budget 9: 7 alone, for 5 more is 12; then 5 and 4.
    assert packed_rows(sequences, groups, 9) == [[[1, 0]], [[2, 3], [4]]]


def test_a_group_above_the_budget_is_cut_and_its_prompt_repeated():
    # Prompt 4, answers of 5, 4, 3 take 4, 3, 2: with budget 9 the first is 4 + 4, and 4 + 3 + 2 are the others.
    sequences = answers(4, 3, 5, 4)
    assert packed_rows(sequences, [[0, 1, 2]], 9) == [[[2, 0]], [[1]]]


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sequence_once_within_the_budget(seed):
    rng = random.Random(seed)
    sequences = [
        each
        for n in range(rng.randint(1, 20))
        for each in answers(rng.randint(1, 30) + 31 * n, *(rng.randint(1, 20) for _ in range(rng.randint(1, 5))))
    ]
    budget = rng.randint(5, 200)
    rows = packed_rows(sequences, by_prompt(sequences), budget)
    assert sorted(i for row in rows for group in row for i in group) == list(range(len(sequences)))
    for row in rows:
        n_tokens = sum(n_in_row(sequences, group) for group in row)
        assert n_tokens <= budget or [len(group) for group in row] == [1]


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 1000])
def test_balanced_parts_hold_everything_once_within_the_budget(budget):
    sizes = [int(n) for n in np.random.default_rng(0).integers(1, 20, 50)]
    parts = balanced(sizes, budget)
    assert sorted(i for part in parts for i in part) == list(range(50))
    assert all(len(part) == 1 or sum(sizes[i] for i in part) <= budget for part in parts)


def test_balanced_parts_are_of_one_size():
    # 9 + 5 + 4 + 3 + 3 = 24 tokens in rows of 12: 9 + 3 and 5 + 4 + 3, not 9, 5 + 4 + 3 and 3.
    assert sorted(
        sorted(9 if i == 0 else [5, 4, 3, 3][i - 1] for i in part) for part in balanced([9, 5, 4, 3, 3], 12)
    ) == [
        [3, 4, 5],
        [3, 9],
    ]


def test_nothing_makes_no_parts():
    assert balanced([], 10) == []
