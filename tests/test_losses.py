"""Every loss is its paper's formula, value and gradient, at any size of log-prob."""

import inspect
import math

import pytest
import torch

from pipeline import config
from pipeline.errors import UsageError
from pipeline.losses import LOSSES, get_loss, hinge, hyperparameters, ipo, sigmoid

torch.set_num_threads(1)

COLUMNS = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "n_chosen", "n_rejected")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_columns(n: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = {name: -50 * torch.rand(n, generator=generator, dtype=torch.float64) for name in COLUMNS[:4]}
    return columns | {name: torch.randint(1, 40, (n,), generator=generator).double() for name in COLUMNS[4:]}


def call(name: str, columns: dict[str, torch.Tensor], **hyper) -> torch.Tensor:
    loss = LOSSES[name]
    return loss.function(*(columns[column] for column in loss.columns), **hyper)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# The papers' formulas, pair by pair, in Python's float64.
def dpo_eq7(c, r, rc, rr, nc, nr, beta, smoothing=0.0):
    margin = beta * (c - rc) - beta * (r - rr)
    return -(1 - smoothing) * math.log(logistic(margin)) - smoothing * math.log(logistic(-margin))


def rso_eq11(c, r, rc, rr, nc, nr, beta):
    return max(0.0, 1 - (beta * (c - rc) - beta * (r - rr)))


def ipo_eq17(c, r, rc, rr, nc, nr, beta):
    return ((c - rc) - (r - rr) - 1 / (2 * beta)) ** 2


def ipo_per_token(c, r, rc, rr, nc, nr, beta):
    return ((c - rc) / nc - (r - rr) / nr - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize(
    ("name", "formula", "hyper"),
    [
        ("sigmoid", dpo_eq7, {"beta": 0.1}),
        ("sigmoid", dpo_eq7, {"beta": 0.5}),
        (
            "sigmoid",
            lambda *row, **k: dpo_eq7(*row, k["beta"], k["label_smoothing"]),
            {"beta": 0.1, "label_smoothing": 0.2},
        ),
        ("hinge", rso_eq11, {"beta": 0.1}),
        ("hinge", rso_eq11, {"beta": 0.01}),
        ("ipo", ipo_per_token, {"beta": 0.1}),
        ("ipo", lambda *row, **k: ipo_eq17(*row, k["beta"]), {"beta": 0.25, "per_token": False}),
    ],
)
def test_a_loss_is_its_papers_formula(name, formula, hyper):
    columns = random_columns()
    found = call(name, columns, **hyper).tolist()
    rows = zip(*(columns[column].tolist() for column in COLUMNS), strict=True)
    expected = [formula(*row, **hyper) for row in rows]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert len(set(found)) > 5


# -- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # (1 / (2 * 0.1)) ** 2
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


def test_the_sign_of_a_reward_is_the_chosen_answers():
    good, bad = (t(-1), t(-9), t(-5), t(-5)), (t(-9), t(-1), t(-5), t(-5))
    lengths = (t(3), t(3))
    assert sigmoid(*good) < math.log(2) < sigmoid(*bad)
    assert hinge(*good) < 1 < hinge(*bad)
    assert ipo(*good, *lengths) < 25 < ipo(*bad, *lengths)


# -- label smoothing -------------------------------------------------------------------------------------------------


def test_label_smoothing_goes_from_dpo_through_indifference_to_its_mirror():
    columns = random_columns()
    swapped = {
        "chosen_logp": columns["rejected_logp"],
        "rejected_logp": columns["chosen_logp"],
        "ref_chosen_logp": columns["ref_rejected_logp"],
        "ref_rejected_logp": columns["ref_chosen_logp"],
    }
    assert torch.equal(call("sigmoid", columns, label_smoothing=0.0), call("sigmoid", columns))
    torch.testing.assert_close(call("sigmoid", columns, label_smoothing=1.0), call("sigmoid", swapped))
    half = {"label_smoothing": 0.5}
    torch.testing.assert_close(call("sigmoid", columns, **half), call("sigmoid", swapped, **half))


# -- gradients and extremes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_slope_of_the_loss(name):
    columns = random_columns(8)
    for side in ("chosen_logp", "rejected_logp"):
        at = columns[side].clone().requires_grad_()
        call(name, columns | {side: at}, beta=0.03).sum().backward()
        step = 1e-5
        slope = (
            call(name, columns | {side: columns[side] + step}, beta=0.03)
            - call(name, columns | {side: columns[side] - step}, beta=0.03)
        ) / (2 * step)
        torch.testing.assert_close(at.grad, slope, rtol=1e-6, atol=1e-8)
        assert at.grad.abs().max() > 0


def test_the_gradient_of_sigmoid_is_equation_seven_differentiated():
    # d loss / d chosen = -beta * sigmoid(-margin), and the opposite for rejected. margin = 0.5 * (3 - 1) = 1
    chosen, rejected = t(3).requires_grad_(), t(1).requires_grad_()
    sigmoid(chosen, rejected, t(0), t(0), beta=0.5).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * logistic(-1), abs=1e-12)
    assert rejected.grad.item() == pytest.approx(0.5 * logistic(-1), abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_nats_stay_finite(name, dtype):
    for chosen, rejected in ((1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)):
        at = torch.tensor([chosen], dtype=dtype, requires_grad=True)
        zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        columns = dict(zip(COLUMNS, (at, zero + rejected, zero, zero, one, one), strict=True))
        value = call(name, columns, beta=1.0)
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(at.grad).all()


def test_a_hopeless_pair_costs_its_margin():
    # -log sigmoid(-20000) = 20000 + log(1 + e^-20000) = 20000
    assert sigmoid(t(-1e4), t(1e4), t(0), t(0), beta=1.0).item() == 20000


@pytest.mark.parametrize("name", LOSSES)
def test_a_pairs_loss_does_not_depend_on_the_other_pairs(name):
    columns = random_columns(6)
    together = call(name, columns)
    alone = [call(name, {key: values[i : i + 1] for key, values in columns.items()}) for i in range(6)]
    assert together.shape == (6,) and torch.equal(together, torch.cat(alone))


# -- the registry ----------------------------------------------------------------------------------------------------


def test_the_signature_is_the_declaration():
    loss = get_loss("sigmoid")
    assert loss.columns == ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    assert loss.hyperparameters == {"beta": 0.1, "label_smoothing": 0.0}
    assert get_loss("ipo").columns == COLUMNS


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_names_its_paper(name):
    assert "https://arxiv.org/abs/" in inspect.getdoc(LOSSES[name].function)


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"no loss 'sigmiod'. The nearest is sigmoid. Known: hinge, ipo, sigmoid"):
        get_loss("sigmiod")


def test_a_loss_like_no_other_is_refused_with_all_there_are():
    with pytest.raises(UsageError, match=r"no loss 'zzz'\. Known: hinge, ipo, sigmoid"):
        get_loss("zzz")


def test_hyperparameters_are_defaults_then_config_then_beta():
    assert hyperparameters(get_loss("sigmoid"), 0.3, {"label_smoothing": 0.2}) == {"beta": 0.3, "label_smoothing": 0.2}
    assert hyperparameters(get_loss("ipo"), 0.3, {}) == {"beta": 0.3, "per_token": True}


def test_1e_2_is_a_number_although_yaml_1_1_reads_text():
    said = ["model=m", "out=o", "prepare.data=d", "train.loss_args.label_smoothing=1e-2"]
    arguments = hyperparameters(get_loss("sigmoid"), 0.1, config.load(None, said).train.loss_args)
    assert arguments == {"beta": 0.1, "label_smoothing": 0.01}


@pytest.mark.parametrize(
    ("name", "extra", "has"),
    [
        ("sigmoid", {"label_smothing": 0.1}, "label_smoothing"),
        ("ipo", {"label_smoothing": 0.1}, "per_token"),
        ("hinge", {"margin": 1.0}, "none"),
        ("sigmoid", {"beta": 0.2}, "label_smoothing"),  # said as train.beta
    ],
)
def test_a_hyperparameter_that_the_loss_lacks_is_refused(name, extra, has):
    (wrong,) = extra
    with pytest.raises(UsageError, match=f"loss '{name}' has no '{wrong}'; it has: {has}"):
        hyperparameters(get_loss(name), 0.1, extra)


@pytest.mark.parametrize(("name", "extra"), [("sigmoid", {"label_smoothing": "much"}), ("ipo", {"per_token": "maybe"})])
def test_a_hyperparameter_of_another_type_is_refused_by_name(name, extra):
    (wrong,) = extra
    with pytest.raises(UsageError, match=wrong):
        hyperparameters(get_loss(name), 0.1, extra)
