"""Losses of single answers are their papers' formulas; test_losses_trl.py has the equality with TRL of those that it has."""

import math

import pytest
import torch

from prefcache.pipeline.training.losses import STATISTICS
from prefcache.pipeline.training.losses.labels import apo_zero_unpaired, bco, delta, kl, kto
from tests.helpers.losses import call, random_columns, statistics, t

COLUMNS = ("completion_logp", "ref_completion_logp", "label", "density_ratio")


def logistic(x):
    return 1 / (1 + math.exp(-x))


def kto_eq8(a, label, z, beta, w_d, w_u):
    return w_d * (1 - logistic(beta * (a - z))) if label else w_u * (1 - logistic(beta * (z - a)))


def bco_eq9(a, label, ratio, shift, beta, low, high):
    if label:
        return -math.log(logistic(beta * a - shift))
    return -min(max(ratio, low), high) * math.log(logistic(-(beta * a - shift)))


def rows(columns):
    for logp, ref, label, ratio in zip(*(columns[name].tolist() for name in COLUMNS), strict=True):
        yield logp - ref, label > 0, ratio


@pytest.mark.parametrize(("beta", "w_d", "w_u"), [(0.1, 1.0, 1.0), (0.02, 1.3, 0.5), (0.5, 0.0, 2.0)])
def test_kto_is_its_papers_formula(beta, w_d, w_u):
    columns = random_columns()
    columns |= {"kl_logp": columns["ref_kl_logp"] + 1.5}
    z = max(0.0, (columns["kl_logp"] - columns["ref_kl_logp"]).mean().item())
    assert z == pytest.approx(1.5)
    given = {"beta": beta, "desirable_weight": w_d, "undesirable_weight": w_u}
    expected = [kto_eq8(a, label, z, beta, w_d, w_u) for a, label, _ in rows(columns)]
    assert call("kto", columns, **given).tolist() == pytest.approx(expected, abs=1e-13)
    at_zero = [kto_eq8(a, label, 0, beta, w_d, w_u) for a, label, _ in rows(columns)]
    assert call("apo_zero_unpaired", columns, **given).tolist() == pytest.approx(at_zero, abs=1e-13)


@pytest.mark.parametrize(("low", "high"), [(0.5, 10.0), (0.0, 2.0)])
def test_bco_is_its_papers_formula(low, high):
    columns = random_columns()
    shift = 0.1 * (columns["completion_logp"] - columns["ref_completion_logp"]).mean().item()
    expected = [bco_eq9(a, label, ratio, shift, 0.1, low, high) for a, label, ratio in rows(columns)]
    found = call("bco", columns, min_density_ratio=low, max_density_ratio=high)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_kto_by_hand():
    # z = 1, log-ratios 1 + log(3) / 0.5 and 1 - log(3) / 0.5: s(log 3) = 3/4, so both answers cost 1/4
    beyond = math.log(3) / 0.5
    found = kto(t(1 + beyond, 1 - beyond), t(0, 0), t(1, 0), t(1), beta=0.5)
    assert found.tolist() == pytest.approx([0.25, 0.25])


def test_where_policy_and_reference_agree_every_answer_costs_the_same():
    same = t(-7, -3)
    assert kto(same, same, t(1, 0), t(0)).tolist() == [0.5, 0.5]
    assert apo_zero_unpaired(same, same, t(1, 0)).tolist() == [0.5, 0.5]
    assert bco(same, same, t(1, 0), t(0), t(1, 1)).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_desirable_answers_are_pulled_up_and_undesirable_ones_down(name):
    columns = random_columns() | {"density_ratio": torch.ones(30).double()}
    at = columns["completion_logp"].requires_grad_()
    (slope,) = torch.autograd.grad(call(name, columns).sum(), at)
    assert ((slope < 0) == (columns["label"] > 0)).all()


# -- z ---------------------------------------------------------------------------------------------------------------


def test_z_is_the_mean_log_ratio_of_mismatched_answers_and_never_below_zero():
    assert kl(t(-3, -5), t(-4, -8)).item() == 2  # (1 + 3) / 2
    assert kl(t(-3, -9), t(-4, -8)).item() == 0  # (1 - 1) / 2
    assert kl(t(-6, -9), t(-4, -8)).item() == 0  # cut at 0, not -1.5


def test_examples_without_a_mismatched_answer_do_not_count_in_z():
    nan = float("nan")
    assert kl(t(-3, nan, -5), t(-4, nan, -8)).item() == 2
    assert kl(t(nan, nan), t(nan, nan)).item() == 0


def test_where_z_is_0_kto_is_apo_zero_unpaired():
    columns = random_columns() | {"kl_logp": t(*[-20.0] * 30), "ref_kl_logp": t(*[-10.0] * 30)}
    torch.testing.assert_close(call("kto", columns), call("apo_zero_unpaired", columns), rtol=0, atol=0)


def test_a_vanishing_beta_sees_no_difference():
    columns = random_columns()
    for name, all_the_same in (("kto", 0.5), ("apo_zero_unpaired", 0.5)):
        assert call(name, columns, beta=1e-15).tolist() == pytest.approx([all_the_same] * 30)


# -- delta -----------------------------------------------------------------------------------------------------------


def test_delta_is_the_mean_of_all_rewards_so_far():
    # rewards 0.5 * (2, 4) = 1, 2, then 0.5 * 12 = 6: means 1.5 and (1 + 2 + 6) / 3 = 3
    first, memory = delta(t(-2, -4), t(-4, -8), beta=0.5)
    second, memory = delta(t(-3), t(-15), beta=0.5, running=memory)
    assert (first, second) == (1.5, 3.0)
    assert memory == {"n": 3, "mean": 3.0}


def test_an_evaluation_does_not_move_delta():
    _, memory = delta(t(-2, -4), t(-4, -8), beta=0.5)
    assert delta(t(-3), t(-15), beta=0.5, running=memory, learning=False) == (1.5, memory)


def test_delta_does_not_depend_on_how_the_examples_came():
    columns = random_columns(12)
    whole, _ = delta(columns["completion_logp"], columns["ref_completion_logp"])
    memory = None
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        parts, memory = delta(columns["completion_logp"][part], columns["ref_completion_logp"][part], running=memory)
    assert float(parts) == pytest.approx(float(whole), rel=1e-12)


def test_bco_reads_delta_of_all_steps():
    columns = {"completion_logp": t(-3), "ref_completion_logp": t(-15), "label": t(1), "density_ratio": t(1)}
    memory = {"delta": {"n": 2.0, "mean": 1.5}}
    found, _ = statistics("bco", columns, memory, beta=0.5)
    assert found["delta"].item() == 3
    # reward 6 beyond 3: -log s(3)
    assert call("bco", columns, memory, beta=0.5).item() == pytest.approx(-math.log(logistic(3)))


def test_bco_weighs_undesirable_answers_only_and_within_its_limits():
    # at a reward of delta each costs log 2 times its weight: 0.01 counts as 0.5, 100 as 10
    same = t(-7, -7, -7, -7)
    found = bco(same, same, t(1, 0, 0, 0), t(0), t(100, 0.01, 3, 100))
    assert found.tolist() == pytest.approx([math.log(2) * weight for weight in (1, 0.5, 3, 10)])


def test_a_pair_taken_apart_costs_what_bco_pair_and_apo_zero_say():
    c, r, rc, rr = t(-4), t(-9), t(-5), t(-5)
    both = {"completion_logp": torch.cat([c, r]), "ref_completion_logp": torch.cat([rc, rr]), "label": t(1, 0)}
    both |= {"density_ratio": t(1, 1)}
    pair = {"chosen_logp": c, "rejected_logp": r, "ref_chosen_logp": rc, "ref_rejected_logp": rr}
    zero = {"delta": t(0)}
    assert call("bco", both, found=zero).sum().item() == pytest.approx(call("bco_pair", pair).item())
    assert call("apo_zero_unpaired", both).sum().item() == pytest.approx(call("apo_zero", pair).item())


def test_only_delta_has_a_memory():
    assert [name for name in ("kl", "delta") if STATISTICS[name].running] == ["delta"]
