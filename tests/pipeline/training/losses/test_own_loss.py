"""A loss that somebody adds: written as the guide says it is listed and trained, and one that cannot be is refused in words."""

import math

import pyarrow.parquet as pq
import pytest
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.losses import LOSSES, STATISTICS, get_loss, hyperparameters
from prefcache.pipeline.training.losses.registry import loss, statistic
from prefcache.pipeline.training.objective import Objective
from tests.helpers.documents import blocks
from tests.helpers.losses import random_columns


@pytest.fixture(autouse=True)
def nothing_stays():
    losses, statistics = dict(LOSSES), dict(STATISTICS)
    yield
    for registry, before in ((LOSSES, losses), (STATISTICS, statistics)):
        registry.clear()
        registry.update(before)


def add(function, **said):
    said = {"formula": "-log s(x)", "when": "Never."} | said
    return loss(said.pop("formula"), **said)(function)


def add_the_guides() -> None:
    """The guide's own, letter by letter but for its name, beneath what the file that it goes into has imported."""
    from prefcache.pipeline.training.losses import pairs

    code = next(block for block in blocks("python") if "def bco_pair" in block)
    exec(code.replace("def bco_pair", "def own"), dict(vars(pairs)))


def test_the_guides_loss_is_listed_shown_and_trained(prefcache, config):
    add_the_guides()
    assert "own\n    Each answer is good or bad in itself" in prefcache("losses").stdout
    shown = prefcache("losses", "own").stdout
    assert shown.startswith("own\n\n    -log s(beta a_w)") and "\nWhen: Each answer is good or bad" in shown
    assert prefcache("losses", "own", "--json").stdout
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, config, "--set", "train.loss=own")
    assert f"own loss {2 * math.log(2):.6f}" in done.stderr  # two logistic losses at 0


def test_a_loss_of_labels_without_a_reference_is_listed_too(prefcache):
    def unlikelihood(completion_logp, label):
        """The likelihood of good answers. https://example.org"""

    add(unlikelihood)
    assert "without a reference: no scores are needed\n\nunlikelihood\n" in prefcache("losses").stdout


def test_a_parameter_that_is_no_column_is_refused_with_the_nearest():
    def own(chosen_logps, rejected_logp, *, beta=0.1): ...

    add(own)
    with pytest.raises(UsageError) as refused:
        get_loss("own")
    assert (
        "has the parameter chosen_logps, which is neither a column nor a statistic; the nearest is chosen_logp. "
        in str(refused.value)
    )


def test_a_whole_number_as_default_takes_fractions():
    def own(chosen_logp, rejected_logp, *, beta=1, k=3): ...

    add(own)
    assert hyperparameters(get_loss("own"), {"beta": 0.5, "k": "4"}) == {"beta": 0.5, "k": 4}


@pytest.mark.parametrize("shape", [(), (1,), (7, 1)])
def test_a_loss_that_does_not_give_one_value_per_example_is_refused(shape):
    def own(chosen_logp, rejected_logp):
        return torch.zeros(shape)

    add(own)
    with pytest.raises(UsageError, match=r"Loss 'own' gave values of shape .* for 7 examples. It has to return one"):
        Objective(Train(loss="own")).compute_losses(random_columns(7), {})


def trained(prefcache, config, *train: str, code: int = 0):
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    return prefcache("train", config, *(word for each in train for word in ("--set", f"train.{each}")), code=code)


def test_a_loss_that_reads_the_reference_of_one_answer_starts_as_others_do(prefcache, config):
    def own(chosen_logp, rejected_logp, ref_chosen_logp, *, beta=0.1):
        """https://example.org"""
        return -torch.nn.functional.logsigmoid(beta * (chosen_logp - ref_chosen_logp)) + 0 * rejected_logp

    add(own)
    assert f"own loss {math.log(2):.6f}" in trained(prefcache, config, "loss=own").stderr


def test_a_loss_without_a_value_at_the_start_is_refused(prefcache, config):
    def own(chosen_logp, ref_chosen_logp):
        return torch.sqrt(-1 - (chosen_logp - ref_chosen_logp))

    add(own)
    done = trained(prefcache, config, "loss=own", code=2)
    assert "Loss 'own' has no finite value where policy and reference agree" in done.stderr


def test_a_loss_and_a_statistic_stay_functions_to_be_called():
    def spread(chosen_logp):
        return chosen_logp.std()

    def by_spread(chosen_logp, spread):
        return chosen_logp * spread

    assert statistic(spread) is spread and STATISTICS["spread"].function is spread
    assert loss("p s", when="In this test.")(by_spread) is by_spread


@pytest.mark.parametrize("weighed", ["weighting=wpo", "tokens.ld_alpha=0"])
def test_a_statistic_of_one_answer_weighs_it_by_both(prefcache, config, tmp_path, weighed):
    def gain(chosen_logp, ref_chosen_logp):
        """What the statistic's pass over the batch has for chosen answers."""
        return (chosen_logp - ref_chosen_logp).mean()

    def own(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, gain):
        return (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp) + 0 * gain

    statistic(gain)
    add(own)
    runs = []
    for size in (1, 8):
        trained(prefcache, config, "loss=own", weighed, f"micro_batch_size={size}", f"run=of-{size}", "epochs=0.5")
        parts = sorted((tmp_path / f"runs/tiny/of-{size}/metrics").glob("*.parquet"))
        runs.append([row["gain"] for part in parts for row in pq.read_table(part).to_pylist()])
    assert len(runs[0]) > 3 and runs[0] == pytest.approx(runs[1], abs=1e-4) and abs(runs[0][-1]) > 1e-2
