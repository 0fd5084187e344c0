"""Losses with targets are their papers' formulas, in value and gradient, at any size of log-prob, length or grade."""

import math

import pytest
import torch

from prefcache.pipeline.training.losses import LOSSES
from tests.helpers.losses import (
    GRADES,
    LENGTHS,
    LOGPS,
    call,
    columns_of,
    extreme_columns,
    gradients,
    has_the_gradient_of_its_values,
    is_finite,
    random_columns,
    statistics,
    t,
)

TARGETS = ("dpop", "rpo", "odpo", "r_dpo", "cal_dpo", "alpha_dpo")
FORMS = [
    *((name, {}) for name in TARGETS),
    ("rpo", {"distance": "squared"}),
    ("rpo", {"distance": "forward"}),
    ("odpo", {"offset": "difference"}),
]


def logistic(x):
    return 1 / (1 + math.exp(-x))


# The papers' formulas, pair by pair: log-probs of policy and reference, lengths, grades.
def smaug_eq3(c, r, rc, rr, nc, nr, gc, gr, beta, penalty):
    dropped = max(0.0, rc - c)
    return -math.log(logistic(beta * ((c - rc) - (r - rr) - penalty * dropped)))


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def reward_aware(c, r, rc, rr, nc, nr, gc, gr, beta, eta, distance):
    margin, target = beta * ((c - rc) - (r - rr)), eta * (gc - gr)
    if distance == "squared":
        return (margin - target) ** 2
    if distance == "backward":
        return bernoulli_kl(logistic(target), logistic(margin))
    return bernoulli_kl(logistic(margin), logistic(target))


def with_offset(c, r, rc, rr, nc, nr, gc, gr, beta, alpha, offset):
    asked = math.log(max(gc - gr, 1e-6)) if offset == "log" else gc - gr
    return -math.log(logistic(beta * (c - rc) - beta * (r - rr) - alpha * asked))


def length_regularised(c, r, rc, rr, nc, nr, gc, gr, beta, alpha):
    return -math.log(logistic(beta * (c - rc) - beta * (r - rr) + (alpha * nc - alpha * nr)))


def calibrated(c, r, rc, rr, nc, nr, gc, gr, beta):
    reward_c, reward_r = c - rc, r - rr
    return -math.log(logistic(reward_c - reward_r)) + (reward_c - 1 / 2 / beta) ** 2 + (reward_r + 1 / 2 / beta) ** 2


@pytest.mark.parametrize(
    ("name", "formula", "hyper"),
    [
        ("dpop", smaug_eq3, {"beta": 0.3, "penalty": 0.5}),
        ("rpo", reward_aware, {"beta": 0.1, "eta": 0.7, "distance": "squared"}),
        ("rpo", reward_aware, {"beta": 0.1, "eta": 0.7, "distance": "backward"}),
        ("rpo", reward_aware, {"beta": 0.5, "eta": 1.0, "distance": "forward"}),
        ("odpo", with_offset, {"beta": 0.1, "alpha": 1.0, "offset": "log"}),
        ("odpo", with_offset, {"beta": 0.2, "alpha": 0.5, "offset": "difference"}),
        ("r_dpo", length_regularised, {"beta": 0.1, "alpha": 0.05}),
        ("cal_dpo", calibrated, {"beta": 0.1}),
    ],
)
def test_equals_the_papers_formula(name, formula, hyper):
    columns = random_columns()
    rows = zip(*(columns[column].tolist() for column in (*LOGPS, *LENGTHS, *GRADES)), strict=True)
    expected = t(*(formula(*row, **hyper) for row in rows))
    torch.testing.assert_close(call(name, columns, **hyper), expected, rtol=1e-10, atol=1e-12)


def test_alpha_dpo_equals_the_papers_formula_over_several_steps():
    beta, gamma, alpha, momentum = 2.5, 1.5, 0.5, 0.9
    memory, mean, std = None, None, None
    for step in range(4):
        columns = random_columns(seed=step)
        rows = list(zip(*(columns[column].tolist() for column in (*LOGPS, *LENGTHS)), strict=True))
        margins = [(c - rc) / nc - (r - rr) / nr for c, r, rc, rr, nc, nr in rows]
        of_batch = sum(margins) / len(margins)
        deviation = math.sqrt(sum((margin - of_batch) ** 2 for margin in margins) / (len(margins) - 1))
        mean = of_batch if mean is None else momentum * mean + (1 - momentum) * of_batch
        std = deviation if std is None else momentum * std + (1 - momentum) * deviation
        expected = [
            -math.log(logistic(beta * (c / nc - r / nr) - (gamma + alpha * (margin - mean) / std)))
            for (c, r, _, _, nc, nr), margin in zip(rows, margins, strict=True)
        ]
        torch.testing.assert_close(call("alpha_dpo", columns, memory), t(*expected), rtol=1e-9, atol=1e-12)
        memory = statistics("alpha_dpo", columns, memory)[1]


@pytest.mark.parametrize(("name", "hyper"), FORMS)
def test_gradient_is_that_of_the_values(name, hyper):
    assert has_the_gradient_of_its_values(name, random_columns(), **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "limit", "factor"),
    [
        ("dpop", {"beta": 0.1, "penalty": 0.0}, ("sigmoid", {"beta": 0.1}), 1),
        ("odpo", {"beta": 0.1, "alpha": 0.0}, ("sigmoid", {"beta": 0.1}), 1),
        ("odpo", {"beta": 0.1, "alpha": 0.0, "offset": "difference"}, ("sigmoid", {"beta": 0.1}), 1),
        ("r_dpo", {"beta": 0.1, "alpha": 0.0}, ("sigmoid", {"beta": 0.1}), 1),
        ("alpha_dpo", {"beta": 2.0, "gamma": 1.0, "alpha": 0.0}, ("simpo", {"beta": 2.0, "gamma": 1.0}), 1),
        # Grades that differ by 1 and an eta of 1/2: (beta m - 1/2)^2 = beta^2 (m - 1 / (2 beta))^2.
        ("rpo", {"beta": 0.1, "eta": 0.5, "distance": "squared"}, ("ipo", {"beta": 0.1, "per_token": False}), 0.01),
        # A sure win has the target s(1000) = 1, which leaves the logarithm of the policy's own choice.
        ("rpo", {"beta": 0.1, "eta": 1000.0, "distance": "backward"}, ("sigmoid", {"beta": 0.1}), 1),
    ],
)
def test_becomes_the_loss_that_it_extends(name, hyper, limit, factor):
    columns = random_columns() | {"chosen_score": torch.ones(30).double(), "rejected_score": torch.zeros(30).double()}
    torch.testing.assert_close(call(name, columns, **hyper), factor * call(limit[0], columns, **limit[1]))


def test_cal_dpo_is_sppo_hard_and_a_logistic_term_without_beta():
    columns = random_columns()
    expected = call("sppo_hard", columns, beta=0.2) + call("sigmoid", columns, beta=1.0)
    torch.testing.assert_close(call("cal_dpo", columns, beta=0.2), expected)


@pytest.mark.parametrize(
    ("name", "row", "hyper", "logit"),
    [
        # a_w = -1, a_l = -3: 0.5 (-1 + 3 - 2 max(0, 1)) = 0
        ("dpop", (-2, -5, -1, -2, 1, 1, 0, 0), {"beta": 0.5, "penalty": 2.0}, 0.0),
        # a_w = 1, a_l = -3: nothing was lost, 0.5 (1 + 3) = 2
        ("dpop", (-1, -5, -2, -2, 1, 1, 0, 0), {"beta": 0.5, "penalty": 2.0}, 2.0),
        # u = 0.5 (1 + 3) = 2, less log(5 - 4) = 0
        ("odpo", (-1, -5, -2, -2, 1, 1, 5, 4), {"beta": 0.5}, 2.0),
        # u = 2, less 0.5 (5 - 3) = 1
        ("odpo", (-1, -5, -2, -2, 1, 1, 5, 3), {"beta": 0.5, "alpha": 0.5, "offset": "difference"}, 1.0),
        # u = 2; the chosen answer is 10 tokens longer: 2 + 0.1 (30 - 20) = 3
        ("r_dpo", (-1, -5, -2, -2, 30, 20, 0, 0), {"beta": 0.5, "alpha": 0.1}, 3.0),
        # One pair has no spread, so z = 0: 2 (-4 / 4 + 6 / 2) - 1 = 3
        ("alpha_dpo", (-4, -6, -9, -9, 4, 2, 0, 0), {"beta": 2.0, "gamma": 1.0}, 3.0),
    ],
)
def test_by_hand(name, row, hyper, logit):
    columns = columns_of([row], (*LOGPS, *LENGTHS, *GRADES))
    assert call(name, columns, **hyper).item() == pytest.approx(math.log(1 + math.exp(-logit)))


def test_rpo_and_cal_dpo_by_hand():
    # u = 0.5 (1 + 3) = 2, grades 5 and 4: (2 - 1)^2 = 1
    columns = columns_of([(-1, -5, -2, -2, 5, 4)], (*LOGPS, *GRADES))
    assert call("rpo", columns, beta=0.5, distance="squared").item() == pytest.approx(1.0)
    # a_w = 1 = 1 / (2 * 0.5), a_l = -3: (1 - 1)^2 + (-3 + 1)^2 = 4, and log(1 + e^-4)
    assert call("cal_dpo", columns, beta=0.5).item() == pytest.approx(4 + math.log(1 + math.exp(-4)))


@pytest.mark.parametrize("distance", ["squared", "backward", "forward"])
def test_rpo_is_0_without_a_slope_where_margin_and_grades_agree(distance):
    # 0.5 (1 + 3) = 2 = 0.5 (9 - 5)
    columns = columns_of([(-1, -5, -2, -2, 9, 5)], (*LOGPS, *GRADES))
    assert call("rpo", columns, beta=0.5, eta=0.5, distance=distance).item() == pytest.approx(0, abs=1e-12)
    assert all(abs(each.item()) < 1e-12 for each in gradients("rpo", columns, beta=0.5, eta=0.5, distance=distance))


@pytest.mark.parametrize("grades", [(2.0, 2.0), (1.0, 3.0)])
def test_odpo_all_but_leaves_out_pairs_whose_grades_do_not_agree(grades):
    columns = columns_of([(-2, -2, -2, -2, *grades)], (*LOGPS, *GRADES))
    # log s(0 + 13.8): e^-13.8 = 1e-6
    assert call("odpo", columns).item() == pytest.approx(1e-6, rel=1e-3)
    assert all(each.abs().item() < 1e-6 for each in gradients("odpo", columns))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("name", "hyper"), FORMS)
def test_stays_finite_at_any_size(name, hyper, beta):
    assert is_finite(name, extreme_columns(), beta=beta, **hyper)
    same = {column: torch.full((4,), -7.0) for column in LOGPS} | {
        column: torch.ones(4) for column in (*LENGTHS, *GRADES)
    }
    assert is_finite(name, same, beta=beta, **hyper)
    assert is_finite(name, {column: values[:1] for column, values in same.items()}, beta=beta, **hyper)


@pytest.mark.parametrize(("name", "hyper"), FORMS)
def test_keeps_the_type_of_its_columns(name, hyper):
    columns = {column: values.float() for column, values in random_columns().items()}
    single = call(name, columns, **hyper)
    assert single.dtype == torch.float32 and single.shape == (30,)
    torch.testing.assert_close(single.double(), call(name, random_columns(), **hyper), rtol=1e-3, atol=1e-4)


def test_alpha_dpo_does_not_depend_on_the_order_of_examples():
    columns, order = random_columns(), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = {name: values[order] for name, values in columns.items()}
    assert torch.equal(call("alpha_dpo", columns)[order], call("alpha_dpo", shuffled))
    assert statistics("alpha_dpo", columns)[1] == statistics("alpha_dpo", shuffled)[1]


def test_alpha_dpo_has_no_gradient_through_its_margin():
    columns = random_columns()
    columns["chosen_logp"].requires_grad_()
    found, _ = statistics("alpha_dpo", columns)
    assert not found["relative_margin"].requires_grad


def test_an_evaluation_does_not_move_what_alpha_dpo_remembers():
    memory = statistics("alpha_dpo", random_columns(seed=1))[1]
    assert statistics("alpha_dpo", random_columns(seed=2), memory, learning=False)[1] == memory


def test_one_example_says_nothing_of_the_spread():
    memory = statistics("alpha_dpo", random_columns())[1]
    one = {name: values[:1] for name, values in random_columns(seed=2).items()}
    after = statistics("alpha_dpo", one, memory)[1]
    assert after["relative_margin"]["std"] == pytest.approx(memory["relative_margin"]["std"])


@pytest.mark.parametrize("name", TARGETS)
def test_says_what_to_expect_of_it(name):
    loss = LOSSES[name]
    assert any(each.direction in ("rises", "falls") for each in loss.healthy)
    assert loss.papers and loss.formula and loss.when and loss.kind == "pairs"
