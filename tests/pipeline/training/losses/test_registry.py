"""What holds of every loss: its signature is what it reads, its gradient its slope, its value finite and its own."""

import inspect
import re

import pytest
import torch

from prefcache.pipeline import config_file
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.losses import LOSSES, STATISTICS, get_loss, hyperparameters, registry
from prefcache.pipeline.training.losses.registry import DIVERGENCES
from tests.helpers.losses import (
    COLUMNS,
    call,
    extreme_columns,
    has_the_gradient_of_its_values,
    is_finite,
    learnt,
    random_columns,
    statistics,
)

of_every_loss = pytest.mark.parametrize("name", LOSSES)


def divergences(name: str, alphas: tuple[float, ...]) -> list[dict]:
    """Every divergence that a loss has."""
    if "f_divergence" not in LOSSES[name].hyperparameters:
        return [{}]
    of_alpha = [{"f_divergence": DIVERGENCES[-1], "f_alpha": alpha} for alpha in alphas]
    return [*({"f_divergence": divergence} for divergence in DIVERGENCES[:-1]), *of_alpha]


def with_each(name: str, key: str, values: tuple[float, ...]) -> list[dict]:
    return [{key: value} for value in values] if key in LOSSES[name].hyperparameters else [{}]


# -- what it says of itself ------------------------------------------------------------------------------------------


def test_the_signature_is_the_declaration():
    loss = get_loss("simpo")
    assert loss.reads == loss.columns == ("chosen_logp", "rejected_logp", "n_chosen_counted", "n_rejected_counted")
    assert loss.hyperparameters == {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}


def test_a_statistics_columns_are_the_losss():
    assert get_loss("sft").reads == ("chosen_logp", "mean_n_chosen_counted")
    assert get_loss("sft").columns == ("chosen_logp", "n_chosen_counted")
    assert get_loss("kto").columns == ("completion_logp", "ref_completion_logp", "label", "kl_logp", "ref_kl_logp")
    assert (get_loss("sft").kind, get_loss("kto").kind) == ("pairs", "labels")


@of_every_loss
def test_a_loss_reads_columns_and_statistics_that_exist(name):
    loss = LOSSES[name]
    parameters = inspect.signature(loss.function).parameters.values()
    assert [*loss.reads, *loss.hyperparameters] == [parameter.name for parameter in parameters]
    assert set(loss.reads) <= set(COLUMNS) | set(STATISTICS) and set(loss.columns) <= set(COLUMNS)
    assert set(loss.ranges) <= set(loss.hyperparameters)


@of_every_loss
def test_a_loss_names_its_paper_and_says_when_and_what_to_expect(name):
    loss = LOSSES[name]
    assert loss.papers and all(paper.startswith("https://") for paper in loss.papers)
    assert loss.summary.endswith(".") and loss.when.endswith(".") and loss.formula
    assert {each.direction for each in loss.healthy} & {"rises", "falls"}
    # What runs log, TRL's names and those of statistics: alerts look for these.
    logged = {f"rewards/{each}" for each in ("margins", "accuracies")} | {
        f"logps/{each}" for each in ("chosen", "rejected")
    }
    assert {each.metric for each in loss.healthy} <= {"loss", *logged, *STATISTICS}
    assert {each.direction for each in loss.healthy} <= {"rises", "falls", "may fall", "holds"}


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.reads_reference])
def test_what_a_loss_without_a_reference_expects_is_not_beside_one(name):
    # Where nothing is taken off, the first margin is the model's own, and half of them being right is no rule.
    for each in LOSSES[name].healthy:
        assert "the reference" not in each.note and "from about 0.5" not in each.note


PLAIN, F = {"beta": 0.1}, {"f_divergence": "reverse_kl", "f_alpha": 0.5}
# TRL's, or the paper's where TRL has no such loss: what a run gets that says nothing.
DEFAULTS = {
    "kto": {**PLAIN, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "apo_zero_unpaired": {**PLAIN, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {**PLAIN, "min_density_ratio": 0.5, "max_density_ratio": 10.0},
    "sigmoid": {**PLAIN, "label_smoothing": 0.0, **F},
    "sigmoid_norm": {"beta": 5.0, **F},
    "hinge": {**PLAIN, **F},
    "ipo": {**PLAIN, "per_token": True, **F},
    "exo_pair": {**PLAIN, "label_smoothing": 1e-3, **F},
    "robust": {**PLAIN, "label_smoothing": 0.1, **F},
    "aot": {**PLAIN, "label_smoothing": 0.0},
    "aot_unpaired": {**PLAIN, "label_smoothing": 0.0},
    "discopop": {**PLAIN, "tau": 0.05, **F},
    "sft": {},
    "dpop": {"beta": 0.3, "penalty": 50.0},
    "rpo": {**PLAIN, "eta": 1.0, "distance": "backward"},
    "odpo": {**PLAIN, "alpha": 1.0, "offset": "log"},
    "r_dpo": {**PLAIN, "alpha": 0.01},
    "alpha_dpo": {"beta": 2.5, "gamma": 1.5, "alpha": 0.5, "momentum": 0.9},
    "dr_dpo": {**PLAIN, "beta_prime": 1.0},
    "chi_po": {**PLAIN, "r_max": 10.0},
    "beta_dpo": {**PLAIN, "alpha": 0.6, "keep": 0.8, "momentum": 0.9, "min_beta": 1e-3},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
    "alphapo": {"beta": 2.0, "gamma": 1.0, "alpha": 0.25, "label_smoothing": 0.0},
    "cpo": {**PLAIN, "label_smoothing": 0.0, "nll": 1.0},
    "cpo_hinge": {**PLAIN, "nll": 1.0},
    "cpo_ipo": {**PLAIN, "nll": 1.0},
    "slic": {"delta": 1.0, "nll": 0.1},
    **dict.fromkeys(
        ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "kto_pair", "cal_dpo", "orpo"), PLAIN
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_known_ones(name):
    """Another default would change every run that says nothing."""
    loss = LOSSES[name]
    assert loss.hyperparameters == DEFAULTS[name]
    own = inspect.signature(loss.function).parameters
    assert {key: own[key].default for key in loss.hyperparameters} == DEFAULTS[name]


def test_what_is_taken_over_the_batch_per_token_or_from_plain_sums_is_known():
    marked = {
        "over_batch": {"aot", "aot_unpaired", "dr_dpo"},
        "per_token": {"simpo", "alphapo", "cpo_ipo", "orpo"},
        "plain": {"sft"},
    }
    for mark, names in marked.items():
        assert {name for name in DEFAULTS if getattr(LOSSES[name], mark)} == names
    assert not any(getattr(LOSSES["ipo"], mark) for mark in marked)


@of_every_loss
def test_a_losss_defaults_are_within_its_ranges(name):
    assert hyperparameters(LOSSES[name], LOSSES[name].hyperparameters) == LOSSES[name].hyperparameters


# -- values and gradients --------------------------------------------------------------------------------------------


@of_every_loss
def test_a_loss_is_one_value_per_example(name):
    for n in (1, 7):
        assert call(name, random_columns(n)).shape == (n,)


@of_every_loss
def test_only_a_loss_over_the_batch_depends_on_other_examples(name):
    here, elsewhere = random_columns(6), random_columns(6, seed=1)
    found, _ = statistics(name, here)
    changed = []
    for kept in range(6):
        others = {key: torch.where(torch.arange(6) == kept, here[key], elsewhere[key]) for key in here}
        before, after = (call(name, columns, found=found)[kept].item() for columns in (here, others))
        changed.append(after != pytest.approx(before, rel=1e-12))
    assert any(changed) is LOSSES[name].over_batch


@of_every_loss
def test_without_statistics_a_loss_is_the_same_alone(name):
    if not LOSSES[name].over_batch and not LOSSES[name].statistics:
        columns = random_columns(6)
        alone = [call(name, {key: values[i : i + 1] for key, values in columns.items()}) for i in range(6)]
        torch.testing.assert_close(torch.cat(alone), call(name, columns), rtol=1e-12, atol=1e-12)


@of_every_loss
def test_the_gradient_of_a_loss_is_its_slope(name):
    for given in divergences(name, (0.5, 1.0, 1.0001, 1.3)):
        assert has_the_gradient_of_its_values(name, random_columns(6), **given)


@of_every_loss
def test_a_loss_teaches_the_policy_and_nothing_else(name):
    columns = {key: values.requires_grad_() for key, values in random_columns(30).items()}
    read = [column for column in LOSSES[name].columns if column.endswith("_logp")]
    slopes = torch.autograd.grad(call(name, columns).sum(), [columns[c] for c in read], materialize_grads=True)
    taught = {column for column, slope in zip(read, slopes, strict=True) if slope.abs().max() > 0}
    assert {column for column in taught if not column.startswith("ref_")} == set(learnt(name))


@of_every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ten_thousand_nats_stay_finite_at_any_beta(name, dtype):
    columns = extreme_columns(dtype)
    for given in divergences(name, (-2.0, 0.5, 0.99, 1.0, 1.0001, 3.0)):
        for beta in ({}, *with_each(name, "beta", (1e-9, 1e-3, 1.0, 1e3))):
            assert is_finite(name, columns, **given, **beta), given | beta


@of_every_loss
def test_other_hyperparameters_at_their_ends_stay_finite(name):
    ends = {"alpha": (-3.0, 1e-5, 0.01, 3.0), "label_smoothing": (1e-12, 0.4999), "tau": (1e-6, 1e3)}
    ends |= {"gamma": (0.0, 1e3), "nll": (0.0, 1e3), "delta": (0.0, 1e3)}
    for key, values in ends.items():
        allowed = [value for value in values if key not in LOSSES[name].ranges or is_allowed(name, key, value)]
        for given in with_each(name, key, tuple(allowed)):
            assert is_finite(name, extreme_columns(), **given), given


def is_allowed(name: str, key: str, value: float) -> bool:
    try:
        return hyperparameters(LOSSES[name], {key: value})[key] == value
    except UsageError:
        return False


# -- asking for one --------------------------------------------------------------------------------------------------


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"train.loss: there is no loss 'sigmiod'. The nearest is sigmoid. `prefcache"):
        get_loss("sigmiod")
    with pytest.raises(UsageError, match=r"there is no loss 'zzz'\. `prefcache losses` lists them"):
        get_loss("zzz")


@pytest.mark.parametrize("name", ["tdpo", "TDPO"])
def test_tdpo_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match=r"train.loss: TDPO compares the whole distributions .* live reference"):
        get_loss(name)


def test_hyperparameters_are_the_losss_own_under_what_is_given():
    assert hyperparameters(get_loss("hinge"), {"beta": 0.3}) == get_loss("hinge").hyperparameters | {"beta": 0.3}
    assert hyperparameters(get_loss("ipo"), {"per_token": False})["per_token"] is False


def test_1e_2_is_a_number_although_yaml_1_1_reads_text():
    said = ["model=m", "out=o", "prepare.data=d", "train.loss_args.label_smoothing=1e-2"]
    found = hyperparameters(get_loss("sigmoid"), config_file.load(None, said).train.loss_args)
    assert found["label_smoothing"] == 0.01


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sigmoid", {"beta": 0}, "train.beta: found 0.0; loss 'sigmoid' takes values in (0, inf)."),
        ("sigmoid", {"beta": "nan"}, "train.beta: found nan; loss 'sigmoid' takes values in (0, inf)."),
        ("sigmoid", {"beta": True}, "train.beta: found True, expected a float for loss 'sigmoid'."),
        (
            "robust",
            {"label_smoothing": 0.5},
            "train.loss_args.label_smoothing: found 0.5; loss 'robust' takes values in [0, 0.5).",
        ),
        (
            "exo_pair",
            {"label_smoothing": 0},
            "train.loss_args.label_smoothing: found 0.0; loss 'exo_pair' takes values in (0, 1).",
        ),
        (
            "sigmoid",
            {"label_smoothing": "much"},
            "train.loss_args.label_smoothing: found 'much', expected a float for loss 'sigmoid'.",
        ),
        ("ipo", {"per_token": "maybe"}, "train.loss_args.per_token: found 'maybe', expected a bool for loss 'ipo'."),
        (
            "hinge",
            {"f_divergence": "kl"},
            "train.loss_args.f_divergence: found 'kl'; loss 'hinge' takes one of "
            "reverse_kl, forward_kl, js_divergence, alpha_divergence.",
        ),
        ("kto", {"desirable_weight": -1}, "train.loss_args.desirable_weight: found -1.0; loss 'kto' takes values in "),
        ("simpo", {"gamma": "inf"}, "train.loss_args.gamma: found inf; loss 'simpo' takes values in [0, inf)."),
    ],
)
def test_a_hyperparameter_of_a_wrong_kind_or_beyond_its_range_is_refused(name, given, message):
    with pytest.raises(UsageError) as refused:
        hyperparameters(get_loss(name), given)
    assert str(refused.value).startswith(message)


@of_every_loss
def test_every_number_of_a_loss_has_to_be_finite(name):
    loss = LOSSES[name]
    for key, default in loss.hyperparameters.items():
        if isinstance(default, float):
            for value in (float("nan"), float("inf"), "much", True, [1.0]):
                with pytest.raises(UsageError, match=f"train.*{key}: found .*{name}"):
                    hyperparameters(loss, {key: value})


def test_f_alpha_without_its_divergence_is_refused():
    with pytest.raises(UsageError, match=r"f_alpha belongs to alpha_divergence, and loss 'sigmoid' uses reverse_kl"):
        hyperparameters(get_loss("sigmoid"), {"f_alpha": 0.3})
    given = {"f_alpha": 0.3, "f_divergence": "alpha_divergence"}
    assert hyperparameters(get_loss("sigmoid"), given)["f_alpha"] == 0.3


@pytest.mark.parametrize("name", registry.LOSS_ALIASES)
def test_a_name_from_elsewhere_leads_to_the_loss(name):
    same = registry.LOSS_ALIASES[name]
    with pytest.raises(UsageError, match=f"here it is {re.escape(same)}"):
        get_loss(name.upper())
    assert same.split(",")[0].split(" ")[0] in {*LOSSES, "any"} and name not in LOSSES
