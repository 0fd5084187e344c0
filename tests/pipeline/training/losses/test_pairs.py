"""The DPO family is its papers' formulas; test_losses_trl.py has its equality with TRL."""

import math

import pytest
import torch

from prefcache.pipeline.training.losses import LOSSES
from prefcache.pipeline.training.losses.pairs import aot, discopop, exo_pair, hinge, ipo, sft, sigmoid, sppo_hard
from tests.helpers.losses import LENGTHS, LOGPS, call, columns_of, gradients, random_columns, statistics, t

ZERO = t(0.0)


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def lost(x):
    """-log s(x)"""
    return math.log1p(math.exp(-abs(x))) + max(0.0, -x)


# The papers' formulas, pair by pair, in Python's float64: a is the log-ratio of an answer, n its tokens.
PLAIN = {
    "sigmoid": lambda aw, al, nw, nl, beta, e: (1 - e) * lost(beta * (aw - al)) + e * lost(beta * (al - aw)),
    "sigmoid_norm": lambda aw, al, nw, nl, beta: lost(beta * (aw / nw - al / nl)),
    "hinge": lambda aw, al, nw, nl, beta: max(0.0, 1 - beta * (aw - al)),
    "ipo": lambda aw, al, nw, nl, beta: (aw / nw - al / nl - 1 / (2 * beta)) ** 2,
    "nca_pair": lambda aw, al, nw, nl, beta: lost(beta * aw) + (lost(-beta * aw) + lost(-beta * al)) / 2,
    "robust": lambda aw, al, nw, nl, beta, e: (
        ((1 - e) * lost(beta * (aw - al)) - e * lost(beta * (al - aw))) / (1 - 2 * e)
    ),
    "bco_pair": lambda aw, al, nw, nl, beta: lost(beta * aw) + lost(-beta * al),
    "sppo_hard": lambda aw, al, nw, nl, beta: (aw - 0.5 / beta) ** 2 + (al + 0.5 / beta) ** 2,
    "apo_zero": lambda aw, al, nw, nl, beta: 1 - logistic(beta * aw) + logistic(beta * al),
    "apo_down": lambda aw, al, nw, nl, beta: logistic(beta * aw) + 1 - logistic(beta * (aw - al)),
    "discopop": lambda aw, al, nw, nl, beta, tau: (
        (1 - logistic(beta * (aw - al) / tau)) * lost(beta * (aw - al))
        + logistic(beta * (aw - al) / tau) * math.exp(min(700.0, -beta * (aw - al)))
    ),
    "exo_pair": lambda aw, al, nw, nl, beta, e: (
        logistic(beta * (aw - al)) * (-lost(beta * (aw - al)) - math.log(1 - e))
        + logistic(beta * (al - aw)) * (-lost(beta * (al - aw)) - math.log(e))
    ),
}
# Generators' derivatives f'(t), of t = policy / reference.
GENERATORS = {
    "reverse_kl": lambda t: math.log(t) + 1,
    "forward_kl": lambda t: -1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t**-0.7 - 1) / -0.7,  # f_alpha = 0.3
}


def rows(columns):
    for c, r, rc, rr, nw, nl in zip(*(columns[name].tolist() for name in (*LOGPS, *LENGTHS)), strict=True):
        yield c - rc, r - rr, nw, nl


@pytest.mark.parametrize("beta", [0.05, 0.7])
@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_is_its_papers_formula(name, beta):
    more = {"discopop": {"tau": 0.3}, "sigmoid": {"label_smoothing": 0.1}}.get(name, {})
    more |= {"label_smoothing": 0.2} if name in ("robust", "exo_pair") else {}
    columns = random_columns()
    expected = [PLAIN[name](*row, beta, *more.values()) for row in rows(columns)]
    assert call(name, columns, beta=beta, **more).tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)
    assert len(set(expected)) > 5


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "f_divergence" in loss.hyperparameters])
def test_a_divergences_generator_takes_the_place_of_the_log_ratio(name, divergence):
    columns = random_columns()
    if name in ("ipo", "sigmoid_norm"):  # there, constants cancel only between answers of one length
        columns["n_rejected_counted"] = columns["n_chosen_counted"]
    generator, defaults = GENERATORS[divergence], LOSSES[name].hyperparameters
    more = [value for key, value in defaults.items() if key in ("label_smoothing", "tau")]
    expected = [
        PLAIN[name](generator(math.exp(aw)), generator(math.exp(al)), nw, nl, 0.05, *more)
        for aw, al, nw, nl in rows(columns)
    ]
    found = call(name, columns, beta=0.05, f_divergence=divergence, f_alpha=0.3)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_aot_pairs_margins_by_rank():
    # margins of the policy 5, 1, 3 against the reference's 2, 4, 0, both sorted: 1 - 0, 3 - 2, 5 - 4
    found = aot(t(5, 1, 3), t(0, 0, 0), t(2, 4, 0), t(0, 0, 0), beta=1.0)
    assert found.tolist() == pytest.approx([lost(1)] * 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_logistic_loss_of_sorted_differences(name, smoothing):
    columns = random_columns()
    c, r, rc, rr = (columns[column].tolist() for column in LOGPS)
    if name == "aot":
        above, below = (sorted(a - b for a, b in zip(*each, strict=True)) for each in ((c, r), (rc, rr)))
    else:
        above, below = (sorted(a - b for a, b in zip(*each, strict=True)) for each in ((c, rc), (r, rr)))
    margins = [0.2 * (a - b) for a, b in zip(above, below, strict=True)]
    expected = sum((1 - smoothing) * lost(m) + smoothing * lost(-m) for m in margins)
    assert call(name, columns, beta=0.2, label_smoothing=smoothing).sum().item() == pytest.approx(expected)


# -- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # (1 / (2 * 0.1))^2
        ("exo_pair", -math.log(2) - math.log(0.001 * 0.999) / 2),
        ("nca_pair", 2 * math.log(2)),
        ("robust", math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("sppo_hard", 50.0),  # 5^2 + 5^2
        ("aot_unpaired", math.log(2)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", math.log(2) / 2 + 1 / 2),
        ("kto_pair", 0.5),
    ],
)
def test_where_policy_and_reference_agree(name, expected):
    columns = random_columns(5)
    columns |= {"chosen_logp": columns["ref_chosen_logp"], "rejected_logp": columns["ref_rejected_logp"]}
    assert call(name, columns, beta=0.1).tolist() == pytest.approx([expected] * 5, abs=1e-12)


def test_sigmoid_by_hand():
    # margin = 0.5 * ((-2 + 4) - (-5 + 3)) = 2; -log sigmoid(2) = log(1 + e^-2) = 0.126928
    assert sigmoid(t(-2), t(-5), t(-4), t(-3), beta=0.5).item() == pytest.approx(0.126928011, abs=1e-9)


def test_hinge_is_zero_from_a_margin_of_one():
    # margins 0.5 * 1 = 0.5, 0.5 * 2 = 1, 0.5 * 3 = 1.5
    assert hinge(t(1, 2, 3), t(0, 0, 0), t(0, 0, 0), t(0, 0, 0), beta=0.5).tolist() == [0.5, 0, 0]


def test_ipo_is_zero_at_its_target_margin():
    # beta = 0.5 puts the target at 1; per token (-2 + 6) / 2 - (-2 + 5) / 3 = 2 - 1 = 1
    assert ipo(t(-2), t(-2), t(-6), t(-5), t(2), t(3), beta=0.5).item() == 0
    # summed: 4 - 3 = 1
    assert ipo(t(-2), t(-2), t(-6), t(-5), t(2), t(3), beta=0.5, per_token=False).item() == 0


def test_sppo_is_zero_at_its_two_targets():
    # 1 / (2 * 0.25) = 2: chosen at +2, rejected at -2
    assert sppo_hard(t(-3), t(-7), t(-5), t(-5), beta=0.25).item() == 0


def test_exo_is_zero_where_the_policy_agrees_with_the_smoothed_label():
    # s(u) = 1 - e = 0.9 at u = log 9
    assert exo_pair(t(math.log(9)), ZERO, ZERO, ZERO, beta=1.0, label_smoothing=0.1).item() == pytest.approx(
        0, abs=1e-15
    )


def test_sft_is_the_mean_over_all_tokens_of_the_batch():
    # -(-6 - 4) / (1 + 4) = 2, whatever the answers' own means 6 and 1
    assert call("sft", {"chosen_logp": t(-6, -4), "n_chosen_counted": t(1, 4)}).mean().item() == 2
    assert sft(t(-6, -4), t(2.5)).mean().item() == 2


def test_the_gradient_of_sigmoid_is_equation_seven_differentiated():
    # d loss / d chosen = -beta * sigmoid(-margin), and the opposite for rejected. margin = 0.5 * (3 - 1) = 1
    chosen, rejected = gradients("sigmoid", columns_of([(3, 1, 0, 0)]), beta=0.5)
    assert chosen.item() == pytest.approx(-0.5 * logistic(-1), abs=1e-12)
    assert rejected.item() == pytest.approx(0.5 * logistic(-1), abs=1e-12)


@pytest.mark.parametrize("name", [*(name for name in PLAIN if name != "discopop"), "aot", "aot_unpaired", "kto_pair"])
def test_the_sign_of_a_reward_is_the_chosen_answers(name):
    good, bad = (
        call(name, columns_of([(*row, 3, 3)], (*LOGPS, *LENGTHS))) for row in ((-4, -6, -5, -5), (-6, -4, -5, -5))
    )
    assert good < bad


# -- kto_pair, against its formula: TRL has it no more ---------------------------------------------------------------


def test_kto_pair_compares_each_answer_with_the_mean_of_the_other_kind():
    # log-ratios: chosen 1, 3, mean 2; rejected -4, 2, mean -1, which counts as 0
    columns = columns_of([(-4, -9, -5, -5), (-2, -3, -5, -5)])
    found, _ = statistics("kto_pair", columns)
    assert {name: value.item() for name, value in found.items()} == {"chosen_divergence": 2, "rejected_divergence": 0}
    expected = [(1 - logistic(0.1 * aw) + 1 - logistic(0.1 * (2 - al))) / 2 for aw, al in ((1, -4), (3, 2))]
    assert call("kto_pair", columns, beta=0.1).tolist() == pytest.approx(expected)


def test_no_gradient_flows_through_kto_pairs_reference_point():
    # d/dc of (1 - s(0.1 (c - z))) / 2 at a log-ratio of 1 with z = 0
    chosen, _ = gradients("kto_pair", columns_of([(-4, -6, -5, -5)]), beta=0.1)
    assert chosen.item() == pytest.approx(-0.1 * logistic(0.1) * logistic(-0.1) / 2)


# -- limits: what a loss generalises ---------------------------------------------------------------------------------


def same(first, second, **tolerance):
    torch.testing.assert_close(first, second, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "aot_unpaired"])
def test_without_label_noise_there_is_no_smoothing(name):
    columns = random_columns()
    plain = {"robust": "sigmoid"}.get(name, name)
    same(call(name, columns, beta=0.1, label_smoothing=1e-13), call(plain, columns, beta=0.1, label_smoothing=0.0))


def test_label_smoothing_goes_from_dpo_through_indifference_to_its_mirror():
    columns = random_columns()
    mirror = dict(zip(("rejected_logp", "chosen_logp", "ref_rejected_logp", "ref_chosen_logp"), LOGPS, strict=True))
    swapped = {mirror[name]: columns[name] for name in LOGPS}
    same(call("sigmoid", columns, label_smoothing=1.0), call("sigmoid", swapped))
    same(call("sigmoid", columns, label_smoothing=0.5), call("sigmoid", swapped, label_smoothing=0.5))


@pytest.mark.parametrize("name", [name for name in LOSSES if "f_divergence" in LOSSES[name].hyperparameters])
def test_alpha_divergence_goes_from_forward_kl_at_0_to_reverse_kl_at_1(name):
    columns = random_columns()
    at = {alpha: call(name, columns, f_divergence="alpha_divergence", f_alpha=alpha) for alpha in (0.0, 1 - 2e-6, 1.0)}
    same(at[0.0], call(name, columns, f_divergence="forward_kl"))
    same(at[1.0], call(name, columns))
    same(at[1 - 2e-6], at[1.0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["sigmoid", "sigmoid_norm", "nca_pair", "bco_pair", "apo_zero", "apo_down", "kto_pair"]
)
def test_a_vanishing_beta_sees_no_difference(name):
    columns = random_columns()
    equal = columns | {"chosen_logp": columns["ref_chosen_logp"], "rejected_logp": columns["ref_rejected_logp"]}
    same(call(name, columns, beta=1e-14), call(name, equal, beta=1e-14))


def test_of_one_pair_sorting_changes_nothing():
    one = random_columns(1)
    for name in ("aot", "aot_unpaired"):
        same(call(name, one, label_smoothing=0.1), call("sigmoid", one, label_smoothing=0.1))


def test_of_single_tokens_a_mean_is_a_sum():
    columns = random_columns() | {
        "n_chosen_counted": torch.ones(30).double(),
        "n_rejected_counted": torch.ones(30).double(),
    }
    same(call("sigmoid_norm", columns, beta=0.1), call("sigmoid", columns, beta=0.1))
    same(call("ipo", columns), call("ipo", columns, per_token=False))


def test_discopop_is_logistic_far_below_and_exponential_far_above():
    u = t(-3, 3)
    found = discopop(u, 0 * u, 0 * u, 0 * u, beta=1.0)
    assert found.tolist() == pytest.approx([lost(-3), math.exp(-3)], rel=1e-12)


def test_discopop_draws_small_margins_to_one_below_zero():
    # With the paper's tau it falls from a margin of 0.072 on to the right, and to the left down to -0.119.
    u = torch.linspace(-0.3, 0.3, 601, dtype=torch.float64)
    value = discopop(u, 0 * u, 0 * u, 0 * u, beta=1.0)
    turns = [round(u[i].item(), 3) for i in range(1, 600) if (value[i] - value[i - 1]) * (value[i + 1] - value[i]) < 0]
    assert turns == [-0.119, 0.072]


# -- extremes --------------------------------------------------------------------------------------------------------


def test_a_hopeless_pair_costs_its_margin():
    # -log sigmoid(-20000) = 20000 + log(1 + e^-20000) = 20000
    assert sigmoid(t(-1e4), t(1e4), ZERO, ZERO, beta=1.0).item() == 20000
    assert discopop(t(-1e4), t(1e4), ZERO, ZERO, beta=1.0).item() == 20000


def test_exponents_are_cut_at_80():
    # f' = 1 - e^100 counts as 1 - e^80, and -log s(-0.1 e^80) is 0.1 e^80
    found = sigmoid(t(-100), ZERO, ZERO, ZERO, f_divergence="forward_kl").item()
    assert found == pytest.approx(0.1 * math.exp(80), rel=1e-12)


def test_equal_margins_get_gradients_of_one_size():
    chosen, rejected = gradients("aot", columns_of([(-2, -5, -4, -4)] * 3), beta=0.1)
    assert len(set(chosen.tolist())) == len(set(rejected.tolist())) == 1
