"""A sweep is every combination of its settings, each in a folder of its own, over one cache."""

import json

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.sweep import combinations
from tests.helpers.project import write_config, write_pairs


def test_a_sweep_is_every_combination_in_the_order_written():
    found = combinations("train.loss=sigmoid,ipo train.beta=0.05,0.1")
    assert [each.name for each in found] == [
        "loss=sigmoid+beta=0.05",
        "loss=sigmoid+beta=0.1",
        "loss=ipo+beta=0.05",
        "loss=ipo+beta=0.1",
    ]
    assert found[1].overrides == ("train.loss=sigmoid", "train.beta=0.1", "train.run=loss=sigmoid+beta=0.1")


def test_brackets_and_quotes_hold_commas_and_blanks_together():
    found = combinations("train.loss=ipo,{sigmoid: 0.8, sft: 0.2} train.tokens.clamp=[-1, 1],[-2, 2]")
    assert [each.overrides[:2] for each in found] == [
        ("train.loss=ipo", "train.tokens.clamp=[-1, 1]"),
        ("train.loss=ipo", "train.tokens.clamp=[-2, 2]"),
        ("train.loss={sigmoid: 0.8, sft: 0.2}", "train.tokens.clamp=[-1, 1]"),
        ("train.loss={sigmoid: 0.8, sft: 0.2}", "train.tokens.clamp=[-2, 2]"),
    ]
    assert found[2].name == "loss=sigmoid-0.8-sft-0.2+tokens.clamp=1-1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names nothing"),
        ("train.beta", "expected KEY=VALUE,VALUE"),
        ("train.beta=", "expected KEY=VALUE,VALUE"),
        ("prepare.seed=1,2", "expected keys of train"),
        ("train.run=a,b", "expected keys of train"),
        ("train.beta=0.1 train.beta=0.2", "names train.beta twice"),
        ("train.beta=0.1,0.1", "would have the same name"),
        ("train.loss={a,b", "is not YAML"),
        (f"train.seed={','.join(map(str, range(1001)))}", "1,001 runs; at most 1,000 are allowed"),
    ],
)
def test_what_makes_no_sweep_is_refused(text, says):
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        combinations(text)


def test_eight_configurations_cost_one_pass_of_the_reference(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 30)
    config = write_config(tmp_path, model, epochs=0.5, samples=0)
    prefcache("prepare", config)
    assert json.loads(prefcache("score", config, "--json").stdout)["scored"] > 0
    sweep = "train.loss=sigmoid,simpo train.beta=0.05,0.1 train.learning_rate=1e-4,1e-3"
    found = json.loads(prefcache("train", config, "--json", "--sweep", sweep).stdout)["runs"]
    assert len(found) == len({run["run"] for run in found}) == 8
    for more in ("train.seed=1", "train.batch_size=4", "train.loss=ipo"):
        prefcache("train", config, "--set", more, "--set", "train.run=more")
        assert json.loads(prefcache("score", config, "--json").stdout)["tokens"] == 0
    # The same sweep again has nothing to do.
    again = json.loads(prefcache("train", config, "--json", "--sweep", sweep).stdout)["runs"]
    assert [run["changed"] for run in again] == [False] * 8


def test_a_sweep_is_compared_by_held_out_examples(prefcache, config):
    prefcache("prepare", config)
    prefcache("score", config)
    shown = prefcache("train", config, "--sweep", "train.loss=sigmoid,ipo", "--set", "train.epochs=0.5").stdout
    assert "held-out pairs" in shown and "reward accuracy" in shown
    assert "loss=sigmoid" in shown and "loss=ipo" in shown and "models: runs/tiny/RUN/model" in shown


def test_a_wrong_value_ends_a_sweep_before_its_first_run(prefcache, config, tmp_path):
    prefcache("prepare", config)
    prefcache("score", config)
    done = prefcache("train", config, "--sweep", "train.loss=sigmoid,kto", code=2)
    assert "Loss 'kto' reads" in done.stderr
    assert not list((tmp_path / "runs/tiny").glob("loss=*"))
