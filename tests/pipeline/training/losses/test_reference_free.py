"""Losses without a reference are their papers' formulas; test_losses_trl.py has their equality with TRL."""

import math

import pytest
import torch

from prefcache.pipeline.training.losses import LOSSES, reference_free
from prefcache.pipeline.training.losses.reference_free import alphapo, cpo, orpo, simpo, slic
from tests.helpers.losses import LENGTHS, LOGPS, call, gradients, random_columns, t

NAMES = [name for name, loss in LOSSES.items() if loss.function.__module__ == reference_free.__name__]
ONES = torch.ones(30).double()


def lost(x):
    """-log s(x)"""
    return math.log1p(math.exp(-abs(x))) + max(0.0, -x)


def smoothed(x, e):
    return (1 - e) * lost(x) + e * lost(-x)


def bent(p, alpha):
    return (1 - math.exp(p) ** -alpha) / alpha


def log_odds(p):
    return math.log(math.exp(p) / (1 - math.exp(p)))


# p are log-probs, n tokens, m the mean tokens of the batch's chosen answers.
FORMULAS = {
    "simpo": lambda pw, pl, nw, nl, m, beta, gamma, e: smoothed(beta * (pw / nw - pl / nl) - gamma, e),
    "alphapo": lambda pw, pl, nw, nl, m, beta, gamma, alpha, e: smoothed(
        beta * (bent(pw / nw, alpha) - bent(pl / nl, alpha)) - gamma, e
    ),
    "cpo": lambda pw, pl, nw, nl, m, beta, e, nll: smoothed(beta * (pw - pl), e) - nll * pw / m,
    "cpo_hinge": lambda pw, pl, nw, nl, m, beta, nll: max(0.0, 1 - beta * (pw - pl)) - nll * pw / m,
    "cpo_ipo": lambda pw, pl, nw, nl, m, beta, nll: (pw / nw - pl / nl - 1 / (2 * beta)) ** 2 - nll * pw / m,
    "orpo": lambda pw, pl, nw, nl, m, beta: -pw / m + beta * lost(log_odds(pw / nw) - log_odds(pl / nl)),
    "slic": lambda pw, pl, nw, nl, m, delta, nll: max(0.0, delta - pw + pl) - nll * pw,
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("simpo", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}),
        ("simpo", {"beta": 10.0, "gamma": 0.0, "label_smoothing": 0.1}),
        ("alphapo", {"beta": 2.0, "gamma": 1.0, "alpha": 0.25, "label_smoothing": 0.0}),
        ("alphapo", {"beta": 1.0, "gamma": 0.1, "alpha": -0.5, "label_smoothing": 0.2}),
        ("cpo", {"beta": 0.1, "label_smoothing": 0.0, "nll": 1.0}),
        ("cpo", {"beta": 0.3, "label_smoothing": 0.2, "nll": 0.5}),
        ("cpo_hinge", {"beta": 0.1, "nll": 0.5}),
        ("cpo_ipo", {"beta": 0.3, "nll": 0.5}),
        ("orpo", {"beta": 0.1}),
        ("orpo", {"beta": 2.0}),
        ("slic", {"delta": 1.0, "nll": 0.1}),
    ],
)
def test_a_loss_is_its_papers_formula(name, given):
    columns = {column: -values.abs() if column in LOGPS else values for column, values in random_columns().items()}
    mean_n = columns["n_chosen_counted"].mean().item()
    rows = zip(*(columns[column].tolist() for column in (*LOGPS[:2], *LENGTHS)), strict=True)
    expected = [FORMULAS[name](*row, mean_n, *given.values()) for row in rows]
    assert call(name, columns, **given).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert list(given) == list(LOSSES[name].hyperparameters)


def test_all_of_them_are_here():
    assert set(FORMULAS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_is_read(name):
    assert not LOSSES[name].reads_reference


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_simpo_asks_for_its_margin_per_token():
    # 2 * (-4 / 4 - -6 / 2) = 4; with a gamma of 4 that is just enough: -log s(0)
    assert simpo(t(-4), t(-6), t(4), t(2), beta=2.0, gamma=4.0).item() == pytest.approx(math.log(2))


def test_alphapo_by_hand():
    # alpha = 1: 1 - 1/p per token; p = 1/2 and 1/4 give -1 and -3; 2 * 2 - 1 = 3
    found = alphapo(t(-math.log(2)), t(-math.log(4)), t(1), t(1), beta=2.0, gamma=1.0, alpha=1.0)
    assert found.item() == pytest.approx(lost(3))


def test_cpo_is_preference_and_likelihood_of_tokens():
    # margins 0.5 * (-4 + 6) = 1; the batch's chosen answers have 2 tokens on average: 4 / 2
    assert cpo(t(-4), t(-6), t(2), beta=0.5).item() == pytest.approx(lost(1) + 2)


def test_orpo_by_hand():
    # p = 3/4 and 1/4 per token: odds 3 and 1/3, log 9 apart; -log s(log 9) = log(10/9)
    found = orpo(t(math.log(0.75)), t(math.log(0.25)), t(1), t(1), t(1), beta=0.5)
    assert found.item() == pytest.approx(-math.log(0.75) + 0.5 * math.log(10 / 9))


def test_slic_is_zero_beyond_its_margin_but_for_the_likelihood():
    assert slic(t(-3, -3), t(-4.5, -3.5), delta=1.0, nll=0.0).tolist() == [0, 0.5]
    assert slic(t(-3), t(-4.5), delta=1.0, nll=0.1).item() == pytest.approx(0.3)


# -- limits ----------------------------------------------------------------------------------------------------------


def same(first, second, **tolerance):
    torch.testing.assert_close(first, second, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


def test_alphapo_is_simpo_where_alpha_is_0():
    columns = random_columns()
    same(call("alphapo", columns, alpha=0.0), call("simpo", columns))
    same(call("alphapo", columns, alpha=2e-6), call("simpo", columns), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "with_reference", "shared"),
    [
        ("cpo", "sigmoid", {"label_smoothing": 0.1}),
        ("cpo_hinge", "hinge", {}),
        ("cpo_ipo", "ipo", {}),
    ],
)
def test_without_likelihood_cpo_is_dpo_with_a_reference_of_0(name, with_reference, shared):
    columns = random_columns()
    uniform = columns | {column: 0 * columns[column] for column in LOGPS[2:]}
    same(call(name, columns, nll=0.0, beta=0.1, **shared), call(with_reference, uniform, beta=0.1, **shared))


def test_simpo_without_margin_is_sigmoid_norm_with_a_reference_of_0():
    columns = random_columns()
    uniform = columns | {column: 0 * columns[column] for column in LOGPS[2:]}
    same(call("simpo", columns, gamma=0.0), call("sigmoid_norm", uniform, beta=2.0))


def test_orpo_without_odds_is_sft():
    columns = random_columns()
    same(call("orpo", columns, beta=1e-15), call("sft", columns))


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orpo_of_answers_beyond_doubt_counts_them_as_almost_that(dtype):
    # Above -1e-6 per token there is no telling in float32: log odds of 13.8 are as good as it gets.
    columns = {name: values.to(dtype) for name, values in random_columns(1).items()}
    sure, surer = (
        call("orpo", columns | {"chosen_logp": torch.tensor([logp], dtype=dtype)}, beta=1.0)
        + logp / columns["n_chosen_counted"]
        for logp in (0.0, -1e-9)
    )
    assert torch.isfinite(sure) and sure == surer
    assert torch.isfinite(gradients("orpo", columns | {"chosen_logp": 0 * columns["chosen_logp"]})[0]).all()


def test_odds_keep_their_digits_where_an_answer_is_almost_sure_and_almost_impossible():
    # log odds are log p - log(1 - p): of 1 - 1e-5, 11.512915; of e^-50, -50
    for logp, expected in ((math.log1p(-1e-5), math.log((1 - 1e-5) / 1e-5)), (-50.0, -50.0)):
        far = orpo(torch.tensor([-0.6931472]), torch.tensor([logp]), *torch.ones(3, 1), beta=1.0)
        assert far.item() == pytest.approx(0.6931472 + lost(-expected), rel=2e-6)
