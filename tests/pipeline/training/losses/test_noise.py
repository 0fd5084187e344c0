"""Losses against noise are their papers' formulas, in value and gradient, whatever the order and split of a batch."""

import math

import pytest
import torch

from prefcache.pipeline.training.losses import LOSSES
from tests.helpers.losses import (
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

NOISE = ("beta_dpo", "dr_dpo", "chi_po")


def logistic(x):
    return 1 / (1 + math.exp(-x))


def margins_of(columns):
    rows = zip(*(columns[column].tolist() for column in LOGPS), strict=True)
    return [(c - rc) - (r - rr) for c, r, rc, rr in rows]


def shuffled(columns):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    return order, {name: values[order] for name, values in columns.items()}


def test_dr_dpo_equals_the_papers_formula():
    columns, beta, beta_prime = random_columns(), 0.1, 0.5
    losses = [-math.log(logistic(beta * margin)) for margin in margins_of(columns)]
    expected = -beta_prime * math.log(sum(math.exp(-each / beta_prime) for each in losses) / len(losses))
    torch.testing.assert_close(
        call("dr_dpo", columns, beta=beta, beta_prime=beta_prime), torch.full((30,), expected).double()
    )


def test_chi_po_equals_the_papers_algorithm():
    columns, beta, r_max = random_columns(), 0.1, 1.0
    columns = {name: columns[name] for name in LOGPS}
    clipped, expected = 0, []
    for c, r, rc, rr in zip(*(values.tolist() for values in columns.values()), strict=True):
        z_c, z_r = math.exp(c - rc), math.exp(r - rr)
        margin = beta * (z_c + math.log(z_c)) - beta * (z_r + math.log(z_r))
        clipped += abs(margin) > 2 * r_max
        expected.append(-math.log(logistic(min(max(margin, -2 * r_max), 2 * r_max))))
    assert 0 < clipped < 30
    torch.testing.assert_close(call("chi_po", columns, beta=beta, r_max=r_max), t(*expected))


def test_beta_dpo_equals_the_papers_formula_over_several_steps():
    beta, alpha, momentum, floor = 0.1, 0.6, 0.9, 1e-3
    memory, mean = None, None
    for step in range(4):
        columns = random_columns(seed=step)
        margins = margins_of(columns)
        of_batch = sum(margins) / len(margins)
        mean = of_batch if mean is None else momentum * mean + (1 - momentum) * of_batch
        batch_beta = max(floor, beta * (1 + alpha * (of_batch - mean)))
        expected = t(*(-math.log(logistic(batch_beta * margin)) for margin in margins))
        torch.testing.assert_close(call("beta_dpo", columns, memory, keep=1.0), expected, rtol=1e-9, atol=1e-12)
        memory = statistics("beta_dpo", columns, memory, keep=1.0)[1]


def test_beta_dpo_takes_beta_over_the_pairs_it_keeps_and_averages_over_them():
    columns = random_columns(20)
    found, memory = statistics("beta_dpo", columns, keep=0.8)
    kept = found["kept_share"] > 0
    assert int(kept.sum()) == 16 and found["kept_share"].sum() == 20  # 0.8 * 20, of weight 20 / 16
    margins = t(*margins_of(columns))
    expected = 0.1 * (1 + 0.6 * (margins[kept].mean() - margins.mean()))
    torch.testing.assert_close(found["calibrated_beta"], expected)
    own = -torch.nn.functional.logsigmoid(expected * margins[kept]).mean()
    torch.testing.assert_close(call("beta_dpo", columns, keep=0.8).mean(), own)
    assert memory["calibrated_beta"] == memory["kept_share"]


def test_beta_dpo_draws_with_gaussian_weights():
    # One of three pairs, at margins 0, 1 and 2 deviations from the mean: weights 1, e^-0.5, e^-2.
    columns = columns_of([(0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0)])
    counts = torch.zeros(3, dtype=torch.float64)
    for step in range(2000):
        remembered = {"steps": float(step), "mean": 0.0, "std": 1.0}
        # A momentum this near to 1 leaves the mean and the deviation where they are.
        value, _ = (
            LOSSES["beta_dpo"]
            .statistics[1]
            .function(*columns.values(), keep=0.34, momentum=1 - 1e-12, running=remembered)
        )
        counts += (value > 0).double()
    weights = torch.exp(-0.5 * t(0, 1, 2) ** 2)
    assert counts.sum() == 2000
    torch.testing.assert_close(counts / 2000, weights / weights.sum(), rtol=0, atol=0.05)


def test_beta_dpo_draws_anew_at_each_step_and_the_same_in_another_run():
    columns = random_columns()
    first, memory = statistics("beta_dpo", columns)
    again, _ = statistics("beta_dpo", columns)
    second, _ = statistics("beta_dpo", columns, memory)
    assert torch.equal(first["kept_share"], again["kept_share"])
    assert not torch.equal(first["kept_share"], second["kept_share"])


def test_beta_dpo_leaves_out_outliers_first():
    margins = [*(0.1 * i for i in range(9)), 1e4]
    found, _ = statistics("beta_dpo", columns_of([(margin, 0, 0, 0) for margin in margins]), keep=0.9)
    assert found["kept_share"].tolist() == pytest.approx([10 / 9] * 9 + [0])


@pytest.mark.parametrize("columns", [random_columns(), dict.fromkeys(LOGPS, t(*range(30)))])
def test_beta_dpo_keeps_the_same_pairs_in_any_order(columns):
    # In the second, all margins are 0, as before the first step: the log-probs themselves tell the pairs apart.
    order, other = shuffled(columns)
    assert torch.equal(call("beta_dpo", columns)[order], call("beta_dpo", other))


def test_beta_dpo_does_not_depend_on_how_a_batch_is_split():
    columns = random_columns()
    found, _ = statistics("beta_dpo", columns)
    parts = []
    for part in (slice(0, 7), slice(7, 30)):
        of_part = {name: values[part] for name, values in columns.items()}
        share = {"kept_share": found["kept_share"][part], "calibrated_beta": found["calibrated_beta"]}
        parts.append(call("beta_dpo", of_part, found=share))
    assert torch.equal(torch.cat(parts), call("beta_dpo", columns))


def test_an_evaluation_filters_nothing_and_moves_nothing():
    memory = statistics("beta_dpo", random_columns(seed=1))[1]
    found, after = statistics("beta_dpo", random_columns(seed=2), memory, learning=False)
    assert torch.equal(found["kept_share"], torch.ones(30).double()) and after == memory


def test_beta_dpo_stays_above_its_floor():
    memory = {name: {"steps": 9.0, "mean": 100.0, "std": 1.0} for name in ("calibrated_beta", "kept_share")}
    assert statistics("beta_dpo", random_columns(), memory, min_beta=0.02)[0]["calibrated_beta"] == 0.02


def test_dr_dpo_does_not_depend_on_the_order_of_examples():
    columns = random_columns()
    order, other = shuffled(columns)
    torch.testing.assert_close(call("dr_dpo", columns), call("dr_dpo", other))
    for mine, others in zip(gradients("dr_dpo", columns), gradients("dr_dpo", other), strict=True):
        torch.testing.assert_close(mine[order], others)


@pytest.mark.parametrize(
    ("name", "hyper"), [("beta_dpo", {}), ("beta_dpo", {"keep": 0.5}), ("dr_dpo", {}), ("chi_po", {"r_max": 3.0})]
)
def test_gradient_is_that_of_the_values(name, hyper):
    assert has_the_gradient_of_its_values(name, random_columns(), **hyper)


def test_dr_dpo_weighs_gradients_by_how_small_a_loss_is():
    # Losses l give weights exp(-l / beta') / sum of these; l = -log s(u), so at beta' = 1 they go as s(u).
    columns, beta = random_columns(), 0.3
    weights = torch.sigmoid(beta * t(*margins_of(columns)))
    expected = weights / weights.sum() * gradients("sigmoid", columns, beta=beta)[0]
    mean_gradient = gradients("dr_dpo", columns, beta=beta, beta_prime=1.0)[0] / 30
    torch.testing.assert_close(mean_gradient, expected)


@pytest.mark.parametrize("statistic", ["calibrated_beta", "kept_share"])
def test_beta_dpo_has_no_gradient_through_its_statistics(statistic):
    columns = random_columns()
    columns["chosen_logp"].requires_grad_()
    assert not statistics("beta_dpo", columns)[0][statistic].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_becomes_sigmoid(dtype):
    columns = {name: values.to(dtype) for name, values in random_columns().items()}
    sigmoid = call("sigmoid", columns, beta=0.1)
    torch.testing.assert_close(call("beta_dpo", columns, beta=0.1, keep=1.0, alpha=0.0), sigmoid)
    trusting = call("dr_dpo", columns, beta=0.1, beta_prime=1e6)
    torch.testing.assert_close(trusting, sigmoid.mean().expand(30), rtol=1e-5, atol=0)


def test_chi_po_becomes_sigmoid_where_both_answers_have_become_rare():
    columns = random_columns()
    rare = columns | {name: columns[name] - 40 for name in LOGPS[:2]}
    torch.testing.assert_close(call("chi_po", rare, r_max=100.0), call("sigmoid", columns, beta=0.1))


def test_chi_po_by_hand():
    # Ratios e^0 = 1 and e^log 3 = 3: 0.5 ((1 + 0) - (3 + log 3)) = -1 - 0.5 log 3
    columns = columns_of([(-2, -2 + math.log(3), -2, -2)])
    assert call("chi_po", columns, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(1 + 0.5 * math.log(3))))
    # With rewards up to 0.5, the same is clipped at -1
    assert call("chi_po", columns, beta=0.5, r_max=0.5).item() == pytest.approx(math.log(1 + math.e))


def test_dr_dpo_by_hand():
    # Margins log 3 and -log 3: losses -log(3/4) and -log(1/4); mean of e^-l = (3/4 + 1/4) / 2 = 1/2
    columns = columns_of([(math.log(3), 0, 0, 0), (-math.log(3), 0, 0, 0)])
    assert call("dr_dpo", columns, beta=1.0).tolist() == pytest.approx([math.log(2), math.log(2)])


def test_beta_dpo_by_hand():
    # Margins 1 and 3, a mean of 2; the running mean is 0.5 * 0 + 0.5 * 2 = 1: beta = 0.1 (1 + 0.5 (2 - 1)) = 0.15
    columns = columns_of([(1, 0, 0, 0), (3, 0, 0, 0)])
    memory = {name: {"steps": 1.0, "mean": 0.0, "std": 1.0} for name in ("calibrated_beta", "kept_share")}
    found = call("beta_dpo", columns, memory, beta=0.1, alpha=0.5, momentum=0.5, keep=1.0)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.15)), math.log(1 + math.exp(-0.45))])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    ("name", "hyper"), [("beta_dpo", {}), ("dr_dpo", {}), ("dr_dpo", {"beta_prime": 1e-3}), ("chi_po", {})]
)
def test_stays_finite_at_any_size(name, hyper, beta):
    assert is_finite(name, extreme_columns(), beta=beta, **hyper)
    same = {column: torch.full((4,), -7.0) for column in LOGPS} | {column: torch.ones(4) for column in LENGTHS}
    assert is_finite(name, same, beta=beta, **hyper)
    assert is_finite(name, {column: values[:1] for column, values in same.items()}, beta=beta, **hyper)


@pytest.mark.parametrize("name", NOISE)
def test_keeps_the_type_of_its_columns(name):
    columns = {column: values.float() for column, values in random_columns().items()}
    assert call(name, columns).dtype == torch.float32 and call(name, columns).shape == (30,)


@pytest.mark.parametrize("name", NOISE)
def test_says_what_to_expect_of_it(name):
    loss = LOSSES[name]
    assert any(each.direction in ("rises", "falls") for each in loss.healthy)
    assert loss.papers and loss.formula and loss.when and loss.kind == "pairs"
    assert loss.over_batch is (name == "dr_dpo")
