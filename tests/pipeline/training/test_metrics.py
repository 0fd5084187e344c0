"""What a visit says in numbers, by hand, under TRL's names."""

import numpy as np
import pytest

from prefcache.pipeline.training.metrics import evaluation_metrics, log_ratio, visit_metrics
from tests.helpers.examples import objective

NAN = float("nan")


def visit(**columns):
    return {name: np.array(values, np.float64) for name, values in columns.items()}


# Log-ratios: chosen 1, 2, -1; rejected -1, 4, -1.
PAIRS = visit(
    chosen_logp=[-4, -6, -9],
    ref_chosen_logp=[-5, -8, -8],
    rejected_logp=[-7, -2, -9],
    ref_rejected_logp=[-6, -6, -8],
    n_chosen_counted=[2, 4, 2],
    n_rejected_counted=[1, 2, 4],
    loss=[0.25, 0.5, 0.75],
)
# Log-ratios 1 and 2 of desirable answers, 1, -2 and 0 of undesirable ones.
LABELS = visit(
    completion_logp=[-4, -6, -9, -8, -3],
    ref_completion_logp=[-5, -8, -10, -6, -3],
    n_completion_counted=[2, 4, 1, 2, 3],
    label=[1, 1, 0, 0, 0],
    loss=[1, 2, 3, 4, 5],
)


def chosen(of, *rows):
    return {name: values[list(rows)] for name, values in of.items()}


def test_metrics_of_pairs_by_hand():
    # Rewards 0.5 times the log-ratios: chosen 0.5, 1, -0.5; rejected -0.5, 2, -0.5. Margins 1, -1, 0: one of three is won.
    assert visit_metrics(PAIRS, objective(loss="sigmoid", beta=0.5)) == pytest.approx(
        {
            "loss": 0.5,
            "rewards/chosen": 1 / 3,
            "rewards/rejected": 1 / 3,
            "rewards/accuracies": 1 / 3,
            "rewards/margins": 0,
            "logps/chosen": -19 / 3,
            "logps/rejected": -6,
            "log_ratios/chosen": 2 / 8,  # per token: 1 + 2 - 1 over 2 + 4 + 2, and -1 + 4 - 1 over 1 + 2 + 4
            "log_ratios/rejected": 2 / 7,
        }
    )


def test_rewards_without_a_reference_and_per_token_where_the_formula_has_them():
    # simpo, beta 2, no reference: 2 * -4/2, -6/4, -9/2 and 2 * -7/1, -2/2, -9/4
    without = {name: values for name, values in PAIRS.items() if not name.startswith("ref_")}
    found = visit_metrics(without, objective(loss="simpo"))
    assert found["rewards/chosen"] == pytest.approx((-4 - 3 - 9) / 3)
    assert found["rewards/rejected"] == pytest.approx((-14 - 2 - 4.5) / 3)
    assert found["rewards/accuracies"] == pytest.approx(1 / 3) and found["logps/chosen"] == pytest.approx(-19 / 3)
    zeros = visit(ref_chosen_logp=[0] * 3, ref_rejected_logp=[0] * 3)
    found = visit_metrics(PAIRS | zeros, objective(loss="sigmoid", reference_free=True, beta=0.5))
    assert (found["rewards/chosen"], found["rewards/rejected"]) == pytest.approx((-19 / 6, -3))
    assert visit_metrics(without, objective(loss="cpo", beta=0.5)) == found


def test_metrics_of_labels_by_hand():
    # Rewards 0.5, 1 and 0.5, -1, 0. Of 2 * 3 combinations the desirable one is higher in 2 (0.5 is no higher than 0.5) and 3.
    assert visit_metrics(LABELS, objective(loss="kto", beta=0.5)) == pytest.approx(
        {
            "loss": 3,
            "rewards/chosen": 0.75,
            "rewards/rejected": -0.5 / 3,
            "rewards/margins": 0.75 + 0.5 / 3,
            "rewards/accuracies": 5 / 6,
            "logps/chosen": -5,
            "logps/rejected": -20 / 3,
            "log_ratios/chosen": 3 / 6,  # 1 + 2 over 2 + 4, and 1 - 2 + 0 over 1 + 2 + 3
            "log_ratios/rejected": -1 / 6,
        }
    )


def test_a_batch_without_one_of_the_kinds_says_nothing_about_it():
    good, bad = (visit_metrics(chosen(LABELS, *rows), objective(loss="kto", beta=0.5)) for rows in ((0, 1), (2, 3, 4)))
    assert good == {"loss": 1.5, "rewards/chosen": 0.75, "logps/chosen": -5, "log_ratios/chosen": 0.5}
    assert bad == pytest.approx(
        {"loss": 4, "rewards/rejected": -0.5 / 3, "logps/rejected": -20 / 3, "log_ratios/rejected": -1 / 6}
    )


def test_few_examples_terms_answers_and_finite_values_leave_the_other_metrics():
    found = visit_metrics(chosen(PAIRS, 0), objective(loss="sigmoid", beta=0.5))
    assert (found["rewards/margins"], found["rewards/accuracies"]) == (1, 1)
    assert visit_metrics(chosen(LABELS, 3), objective(loss="bco", beta=0.5))["rewards/rejected"] == -1
    terms = visit(**{"loss/sigmoid": [1, 2, 3], "loss/sft": [0, 0, 3]})
    found = visit_metrics(PAIRS | terms, objective(loss=["sigmoid", "sft"]))
    assert (found["loss/sigmoid"], found["loss/sft"], found["loss"]) == (2, 1, 0.5)
    only = visit(chosen_logp=[-4, -6], n_chosen_counted=[2, 4], loss=[1, 2])  # a step of sft
    assert visit_metrics(only, objective(loss="sft")) == {"loss": 1.5, "logps/chosen": -5}
    found = visit_metrics(PAIRS | visit(loss=[0.25, NAN, 0.75]), objective(loss="sigmoid"))
    assert "loss" not in found and np.isfinite(found["rewards/margins"])


def test_how_often_the_policy_itself_finds_the_chosen_answer_likelier():
    # -4 > -7, but not -6 > -2, nor -9 > -9.
    assert evaluation_metrics(PAIRS, objective(loss="sigmoid"))["preference_accuracy"] == pytest.approx(1 / 3)
    assert "preference_accuracy" not in evaluation_metrics(LABELS, objective(loss="kto"))


def test_a_log_ratio_is_policy_minus_reference_or_minus_nothing():
    assert log_ratio(PAIRS, "rejected").tolist() == [-1, 4, -1]
    assert log_ratio({"chosen_logp": np.array([-2.0])}, "chosen").tolist() == [-2]
