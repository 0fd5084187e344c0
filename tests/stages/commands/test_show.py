"""show: one example token by token, as its reference and a trained policy see the answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefcache.pipeline.stored.prepared import Prepared
from prefcache.ui.token_process import TokenProcess
from tests.helpers import vision_models
from tests.helpers.examples import mask
from tests.helpers.project import invoke, pair, write_config

TRAIN = ["--set", "train.learning_rate=0.003", "--set", "train.epochs=2"]


@pytest.fixture
def rows(prefcache, config, tmp_path):
    prefcache("prepare", config)
    return Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()


def logps(folder, row, name):
    """By Transformers alone: the log-softmax at each answer token."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0].double()
    at = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return at[len(row["prompt_ids"]) - 1 :].numpy()


def test_each_token_has_what_both_models_give_it(prefcache, config, model, rows, tmp_path):
    prefcache("score", config)
    prefcache("train", config, *TRAIN)
    found = json.loads(prefcache("show", rows[3]["example_id"][:12], config, "--json").stdout)
    assert found["example_id"] == rows[3]["example_id"] and found["prompt"] == rows[3]["prompt"]
    for answer in found["answers"]:
        policy, reference = (
            logps(folder, rows[3], answer["name"]) for folder in (tmp_path / "runs/tiny/trained/model", model)
        )
        assert np.abs(policy - reference).max() > 1e-3
        for name, expected in (("policy", policy), ("reference", reference), ("log_ratio", policy - reference)):
            assert [token[name] for token in answer["tokens"]] == pytest.approx(expected, abs=1e-4)
            assert answer[f"{name}_sum"] == pytest.approx(expected.sum(), abs=1e-3)
        assert [token["id"] for token in answer["tokens"]] == rows[3][f"{answer['name']}_ids"]
    plain = prefcache("show", rows[3]["example_id"], config).stdout
    assert "most: " in plain and "\x1b" not in plain


def test_sums_are_of_the_tokens_that_count_and_the_others_are_marked(prefcache, config, model, rows, tmp_path):
    mask(tmp_path / "runs/tiny/prepared", lambda n: [0, 1, 2, n] if n > 2 else [0, n])
    prefcache("score", config)
    found = json.loads(prefcache("show", rows[3]["example_id"], config, "--json").stdout)
    for answer in found["answers"]:
        expected, n = logps(model, rows[3], answer["name"]), answer["n_tokens"]
        assert (answer["n_counted"], len(answer["tokens"])) == (n - 1, n)
        assert [token["counts"] for token in answer["tokens"]] == [True, False, *[True] * (n - 2)]
        assert answer["reference_sum"] == pytest.approx(expected.sum() - expected[1], abs=1e-3)
    assert f"{n} tokens, of which {n - 1} count: reference" in prefcache("show", rows[3]["example_id"], config).stdout


def test_an_adapter_is_shown_beside_its_model(prefcache, config, rows):
    prefcache("score", config)
    prefcache("train", config, *TRAIN, "--set", "train.lora={r: 4}")
    found = json.loads(prefcache("show", rows[0]["example_id"], config, "--json").stdout)
    assert any(abs(token["log_ratio"]) > 1e-3 for answer in found["answers"] for token in answer["tokens"])


def test_what_is_not_there_yet_is_said_with_its_remedy(prefcache, config, rows):
    before = prefcache("show", rows[0]["example_id"], config).stdout
    assert (
        "The reference has not been scored (prefcache score CONFIG)." in before and "(prefcache train CONFIG)" in before
    )
    prefcache("score", config)
    found = json.loads(prefcache("show", rows[0]["example_id"], config, "--json").stdout)
    assert found["run"] is None
    assert all(token["reference"] < 0 and token["policy"] is None for token in found["answers"][0]["tokens"])
    assert "red: the reference did not expect the token" in prefcache("show", rows[0]["example_id"], config).stdout


def test_an_id_that_is_none_or_several_names_some(prefcache, config, rows):
    known = rows[0]["example_id"]
    wrong = known[:-1] + ("0" if known[-1] != "0" else "1")
    failed = prefcache("show", wrong, config, code=2)
    assert f"the nearest is {known}" in failed.stderr
    assert "Give more of it" in prefcache("show", "", config, code=2).stderr


def test_sums_alone_are_refused_with_the_remedy(prefcache, config, rows):
    prefcache("score", config, "--set", "score.logps=false")
    failed = prefcache("show", rows[0]["example_id"], config, "--set", "score.logps=false", code=2)
    assert "no values of single tokens" in failed.stderr


def test_control_characters_do_not_reach_the_terminal(prefcache, config, tmp_path):
    record = {"prompt": "why \x1b[2J?", "chosen": "\x1b]0;title\x07a", "rejected": "b\u202ec"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    prefcache("prepare", config)
    (row,) = Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()
    shown = prefcache("show", row["example_id"], config).stdout
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def illustrated(tmp_path_factory) -> Path:
    """Scored pairs about pictures, and a run whose model is still its reference."""
    folder, model = tmp_path_factory.mktemp("illustrated"), vision_models.save("qwen2.5-vl")
    rows = []
    for n in range(4):
        vision_models.picture(20 + 4 * n, 30, seed=n).save(folder / f"{n}.png")
        rows.append(pair(n) | {"prompt": f"<image>{pair(n)['prompt']}", "images": [f"{n}.png"]})
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = write_config(folder, model)
    invoke(folder, "prepare", config)
    invoke(folder, "score", config)
    shutil.copytree(model, folder / "runs/tiny/trained/model")
    return folder


def show_all(folder: Path) -> list[dict]:
    examples = Prepared(folder / "runs/tiny/prepared").table()["example_id"].to_pylist()
    return [json.loads(invoke(folder, "show", each, "config.yaml", "--json").stdout) for each in examples]


def test_the_policy_sees_the_pictures_of_the_prompt(illustrated):
    tokens = [token for shown in show_all(illustrated) for answer in shown["answers"] for token in answer["tokens"]]
    # The cached values were computed from the same pictures by rows that share prompts.
    assert len(tokens) > 40
    assert [token["policy"] for token in tokens] == pytest.approx([token["reference"] for token in tokens], abs=1e-4)


def test_the_process_behind_the_pages_sees_them_too(illustrated):
    prepared = Prepared(illustrated / "runs/tiny/prepared")
    rows, process = prepared.table().to_pylist(), TokenProcess()
    try:

        def compute(row: dict, images: list[bytes]) -> list[float]:
            answers = {"chosen": row["chosen_ids"]}
            return process.compute_logps(illustrated / "runs/tiny/trained", row["prompt_ids"], images, answers, 120)[
                "chosen"
            ]

        shown = {each["example_id"]: each for each in show_all(illustrated)}
        for row in rows:
            expected = [token["reference"] for token in shown[row["example_id"]]["answers"][0]["tokens"]]
            assert compute(row, row["images"]) == pytest.approx(expected, abs=1e-4)
            assert compute(row, []) != pytest.approx(expected, abs=1e-2)
    finally:
        process.close()


def test_a_model_that_is_used_with_another_processor_is_refused(illustrated, tmp_path):
    folder = Path(shutil.copytree(illustrated, tmp_path / "other"))
    file = folder / "runs/tiny/trained/model/processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    file.write_text(json.dumps(config))
    example = Prepared(folder / "runs/tiny/prepared").table()["example_id"][0].as_py()
    failed = invoke(folder, "show", example, "config.yaml", code=2)
    assert "were prepared by another image processor" in failed.stderr
