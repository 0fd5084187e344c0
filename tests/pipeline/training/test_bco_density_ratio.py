"""How much likelier a prompt is among desirable answers: above 1 where only they have its words, 1 where nothing tells."""

import math

import numpy as np
import pytest

from prefcache.pipeline.training.bco_density_ratio import density_ratios

# A user of the command would see them.
pytestmark = pytest.mark.filterwarnings("error")


def ratios(prompts, labels):
    return density_ratios([np.array(ids, np.int32) for ids in prompts], np.array(labels, np.float64))


def test_a_word_that_only_desirable_prompts_have_makes_the_ratio_larger_than_one():
    # Word 7 among the desirable, 9 among the undesirable, 1 and 2 among both.
    found = ratios([[1, 2, 7]] * 20 + [[1, 2, 9]] * 20, [1] * 20 + [0] * 20)
    assert (found[:20] > 5).all() and (found[20:] < 0.2).all()
    # The two kinds mirror one another, so their log-ratios do.
    assert found[0] * found[20] == pytest.approx(1, rel=1e-3)
    assert np.ptp(found[:20]) < 1e-9  # one prompt has one ratio


def test_prompts_that_both_kinds_have_alike_have_a_ratio_of_about_one():
    found = ratios([[1, 2], [3, 4]] * 20, [1, 1, 0, 0] * 10)
    assert found == pytest.approx(np.ones(40), abs=1e-4)


def test_a_prompt_of_both_kinds_lies_between_those_of_one():
    prompts = [[1, 7]] * 10 + [[1, 9]] * 10 + [[1, 7, 9]] * 10
    found = ratios(prompts, [1] * 10 + [0] * 10 + [0, 1] * 5)
    assert found[0] > 2 > 1.01 > found[20] > 0.99 > 0.5 > found[10]


def test_one_prompt_word_with_known_odds_has_the_ratio_of_its_shares():
    """Without a penalty the fit would be exact: 30 of 40 desirable prompts have the word and 10 of 40 undesirable ones."""
    prompts = [[5]] * 30 + [[6]] * 10 + [[5]] * 10 + [[6]] * 30
    found = ratios(prompts, [1] * 40 + [0] * 40)
    # (30 / 40) / (10 / 40) = 3 and its inverse, drawn a little towards 1 by the penalty.
    assert found[0] == pytest.approx(3, rel=0.05) and found[0] < 3
    assert found[30] == pytest.approx(1 / 3, rel=0.05) and found[30] > 1 / 3


def test_how_many_there_are_of_each_kind_is_divided_out():
    # Nine desirable for one undesirable, of the same prompts: odds of 9, ratio of 1.
    found = ratios([[1], [2]] * 50, ([1, 1] * 9 + [0, 0]) * 5)
    assert found == pytest.approx(np.ones(100), abs=1e-3)


def test_the_ratio_is_the_minimum_of_the_penalised_logistic_loss():
    """Found again by Newton's method in numpy, on prompts that share words unevenly."""
    prompts = [[1, 2], [1, 3], [2, 3, 4], [4], [1, 4], [2]]
    labels = np.array([1, 1, 0, 0, 0, 1.0])
    x = np.zeros((6, 6))
    for row, ids in enumerate(prompts):
        x[row, ids] = len(ids) ** -0.5
    x[:, 0] = 1  # the intercept, which is not penalised
    penalty = np.diag([0, *[2e-3] * 5])
    w = np.zeros(6)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x / 6 + penalty
        w -= np.linalg.lstsq(hessian, x.T @ (p - labels) / 6 + penalty @ w, rcond=None)[0]
    assert np.log(ratios(prompts, labels)) == pytest.approx(x @ w - math.log(3 / 3), abs=2e-3)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [1], [0], []])
def test_of_one_kind_alone_nothing_is_weighed(labels):
    assert ratios([[i + 1] for i in range(len(labels))], labels).tolist() == [1] * len(labels)


def test_two_prompts_are_told_apart_and_stay_finite():
    found = ratios([[1], [2]], [1, 0])
    assert np.isfinite(found).all() and found[0] > 1 > found[1] > 0


def test_the_same_prompts_have_the_same_ratios_in_any_order_and_however_often_a_word_occurs():
    prompts = [[1, 2, 7], [1, 9], [2, 7, 3], [3, 9, 150_000]]
    first = ratios(prompts, [1, 0, 1, 0])
    assert ratios(prompts, [1, 0, 1, 0]).tolist() == first.tolist()
    order = [2, 0, 3, 1]
    again = ratios([prompts[i][::-1] * 3 for i in order], [1, 1, 0, 0])
    assert again == pytest.approx(first[order], rel=1e-4)
