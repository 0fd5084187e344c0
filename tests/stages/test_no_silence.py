"""However slow the model, the tokenizer and the disk: nothing is silent for more than five seconds."""

import shutil
import sys

import pytest

from tests.helpers.project import ROOT, options, write_config, write_pairs
from tests.helpers.terminals import Output, run_on_terminal, run_piped

SECONDS, MARGIN = 5.0, 2.5  # the margin for a busy machine, and for what is imported before there is progress
COMMAND = [sys.executable, "-m", "tests.helpers.slow_machine"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("slow")
    write_pairs(folder / "pairs.jsonl", 12)
    write_config(folder, model, batch_size=6, epochs=1, eval_every=1, sample_tokens=4)
    return folder


def run(folder, display: str, stage: str) -> Output:
    start = run_on_terminal if display == "a terminal" else run_piped
    command = [*COMMAND, stage, "config.yaml", *options("score.parity_sample=4")]
    done = start(command, cwd=folder, environment={"PYTHONPATH": str(ROOT)})
    assert done.code == 0, done.text
    return done


@pytest.mark.slow
@pytest.mark.parametrize("display", ["a terminal", "a pipe"])
def test_no_stage_is_silent_for_more_than_five_seconds(experiment, tmp_path, display):
    folder = shutil.copytree(experiment, tmp_path / "it")
    done = {stage: run(folder, display, stage) for stage in ("prepare", "score", "train")}
    silences = {stage: each.longest_silence for stage, each in done.items()}
    assert max(silences.values())[0] <= SECONDS + MARGIN, silences
    # With what it is doing. A bar is shown after a second, a line after five.
    expected = {
        "prepare": ["tokenize"],
        "score": ["hash model.safetensors", "load ", "plain float32 forward"],
        "train": ["load "],
    }
    if display == "a terminal":
        expected["train"] += ["look up in cache", "check the start", "evaluate", "greedy answers"]
    for stage, works in expected.items():
        missing = [work for work in works if work not in done[stage].plain]
        assert not missing, (stage, missing, done[stage].plain)
    assert "train: 2/2 steps" in done["train"].plain.replace("━", "").replace("train  ", "train: ")


@pytest.mark.slow
def test_quiet_is_silent_and_a_sweep_says_which_run_it_is(experiment, tmp_path):
    folder = shutil.copytree(experiment, tmp_path / "it")
    for stage in ("prepare", "score"):
        done = run_piped([sys.executable, "-m", "prefcache", stage, "config.yaml", "--quiet"], cwd=folder)
        assert (done.code, done.text) == (0, "")
    sweep = ["train", "config.yaml", "--sweep", "train.beta=0.1,0.2"]
    done = run_on_terminal([sys.executable, "-m", "prefcache", *sweep], cwd=folder)
    bars = [line for line in done.screen if "2/2 steps" in line]
    assert [bar.partition(": train")[0] for bar in bars] == ["run 1 of 2", "run 2 of 2"]
    assert "run 2 of 2: train: rows shared" in done.screen
    done = run_piped([sys.executable, "-m", "prefcache", *sweep, *options("train.seed=1")], cwd=folder)
    lines = done.text.splitlines()
    assert lines[-1].startswith("run 2 of 2: train: ") and any("run 1 of 2: train: 2/2 steps" in line for line in lines)
