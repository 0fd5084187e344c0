"""`prefcache runs` says of each run how far it came, what it found and what it takes on disk, and changes nothing."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import prefcache as api
from prefcache.pipeline.stored import artifact
from tests.helpers.processes import start_process
from tests.helpers.project import PREFCACHE, invoke, options, write_config
from tests.helpers.runs import metrics

SETTINGS = {"max_steps": 8, "checkpoint_every": 2, "eval_every": 4, "samples": 1, "checkpoints_at_end": "remove"}


class StopAtFive(api.TrainCallback):
    def on_step(self, event):
        return api.Stop("seen enough") if event.step == 5 else None


@pytest.fixture(scope="module")
def once(scored_once, model, tmp_path_factory) -> Path:
    """A finished run, one that a callback stopped, and one whose process was killed after the checkpoint of step 6."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("runs") / "it")
    config = write_config(folder, model, **SETTINGS)
    invoke(folder, "train", config)
    invoke(folder, "train", config, *options("train.run=killed", "train.loss=ipo", "train.checkpoints_at_end=keep"))
    os.chdir(folder)
    api.train(config, overrides={"train.run": "stopped"}, callbacks=[StopAtFive()], quiet=True)
    killed = folder / "runs/tiny/killed"
    shutil.rmtree(killed / "checkpoints/step-00000008")
    for name in ("manifest.json", "samples.parquet", *(f"{t}/to-00000008.parquet" for t in ("metrics", "steps"))):
        (killed / name).unlink()
    return folder


@pytest.fixture
def experiment(once, tmp_path, monkeypatch) -> Path:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/tiny"


def listed(*arguments) -> dict[str, dict]:
    done = invoke(Path.cwd(), "runs", *arguments, "--json")
    return {run["run"]: run for run in json.loads(done.stdout)["runs"]}


def test_states_and_steps(experiment):
    runs = listed("runs/tiny")
    assert {name: (run["state"], run["steps"], run["planned"], run["loss"]) for name, run in runs.items()} == {
        "killed": ("unfinished", 6, 8, "ipo"),
        "stopped": ("stopped", 5, 8, "sigmoid"),
        "trained": ("finished", 8, 8, "sigmoid"),
    }
    assert runs["stopped"]["note"] == "stopped at step 5 of 8 by StopAtFive: seen enough"
    assert listed() == listed("config.yaml") == runs


def test_a_finished_run_whose_model_is_gone_is_damaged(experiment):
    (weights,) = (experiment / "trained/model").glob("*.safetensors")
    weights.unlink()
    run = listed("runs/tiny")["trained"]
    assert (run["state"], run["note"]) == ("damaged", f"runs/tiny/trained/model/{weights.name} is missing")


def test_held_out_figures_are_those_of_the_metrics(experiment):
    for name, step in (("trained", 8), ("killed", 4), ("stopped", 5)):
        rows = {row["step"]: row for row in metrics(experiment / name)}
        run = listed()[name]
        assert run["evaluated"] == "held_out"
        for figures, row in ((run["before"], rows[0]), (run["after"], rows[step])):
            assert figures["step"] == row["step"]
            for ours, theirs in (
                ("reward_accuracy", "rewards/accuracies"),
                ("reward_margin", "rewards/margins"),
                ("preference_accuracy", "preference_accuracy"),
                ("loss", "loss"),
            ):
                if ours == "reward_accuracy" and figures["step"] == 0:
                    assert figures[ours] is None  # policy and reference agree: there are no rewards
                else:
                    assert figures[ours] == pytest.approx(row[f"eval_{theirs}"], abs=1e-12)


def test_bytes_are_those_on_disk(experiment):
    def du(*folders: Path) -> int:
        return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())

    for name, run in listed().items():
        folder = experiment / name
        assert run["bytes"] == {
            "model": du(folder / "model"),
            "checkpoints": du(folder / "checkpoints"),
            "tables": du(*(folder / table for table in ("metrics", "steps", "events", "throughput"))),
            "total": du(folder),
        }
    assert listed()["trained"]["bytes"]["checkpoints"] == 0 < listed()["stopped"]["bytes"]["checkpoints"]


def test_the_command_that_it_shows_resumes(prefcache, experiment):
    said = prefcache("runs").stdout
    command = said.partition("killed resumes at step 6:\n  prefcache ")[2].splitlines()[0].split()
    assert listed()["killed"]["resume"].split() == ["prefcache", *command]
    assert "resuming from step 6" in prefcache(*command).stderr
    assert listed()["killed"]["state"] == "finished"


def test_a_run_at_work_is_running_until_it_is_killed(experiment, tmp_path):
    long = options("train.run=long", "train.max_steps=100000", "train.eval_every=100000")
    process = start_process(tmp_path, "train", "config.yaml", *long)
    until = time.monotonic() + 120
    while not (experiment / "long/checkpoints/step-00000002").exists() and time.monotonic() < until:
        time.sleep(0.02)
    run = listed()["long"]
    assert run["state"] == "running" and run["planned"] == 100_000 and run["steps"] >= 2 and run["note"] is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed = listed()["long"]
    # Its claim is still on disk.
    assert (experiment / ".train-long.claim").exists() and killed["state"] == "unfinished"
    assert killed["steps"] == max(int(p.name[5:]) for p in (experiment / "long/checkpoints").glob("step-*"))


def test_a_strict_run_says_which_alert_ended_it(prefcache, experiment):
    strict = options("train.run=strict", "train.alerts=strict", "train.learning_rate=5.0", "train.max_steps=40")
    prefcache("train", "config.yaml", *strict, code=7)
    run = listed()["strict"]
    assert run["state"] == "unfinished" and run["alerts"]
    assert run["note"].startswith("ended at step ") and f"by the alert {next(iter(run['alerts']))}" in run["note"]


def test_damage_is_a_state_and_hides_no_other_run(experiment):
    (experiment / "trained/provenance.json").write_text("{}")
    runs = listed()
    assert runs["trained"]["state"] == "damaged" and "has no checksum" in runs["trained"]["note"]
    assert runs["stopped"]["state"] == "stopped"


def test_a_run_of_an_earlier_version_has_no_planned_steps(experiment):
    record = experiment / "trained/provenance.json"
    content = artifact.unseal(record)
    del content["steps"]
    record.write_bytes(artifact.seal(content))
    assert listed()["trained"]["planned"] is None and listed()["trained"]["steps"] == 8


def test_no_weights_are_read(experiment):
    """A file of 8 GB that was never written reads as zeros, and hashing it would take seconds."""
    for weights in (experiment / "trained/model/model.safetensors", experiment / "killed/checkpoints/step-00000006"):
        os.truncate(weights if weights.is_file() else weights / "weights.safetensors", 8 << 30)
    began = time.process_time()
    listed()
    assert time.process_time() - began < 2


@pytest.mark.parametrize("columns", [80, 60, 200])
def test_lines_fit_the_terminal(experiment, columns):
    """A table where it fits, else some lines for each run; but paths and commands stay whole, to be copied."""
    shutil.rmtree(experiment / "killed")
    ours, its = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    done = subprocess.Popen([PREFCACHE, "runs"], stdout=its, env=environment)
    os.close(its)
    said = b""
    while block := _read(ours):
        said += block
    assert done.wait(60) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()
    assert max(map(len, lines)) <= columns
    assert any("accuracy" in line for line in lines)
    assert any(line.split()[:2] == ["trained", "finished"] for line in lines) == (columns >= 80)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_an_experiment_without_runs_says_how_to_make_one(prefcache, prepared):
    assert "has no runs yet. Train one (prefcache train CONFIG)" in prefcache("runs", prepared).stdout


def test_python_gets_records_with_absolute_paths(experiment):
    runs = {run.run: run for run in api.runs("runs/tiny")}
    assert runs["trained"].folder == experiment / "trained" and runs["trained"].state == "finished"
    assert runs["trained"].after.loss == listed()["trained"]["after"]["loss"]
    assert runs["trained"].changed.tzinfo is not None
