"""What a run minimises: several losses in one, arguments to whom they belong, and everything that cannot work refused."""

import math

import numpy as np
import pytest
import torch

from prefcache.pipeline import config_file
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.losses import LOSSES
from prefcache.pipeline.training.objective import Losses, Objective, losses_for, select_examples
from tests.helpers.examples import objective
from tests.helpers.losses import LOGPS, columns_of, random_columns, t
from tests.helpers.project import ROOT

NAN = float("nan")


def refusal(**train) -> str:
    with pytest.raises(UsageError) as caught:
        objective(**train)
    return str(caught.value)


def softplus(x):
    return math.log1p(math.exp(x))


# Two pairs: margins (-2 + 3) - (-5 + 4) = 2 and (-1 + 1) - (-2 + 6) = -4.
PAIRS = columns_of([(-2, -5, -3, -4), (-1, -2, -1, -6)]) | {"n_chosen_counted": t(2, 6), "n_rejected_counted": t(4, 1)}
# -log sigmoid(0.5 * 2) and -log sigmoid(0.5 * -4); -chosen over the mean of 2 and 6 tokens: 2 / 4 and 1 / 4.
SIGMOID, SFT = np.array([softplus(-1), softplus(2)]), np.array([0.5, 0.25])


def compute(chosen: Objective, columns) -> Losses:
    return chosen.compute_losses(columns, chosen.compute_statistics(columns, {}, learning=True).values)


# -- one loss and several --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "weights", "expected"),
    [
        ("sigmoid", {}, SIGMOID),
        ({"sigmoid": 0.8, "sft": 0.25}, {}, 0.8 * SIGMOID + 0.25 * SFT),
        (["sigmoid", "sft"], {}, SIGMOID + SFT),
        ({"sigmoid": 1, "sft": 0}, {}, SIGMOID),  # switched off, and still shown
        # An example's weight weighs every term; one from the data multiplies wpo's.
        (["sigmoid", "sft"], {"weight": t(0.5, 3)}, (SIGMOID + SFT) * [0.5, 3]),
        (["sigmoid", "sft"], {"weight": t(0.5, 3), "given_weight": t(4, 1)}, (SIGMOID + SFT) * [2, 3]),
    ],
)
def test_a_loss_is_the_weighted_sum_of_its_terms(loss, weights, expected):
    losses = compute(objective(loss=loss, beta=0.5), PAIRS | weights)
    assert losses.total.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    example_weight = np.prod([values.numpy() for values in weights.values()], axis=0)
    for name, values in losses.terms.items():
        plain = {"sigmoid": SIGMOID, "sft": SFT}[name]
        assert values.tolist() == pytest.approx((plain * example_weight).tolist(), rel=1e-12)


def test_an_objective_has_a_name_and_a_kind():
    one, two = objective(loss="sigmoid"), objective(loss={"sigmoid": 0.8, "sft": 0.25})
    assert (one.name, one.kind, one.answers) == ("sigmoid", "pairs", ("chosen", "rejected"))
    assert two.name == "0.8 sigmoid + 0.25 sft"


def test_gradients_of_a_sum_are_the_weighted_sum_of_gradients():
    columns = {name: values.clone().requires_grad_() for name, values in PAIRS.items()}
    compute(objective(loss={"sigmoid": 0.8, "sft": 0.25}, beta=0.5), columns)[0].sum().backward()
    # sigmoid: -beta s(-u), of which 0.8; sft: -1 / 4 tokens, of which 0.25
    slope = [-0.8 * 0.5 / (1 + math.exp(1)) - 0.0625, -0.8 * 0.5 / (1 + math.exp(-2)) - 0.0625]
    assert columns["chosen_logp"].grad.tolist() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_makes_an_objective_that_says_what_it_reads(name):
    chosen, loss = objective(loss=name), LOSSES[name]
    assert chosen.columns == loss.columns
    assert chosen.kind == ("labels" if "label" in loss.columns else "pairs")
    # The policy's answers are those whose log-probs are read, but for the mismatched one.
    read = {column.removesuffix("_logp") for column in loss.columns if column.endswith("_logp")}
    assert set(chosen.answers) == {answer for answer in read if not answer.startswith("ref_")} - {"kl"}
    assert set(chosen.reference_answers) == {answer[4:] for answer in read if answer.startswith("ref_")}
    assert chosen.without_gradient == (("kl",) if "kl" in read else ())
    assert chosen.loss_arguments == {name: {"weight": 1.0, **loss.hyperparameters}}


def test_an_evaluation_looks_at_both_answers_of_a_pair_and_at_what_the_divergence_needs():
    assert (objective(loss="sft").answers, objective(loss="sft").visited) == (("chosen",), ("chosen", "rejected"))
    assert objective(loss="kto").visited == ("completion", "kl")
    assert objective(loss="bco").visited == ("completion",)


def test_losses_together_read_what_each_reads_once():
    chosen = objective(loss=["sigmoid", "sft", "ipo"])
    assert chosen.columns == (*LOGPS, "n_chosen_counted", "n_rejected_counted")
    assert objective(loss=["kto", "bco"]).columns == (
        *("completion_logp", "ref_completion_logp", "label"),
        *("kl_logp", "ref_kl_logp", "density_ratio"),
    )


# -- arguments -------------------------------------------------------------------------------------------------------


def arguments(**train):
    return {term.loss.name: term.arguments for term in objective(**train).terms}


def test_beta_goes_to_all_that_have_one_and_the_rest_keep_their_defaults():
    found = arguments(loss=["sigmoid", "sft", "ipo"], beta=0.7)
    assert (found["sigmoid"]["beta"], found["ipo"]["beta"], found["sft"]) == (0.7, 0.7, {})
    # Unsaid, each loss has its own: 0.1 of DPO, 2 of SimPO, 0.3 of DPOP.
    assert [arguments(loss=name)[name]["beta"] for name in ("sigmoid", "simpo", "dpop")] == [0.1, 2.0, 0.3]


def test_a_key_goes_to_all_that_have_it_and_loss_dot_key_to_one():
    said = {"label_smoothing": 0.2, "robust.label_smoothing": 0.3, "ipo.per_token": False}
    found = arguments(loss=["sigmoid", "robust", "ipo"], loss_args=said)
    assert (found["sigmoid"]["label_smoothing"], found["robust"]["label_smoothing"]) == (0.2, 0.3)
    assert found["ipo"]["per_token"] is False and "label_smoothing" not in found["ipo"]


def test_one_losss_own_value_wins_wherever_it_stands():
    first = {"robust.label_smoothing": 0.3, "label_smoothing": 0.2}
    assert arguments(loss=["sigmoid", "robust"], loss_args=first)["robust"]["label_smoothing"] == 0.3
    found = arguments(loss=["sigmoid", "ipo"], beta=0.7, loss_args={"ipo.beta": 0.2})
    assert (found["sigmoid"]["beta"], found["ipo"]["beta"]) == (0.7, 0.2)


def test_arguments_may_be_said_for_a_single_loss_by_its_name():
    assert arguments(loss="ipo", loss_args={"ipo": {"beta": 0.2, "per_token": False}})["ipo"]["beta"] == 0.2


@pytest.mark.parametrize(
    ("train", "beta"),
    [
        ({"loss": "sigmoid"}, 0.1),
        ({"loss": "simpo"}, 2.0),
        ({"loss": "sigmoid", "beta": 0.3}, 0.3),
        ({"loss": ["sft", "simpo", "sigmoid"]}, 2.0),  # the first term that has one
        ({"loss": ["sigmoid", "ipo"], "loss_args": {"ipo.beta": 0.2}}, 0.1),
        ({"loss": "sft"}, 1.0),
        ({"loss": "slic", "beta": 0.4}, 0.4),  # none has one: then what is said
    ],
)
def test_the_scale_of_rewards_is_the_first_losss_beta(train, beta):
    assert objective(**train).beta == beta


@pytest.mark.parametrize(
    ("loss", "per_token"),
    [("simpo", True), (["simpo", "sigmoid"], True), (["sigmoid", "simpo"], False), (["slic", "simpo"], True)],
)
def test_rewards_are_per_token_if_the_term_with_their_scale_is(loss, per_token):
    # slic has no beta; simpo's is of log-probs per token.
    assert objective(loss=loss).per_token == per_token


def test_a_beta_that_is_not_the_losss_own_is_said():
    assert objective(loss="simpo", beta=0.1).overrides == "simpo's beta 0.1 (its own: 2.0)"
    mixed = objective(loss=["sigmoid", "simpo"], beta=0.1, loss_args={"gamma": 1, "sigmoid.label_smoothing": 0.2})
    assert mixed.overrides == "sigmoid's label_smoothing 0.2 (its own: 0.0), simpo's beta 0.1 (its own: 2.0)"
    assert objective(loss="sigmoid", beta=0.1).overrides == objective(loss="simpo").overrides == ""


@pytest.mark.parametrize("name", LOSSES)
def test_the_demos_config_leaves_every_loss_its_own_beta(name):
    demo = config_file.load(ROOT / "data/demo/config.yaml", [f"train.loss={name}"])
    assert Objective(demo.train).overrides == ""


# -- what is refused -------------------------------------------------------------------------------------------------


def test_losses_of_both_kinds_are_refused_by_name():
    message = refusal(loss=["sigmoid", "kto", "sft", "bco"])
    assert "sigmoid, sft read pairs" in message and "kto, bco read labelled answers" in message
    assert "take losses of one of them" in message


def test_an_unknown_loss_among_several_is_refused_with_the_nearest():
    assert "The nearest is sigmoid" in refusal(loss={"sigmoid": 1, "sigmod": 1})
    assert "live reference" in refusal(loss="tdpo")


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"loss_args": {"beta": 0.2}}, "set train.beta instead, or LOSS.beta for one of several losses"),
        (
            {"loss_args": {"tau": 0.2}},
            "train.loss_args.tau: loss 'sigmoid' has no 'tau'; sigmoid has label_smoothing, f_divergence, f_alpha. "
            "Losses with tau: discopop.",
        ),
        (
            {"loss": ["sigmoid", "sft"], "loss_args": {"gama": 1}},
            "loss 'sigmoid + sft' has no 'gama'; sigmoid has label_smoothing, f_divergence, f_alpha; sft has none.",
        ),
        (
            {"loss": ["sigmoid", "sft"], "loss_args": {"sft.label_smoothing": 0.1}},
            "loss 'sft' has no 'label_smoothing'; sft has none. Losses with label_smoothing: sigmoid, ",
        ),
        (
            {"loss": ["sigmoid", "sft"], "loss_args": {"ipo.beta": 0.1}},
            "train.loss_args.ipo.beta: ipo is not among the losses of this run (sigmoid, sft).",
        ),
        ({"loss": "sft", "loss_args": {"sft.beta": 0.1}}, "loss 'sft' has no 'beta'"),
        ({"loss_args": {"label_smoothing": 2}}, "found 2.0; loss 'sigmoid' takes values in [0, 1]."),
        ({"loss_args": {"label_smoothing": "much"}}, "found 'much', expected a float for loss 'sigmoid'."),
        ({"loss_args": {"f_divergence": "kl"}}, "takes one of reverse_kl, forward_kl"),
        ({"loss": "ipo", "loss_args": {"per_token": 1}}, "found 1.0, expected a bool for loss 'ipo'."),
        ({"loss": "sigmoid", "loss_args": {"label_smoothing": True}}, "found True, expected a float"),
        ({"loss_args": {"f_alpha": ".nan"}}, "found '.nan', expected a float"),
        ({"loss_args": {"f_alpha": "nan"}}, "found nan; loss 'sigmoid' takes values in (-inf, inf)."),
    ],
)
def test_a_wrong_argument_is_refused_with_those_there_are(train, found):
    assert found in refusal(**train)


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"loss": "aot", "weighting": "wpo"}, "train.weighting wpo has no meaning for aot:"),
        ({"loss": ["sigmoid", "dr_dpo"], "weighting": "wpo"}, "for dr_dpo:"),
        (
            {"loss": "kto", "tokens": {"ld_alpha": 0.5}},
            "train.tokens.ld_alpha compares the lengths of a pair's answers",
        ),
        ({"loss": "bco", "tokens": {"sampo": True}}, "train.tokens.sampo compares the lengths"),
        ({"loss": "sft", "tokens": {"ld_alpha": 0.5}}, "and sft reads single answers"),
        ({"loss": "simpo", "tokens": {"clamp": (-1, 1)}}, "this run reads none"),
        ({"loss": "sigmoid", "reference_free": True, "tokens": {"clamp": (-1, 1)}}, "this run reads none"),
        ({"loss": "sft", "scope": "micro"}, "set train.micro_batch_size"),
        ({"loss": "aot", "scope": "micro"}, "set train.micro_batch_size"),
        # What would change nothing is a mistake too.
        ({"loss": "kto", "density_ratio": True}, "losses that read density_ratio (bco), and kto does not"),
        ({"loss": ["sigmoid", "sft"], "density_ratio": True}, "and sigmoid, sft does not. Leave it out"),
        ({"loss": ["simpo", "sft"], "reference_free": True}, "simpo, sft reads none anyway. Leave it out"),
        (
            {"loss": {"sigmoid": 0, "sft": 0.0}},
            "every weight is 0 (sigmoid, sft), so there is nothing to learn. Leave it out",
        ),
    ],
)
def test_what_does_not_combine_is_refused_with_what_to_do(train, found):
    message = refusal(**train)
    assert found in message and ("Leave it out" in message or "set train." in message)


@pytest.mark.parametrize(
    "train",
    [
        {"loss": "sigmoid", "weighting": "wpo"},
        {"loss": "kto", "weighting": "wpo", "tokens": {"clamp": (-1, 1), "decay": 0.9}},
        {"loss": "sigmoid", "scope": "micro"},  # no statistics to take over anything
        {"loss": "aot", "scope": "micro", "micro_batch_size": 4},
        {"loss": "simpo", "tokens": {"ld_alpha": 0.5}},
        {"loss": ["sft", "sigmoid"], "tokens": {"sampo": True}},
        {"loss": ["simpo", "sigmoid"], "tokens": {"clamp": (-1, 1)}},
        {"loss": ["kto", "bco"], "density_ratio": True},
        {"loss": {"sigmoid": 0, "sft": 1}},  # measured, and not learned
        {"loss": ["simpo", "sigmoid"], "reference_free": True},
    ],
)
def test_what_does_combine_is_taken(train):
    objective(**train)


# -- what has to be known beforehand ---------------------------------------------------------------------------------


def test_without_a_reference_nothing_is_asked_of_the_cache():
    free = objective(loss="sigmoid", reference_free=True, tokens={"decay": 0.9})
    assert (free.reference_answers, free.reads_tokens) == ((), False)
    assert objective(loss="simpo", tokens={"decay": 0.9}).reads_tokens is False


@pytest.mark.parametrize(
    ("tokens", "reads"),
    [
        ({}, False),
        ({"ld_alpha": 0.5}, True),
        ({"ld_alpha": 0.5, "ld_alpha_of": "policy"}, False),
        ({"ld_alpha": 0.5, "ld_alpha_of": "policy", "decay": 0.9}, True),
        ({"sampo": True}, True),
        ({"decay": 0.9}, True),
        ({"clamp": (-1.5, 1.5)}, True),
    ],
)
def test_the_references_tokens_are_read_only_where_they_are_weighed(tokens, reads):
    assert objective(loss="sigmoid", tokens=tokens).reads_tokens is reads


def test_a_first_pass_computes_only_what_statistics_read():
    assert objective(loss="sigmoid").first_pass == ()
    assert objective(loss="sft").first_pass == ()  # lengths are known without the policy
    assert objective(loss="kto").first_pass == ("kl",)
    assert objective(loss="bco").first_pass == ("completion",)
    # Gradients flow between examples: everything is needed.
    assert objective(loss=["sft", "aot"]).first_pass == ("chosen", "rejected")


# -- statistics ------------------------------------------------------------------------------------------------------


def labels(*rows):
    names = ("completion_logp", "ref_completion_logp", "label", "kl_logp", "ref_kl_logp")
    return columns_of(rows, names) | {"density_ratio": torch.ones(len(rows), dtype=torch.float64)}


def test_a_statistic_is_taken_over_all_examples_of_the_batch_and_logged():
    columns = labels((-4, -5, 1, -1, -3), (-2, -2, 0, NAN, NAN), (-2, -3, 0, -7, -6))
    statistics = objective(loss="kto").compute_statistics(columns, {}, learning=True)
    # Two mismatched answers: (2 - 1) / 2; the middle label has none.
    assert statistics == ({"kto/kl": 0.5}, {}, {"kl": 0.5})


@pytest.mark.parametrize("kl", [(NAN, NAN), (-1, NAN), (NAN, -1), (-5, -1)])
def test_a_divergence_that_nothing_tells_or_that_is_negative_is_zero(kl):
    total, _ = compute(objective(loss="kto", beta=0.5), labels((-4, -5, 1, *kl)))
    # 1 - s(0.5 * 1) of a single example
    assert total.tolist() == pytest.approx([1 / (1 + math.exp(0.5))], rel=1e-12)


def test_kto_with_all_of_one_kind_is_its_half_of_the_formula():
    columns = labels((-4, -5, 1, -1, -3), (-2, -2, 1, -7, -6))  # z = (2 - 1) / 2
    total, _ = compute(objective(loss="kto", beta=0.5, loss_args={"undesirable_weight": 9}), columns)
    assert total.tolist() == pytest.approx([1 / (1 + math.exp(0.25)), 1 / (1 + math.exp(-0.25))], rel=1e-12)


def test_a_running_statistic_is_carried_from_step_to_step_and_an_evaluation_does_not_move_it():
    chosen, one_more = objective(loss="bco", beta=0.5), labels((-1, -9, 1, NAN, NAN))
    first = chosen.compute_statistics(labels((-4, -5, 1, NAN, NAN), (-2, -5, 0, NAN, NAN)), {}, learning=True)
    # Rewards 0.5 * 1 and 0.5 * 3: mean 1. Then one of 0.5 * 8 = 4: (0.5 + 1.5 + 4) / 3 = 2.
    running = {"bco/delta": {"n": 2.0, "mean": 1.0}}
    assert first == ({"bco/delta": 1.0}, running, {"delta": 1.0})
    second = chosen.compute_statistics(one_more, first.running, learning=True)
    assert second.values["bco/delta"].item() == pytest.approx(2.0) and second.running["bco/delta"]["n"] == 3
    assert first.running == running  # the argument is unchanged
    assert chosen.compute_statistics(one_more, running, learning=False) == ({"bco/delta": 1.0}, running, {"delta": 1.0})
    # Without running statistics, before the first step, the examples themselves count, and nothing is carried.
    assert chosen.compute_statistics(one_more, {}, learning=False) == ({"bco/delta": 4.0}, {}, {"delta": 4.0})


def test_running_statistics_are_kept_apart_by_loss_and_statistic():
    chosen = objective(loss=["beta_dpo", "alpha_dpo"])
    _, running, logged = chosen.compute_statistics(random_columns(6), {}, learning=True)
    assert sorted(running) == ["alpha_dpo/relative_margin", "beta_dpo/calibrated_beta", "beta_dpo/kept_share"]
    assert list(logged) == ["calibrated_beta"]  # one value per example is no number to log


def test_a_statistic_has_the_hyperparameters_of_its_own_loss():
    columns = random_columns(4)
    chosen = objective(loss="beta_dpo", beta=0.2, loss_args={"alpha": 0, "keep": 1})
    statistics, _, _ = chosen.compute_statistics(columns, {}, learning=True)
    assert statistics["beta_dpo/calibrated_beta"].item() == pytest.approx(0.2)  # alpha 0 leaves beta as it is
    total, _ = chosen.compute_losses(columns, statistics)
    expected, _ = compute(objective(loss="sigmoid", beta=0.2), columns)
    torch.testing.assert_close(total, expected)


def test_no_gradient_flows_through_a_statistic():
    columns = {name: values.clone().requires_grad_() for name, values in labels((-4, -5, 1, -1, -3)).items()}
    compute(objective(loss="kto"), columns)[0].sum().backward()
    assert columns["kl_logp"].grad is None and columns["completion_logp"].grad.abs().item() > 0


def test_a_part_of_the_batch_has_its_own_of_each_examples_values_and_all_of_the_others():
    found = select_examples({"kept": t(1, 2, 3), "z": torch.tensor(7.0)}, torch.tensor([2, 0]), 3)
    assert found["kept"].tolist() == [3, 1] and found["z"].item() == 7
    single = select_examples({"kept": t(4), "z": torch.tensor(7.0)}, torch.tensor([0]), 1)
    assert single["kept"].tolist() == [4] and single["z"].ndim == 0


@pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if loss.kind == "pairs" and not loss.over_batch]
)
def test_parts_with_the_batchs_statistics_have_the_values_of_the_whole(name):
    chosen, columns = objective(loss=name), random_columns(7)
    statistics, _, _ = chosen.compute_statistics(columns, {}, learning=True)
    whole, _ = chosen.compute_losses(columns, statistics)
    for positions in (torch.tensor([5, 0]), torch.tensor([1, 2, 3, 4, 6])):
        part = {key: each[positions] for key, each in columns.items()}
        found, _ = chosen.compute_losses(part, select_examples(statistics, positions, 7))
        torch.testing.assert_close(found, whole[positions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.kind == "pairs"])
def test_a_single_example_is_a_batch(name):
    chosen, columns = objective(loss=name), random_columns(1)
    leaves = columns | {key: columns[key].clone().requires_grad_() for key in LOGPS[:2]}
    statistics, _, _ = chosen.compute_statistics(columns, {}, learning=True)
    total, _ = chosen.compute_losses(leaves, statistics)
    total.sum().backward()
    assert total.shape == (1,) and total.isfinite().all()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())


# -- what would work -------------------------------------------------------------------------------------------------


def test_the_losses_for_some_columns_are_those_that_need_no_other():
    lengths = {"chosen_logp", "rejected_logp", "n_chosen_counted", "n_rejected_counted"}
    found = losses_for(lengths)
    assert {"simpo", "cpo", "orpo", "sft", "slic"} <= set(found) and "sigmoid" not in found
    assert set(losses_for(lengths | {"ref_chosen_logp", "ref_rejected_logp"})) >= {"sigmoid", "ipo", "r_dpo", *found}
    assert losses_for({"completion_logp", "ref_completion_logp", "label"}) == ["apo_zero_unpaired"]
    assert losses_for(set()) == []


def test_an_explicit_default_is_the_default():
    explicit = objective(loss={"sigmoid": 1}, beta=0.1, loss_args={"label_smoothing": 0})
    assert objective().loss_arguments == explicit.loss_arguments
