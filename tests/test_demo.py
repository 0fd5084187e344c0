"""The demo, by the README's first command in a fresh clone: what it learns is measured, for three seeds."""

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT, Clone

pytestmark = pytest.mark.xdist_group("demo")


def result(demo: Clone, run: str = "trained") -> dict[str, Any]:
    return json.loads((demo.folder / f"runs/demo/{run}/manifest.json").read_text())


def share(kinds: dict[str, int], kind: str) -> float:
    return kinds[kind] / sum(kinds.values())


def test_the_committed_pairs_are_what_their_generator_writes(tmp_path):
    written = tmp_path / "pairs.jsonl"
    subprocess.run([sys.executable, ROOT / "data/demo/make_pairs.py", written], check=True)
    assert written.read_bytes() == (ROOT / "data/demo/pairs.jsonl").read_bytes()


def test_before_training_both_kinds_of_answer_are_about_equally_common(demo):
    kinds = result(demo)["before"]["kinds"]
    assert sum(kinds.values()) >= 200
    assert 0.35 <= share(kinds, "preferred") <= 0.65 and 0.35 <= share(kinds, "rejected") <= 0.65


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_training_held_out_prompts_get_the_preferred_kind_of_answer(demo, seed):
    run = f"seed{seed}" if seed else "trained"
    if seed:
        demo.run(f"make train RUN={run} SET=train.seed={seed}")
    after = result(demo, run)["after"]
    assert share(after["kinds"], "preferred") >= 0.9
    assert after["evaluation"]["rewards/accuracies"] >= 0.95


def test_the_table_shows_what_was_measured(demo):
    kinds = result(demo)["after"]["kinds"]
    assert f"{share(kinds, 'preferred'):.1%}" in demo.demo_output
    assert "before" in demo.demo_output and "after" in demo.demo_output


def test_a_second_make_does_nothing_and_says_so(demo):
    done = demo.run("make prepare score train")
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        "prepare: up to date",
        "score: up to date",
        "train: up to date",
    ]


def test_make_score_after_an_append_scores_only_what_is_new(demo):
    pairs = demo.folder / "data/demo/pairs.jsonl"
    before = pairs.read_bytes()
    line = {"prompt": "Is it new?", "chosen": "It is new.", "rejected": "No."}
    try:
        with open(pairs, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        n = 2 * len(before.splitlines())
        assert f"{n + 2:,} sequences, {n:,} already cached, 2 scored now" in demo.run("make score").stdout
    finally:
        pairs.write_bytes(before)
    assert f"{n:,} already cached, 0 scored now" in demo.run("make score").stdout


def test_the_reference_is_the_same_bytes_wherever_it_is_built(demo, tmp_path):
    subprocess.run([sys.executable, ROOT / "data/demo/make_reference.py", tmp_path / "again"], check=True)
    built = demo.folder / "data/demo/reference/model.safetensors"
    assert (tmp_path / "again/model.safetensors").read_bytes() == built.read_bytes()
