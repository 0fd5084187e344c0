"""Two engines or dtypes over the same sequences, and how far they are apart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefcache.command_results import Margins
from prefcache.commands import parity
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.scoring.engines import EngineSpec
from prefcache.pipeline.stored.prepared import Prepared, Sequences
from tests.helpers.project import invoke, write_config, write_pairs
from tests.helpers.scored import write_labels


def scores(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_the_figures_are_those_that_one_computes_by_hand():
    a, b = scores([-1.0, -2.0], [-3.0]), scores([-1.5, -2.0], [-1.0])
    # tokens: |0.5|, |0|, |-2|; sequences: |0.5|, |-2|; bias: (0.5 + 0 - 2) / 3
    deviations = parity.measure_deviations(a, b)
    assert (deviations.sequences, deviations.tokens, deviations.not_finite) == (2, 3, 0)
    assert deviations.token.p50 == 0.5 and deviations.token.max == 2
    assert deviations.token.p99 == pytest.approx(0.5 + 0.98 * 1.5)
    assert dataclasses.astuple(deviations.sequence) == pytest.approx((1.25, 1.985, 2.0))
    assert deviations.bias == pytest.approx(-0.5)


def test_margins_that_change_sign_are_counted():
    a = scores([-1.0], [-2.0], [-5.0], [-3.0])  # margins 1 and -2
    b = scores([-2.5], [-2.0], [-5.0], [-3.5])  # margins -0.5 and -1.5
    assert parity.count_flipped_margins([0, 1, 6, 7], a, b) == Margins(pairs=2, flipped=1)
    # A label's answers make no margin alone.
    assert parity.count_flipped_margins([0, 2], a[:2], b[:2]) == Margins(pairs=0, flipped=0)


def test_tokens_without_a_finite_value_are_counted_apart():
    deviations = parity.measure_deviations(scores([-1.0, float("-inf")]), scores([-1.0, -2.0]))
    assert (deviations.not_finite, deviations.token.max, deviations.sequence.max) == (1, 0, None)


@pytest.mark.parametrize(
    ("text", "engine", "settings"),
    [
        ("plain", None, {}),
        ("transformers", "transformers", {}),
        ("vllm:float32", "vllm", {"dtype": "float32"}),
        ("transformers:eager", "transformers", {"attention": "eager"}),
        (
            "transformers:bfloat16:sdpa:packed",
            "transformers",
            {"dtype": "bfloat16", "attention": "sdpa", "rows": "packed"},
        ),
    ],
)
def test_a_side_is_an_engine_and_its_settings(text, engine, settings):
    assert parity.parse(text) == parity.Side(text, engine, settings)


@pytest.mark.parametrize(
    ("text", "error"),
    {
        "plain:float32": "takes nothing after its name",
        "transfomers": "there is no engine 'transfomers'. The nearest is transformers",
        "transformers:float99": "'float99' is not a setting of engine transformers.*Expected some of float32",
        "transformers:eager:sdpa": "'sdpa' is not a setting of engine transformers, or a second value",
        "vllm:padded": "'padded' is not a setting of engine vllm.*Expected some of float32, bfloat16, float16;",
        ":float32": "there is no engine ''",
        "": "there is no engine ''",
    }.items(),
)
def test_any_other_side_is_refused(text, error):
    with pytest.raises(UsageError, match=error):
        parity.parse(text)


@pytest.fixture(scope="module")
def config(model, tmp_path_factory) -> Path:
    """A config for 60 pairs that are prepared, in the working directory."""
    folder = tmp_path_factory.mktemp("parity")
    write_pairs(folder / "pairs.jsonl", 60)
    config = write_config(folder, model)
    invoke(folder, "prepare", "-q", config)
    return config


@pytest.fixture(scope="module")
def compare(config):
    return lambda *arguments, code=0: invoke(config.parent, "parity", config, *arguments, code=code)


def test_a_wrong_side_is_refused_before_anything_is_loaded(compare):
    done = compare("plain", "transfomers", code=2)
    assert done.stderr.startswith("error: parity.engine") and "loading" not in done.stderr


def test_the_sample_has_whole_pairs_the_longest_among_them(config):
    table = Prepared(config.parent / "runs/tiny/prepared").table()
    slots = parity.sample_slots(table, 16)
    assert len(set(slots)) == 16 and {slot ^ 1 for slot in slots} == set(slots)
    n = np.array(table["n_prompt"]) + np.maximum(table["n_chosen"], table["n_rejected"])
    assert {slot // 2 for slot in slots} >= set(np.argsort(-n, kind="stable")[:2].tolist())
    assert len(parity.sample_slots(table, 10_000)) == 2 * len(table)


def test_a_sample_of_labels_leaves_out_what_is_not_there():
    columns = {"n_prompt": [1, 1, 1], "n_completion": [2, 3, 4], "n_kl": [2, None, 2]}
    keys = {"completion_key": [b"b" * 16, b"c" * 16, b"a" * 16], "kl_key": [b"d" * 16, None, b"e" * 16]}
    ids = {"completion_ids": [[1, 1]] * 3, "kl_ids": [[1, 1]] * 3}
    assert sorted(parity.sample_slots(pa.table(columns | keys | ids), 10)) == [0, 1, 2, 4, 5]


def test_the_plain_forward_and_the_engine_agree_to_rounding(compare):
    result = json.loads(compare("plain", "transformers", "--json").stdout)
    assert (result["sequences"], result["pairs"], result["flipped"], result["not_finite"]) == (32, 16, 0, 0)
    assert 0 <= result["token"]["p50"] <= result["token"]["p99"] <= result["token"]["max"] < 1e-4
    assert [side["engine"] for side in result["numerics"]] == ["plain", "transformers"]


def test_the_worst_tokens_are_named_with_both_values(compare, config, model):
    arguments = ["transformers:float32", "transformers:bfloat16", "-n", "12"]
    result = json.loads(compare("-q", *arguments, "--json").stdout)
    assert result["token"]["max"] > 1e-3
    worst = result["worst"][0]
    assert abs(worst["a"] - worst["b"]) == pytest.approx(result["token"]["max"], rel=1e-5)
    # The same token by Transformers alone.
    table = Prepared(config.parent / "runs/tiny/prepared").table()
    row = table["example_id"].to_pylist().index(worst["example_id"])
    sequence = Sequences(table)[2 * row + (worst["answer"] == "rejected")]
    ids = torch.tensor([[*sequence.prompt_ids.tolist(), *sequence.completion_ids.tolist()]])
    at = len(sequence.prompt_ids) + worst["position"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0, at - 1]
    assert worst["a"] == pytest.approx(logits.log_softmax(-1)[ids[0, at]].item(), abs=1e-4)

    shown = compare("-q", *arguments).stdout
    assert worst["example_id"] in shown and repr(worst["token"]) in shown and "change sign" in shown


def test_labelled_answers_are_compared_without_a_cache(prefcache, tmp_path, model):
    write_labels(tmp_path / "pairs.jsonl", 8)
    config = write_config(tmp_path, model)
    prefcache("prepare", "-q", config)
    result = json.loads(prefcache("parity", "-q", config, "plain", "transformers:padded", "-n", "6", "--json").stdout)
    assert result["sequences"] == 6
    assert not (tmp_path / "cache").exists()


def test_no_two_models_are_in_memory_at_once(compare, monkeypatch):
    alive = []

    class Fake:
        facts = {}  # noqa: RUF012

        def __init__(self, reference, score, images):
            alive.append(self)

        def score(self, sequences):
            assert alive == [self]
            return [np.zeros(len(sequence.completion_ids), np.float32) for sequence in sequences]

        def close(self):
            alive.remove(self)

    spec = EngineSpec(
        numerics=lambda reference, score: {"engine": score.engine, "dtype": score.dtype}, load=Fake, remedy=""
    )
    monkeypatch.setattr(parity, "find_engine", lambda name: spec)
    result = json.loads(compare("-q", "transformers", "vllm:float16", "--json").stdout)
    assert alive == [] and [side["dtype"] for side in result["numerics"]] == ["auto", "float16"]
