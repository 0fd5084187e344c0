"""Callbacks see a run and may stop it, and nothing that is computed depends on them."""

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import prefcache
from prefcache.pipeline.errors import CallbackError, UsageError
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training import callbacks, checkpoints
from tests.helpers.project import ROOT, invoke, write_config
from tests.helpers.runs import metrics, table, weights

# Evaluations at 4, 8 and 12, and checkpoints at 5, 10 and 12.
SETTINGS = {"max_steps": 12, "eval_every": 4, "checkpoint_every": 5}
N_STEPS = 12


@pytest.fixture
def config(scored, model, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, model, **SETTINGS)


@pytest.fixture(scope="module")
def plain(scored_once, model, tmp_path_factory) -> Path:
    """The run without callbacks."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("plain") / "it")
    invoke(folder, "train", write_config(folder, model, **SETTINGS))
    return folder / "runs/tiny/trained"


def logged(run: Path) -> list[dict]:
    """The metrics of each step that has a value; which others have a column depends on where checkpoints divide the log."""
    return [{name: value for name, value in row.items() if value is not None} for row in metrics(run)]


class Witness(prefcache.TrainCallback):
    """Write down every call, and disturb what it can reach."""

    def __init__(self) -> None:
        self.seen = []

    def note(self, event):
        import torch

        self.seen.append(event)
        torch.manual_seed(event.step)
        if hasattr(event, "metrics"):
            event.metrics.clear()

    def on_start(self, event):
        self.note(event)

    def on_step(self, event):
        self.note(event)

    def on_evaluation(self, event):
        self.note(event)

    def on_checkpoint(self, event):
        assert (event.folder / "manifest.json").exists()
        self.note(event)

    def on_end(self, event):
        assert (event.model / "model.safetensors").exists()
        self.note(event)


class Losses(prefcache.TrainCallback):
    def __init__(self) -> None:
        self.losses, self.evaluations = {}, {}

    def on_step(self, event):
        self.losses[event.step] = event.metrics["loss"]

    def on_evaluation(self, event):
        self.evaluations[event.step] = event.metrics["eval_loss"]


class StopAt(prefcache.TrainCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event):
        return prefcache.Stop("enough <seen>") if event.step == self.step else None


class FailAt(prefcache.TrainCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event):
        if event.step == self.step:
            raise ZeroDivisionError("a slip of the user's")


def test_a_run_with_callbacks_is_the_run_without_bit_by_bit(config, plain, tmp_path):
    witness, losses = Witness(), Losses()
    result = prefcache.train(config, callbacks=[witness, losses], quiet=True)
    run = tmp_path / "runs/tiny/trained"
    assert metrics(run) == metrics(plain) and table(run, "steps") == table(plain, "steps")
    assert weights(run) == weights(plain)
    # The metrics are those logged, whatever the callback before does to its own copy.
    rows = metrics(run)
    assert losses.losses == {step: rows[step]["loss"] for step in range(1, N_STEPS + 1)}
    assert losses.evaluations == {step: rows[step]["eval_loss"] for step in (4, 8, 12)}
    assert [(type(event), event.step) for event in witness.seen] == [
        (prefcache.TrainStart, 0),
        *[(prefcache.TrainStep, step) for step in (1, 2, 3, 4)],
        (prefcache.TrainEvaluation, 4),
        (prefcache.TrainStep, 5),
        (prefcache.TrainCheckpoint, 5),
        *[(prefcache.TrainStep, step) for step in (6, 7, 8)],
        (prefcache.TrainEvaluation, 8),
        *[(prefcache.TrainStep, step) for step in (9, 10)],
        (prefcache.TrainCheckpoint, 10),
        *[(prefcache.TrainStep, step) for step in (11, 12)],
        (prefcache.TrainEvaluation, 12),
        (prefcache.TrainCheckpoint, 12),
        (prefcache.TrainEnd, 12),
    ]
    assert {(event.run, event.n_steps) for event in witness.seen} == {(run, N_STEPS)}
    assert result.stopped is None and not witness.seen[-1].stopped
    # A finished run calls nobody.
    again = Witness()
    assert not prefcache.train(config, callbacks=[again], quiet=True).changed and again.seen == []


def test_a_stop_ends_the_run_as_a_finished_one_and_everything_says_so(config, plain, tmp_path, capsys):
    end = Witness()
    result = prefcache.train(config, callbacks=[StopAt(6), end])
    sentence = "stopped at step 6 of 12 by StopAt: enough <seen>"
    run = tmp_path / "runs/tiny/trained"
    manifest = RunManifest.find(run)
    assert result.stopped == manifest.stopped and manifest.stopped.describe() == sentence and manifest.steps == 6
    assert end.seen[-1].stopped and end.seen[-1].step == 6
    assert sentence in repr(result) and sentence in capsys.readouterr().err
    # Up to there it is the run without callbacks; the stop adds the last step's evaluation.
    *before, last = logged(run)
    assert before == logged(plain)[:6] and last.items() > logged(plain)[6].items()
    assert result.evaluation["loss"] == last["eval_loss"]
    assert {row["step"] for row in table(run, "steps") if row["split"] == "held_out"} == {0, 4, 6}
    assert (run / "tokens.parquet").exists() and (run / "model/model.safetensors").exists()
    # The command line, the model card and the report know it.
    done = invoke(tmp_path, "train", config)
    assert sentence in done.stdout
    assert (
        f"train: it was {sentence}. Take the remaining steps with" in done.stderr
        and "continue_stopped=True" in done.stderr
    )
    assert "It was stopped at step 6 of 12 by StopAt: enough &lt;seen>." in (run / "model/README.md").read_text()
    page = prefcache.report(config, quiet=True).report.read_text()
    assert "The run is stopped at step 6 of 12 by StopAt: enough &lt;seen&gt;: 6 steps" in page


def test_a_stopped_run_can_take_its_remaining_steps(config, plain, tmp_path):
    prefcache.train(config, callbacks=[StopAt(6)], quiet=True)
    losses = Losses()
    result = prefcache.train(config, callbacks=[losses], continue_stopped=True, quiet=True)
    run = tmp_path / "runs/tiny/trained"
    assert result.changed and result.stopped is None and result.steps == N_STEPS
    assert sorted(losses.losses) == list(range(7, N_STEPS + 1)) and weights(run) == weights(plain)
    assert not prefcache.train(config, continue_stopped=True, quiet=True).changed


def test_a_run_that_is_killed_while_it_stops_still_ends_there(config, tmp_path):
    prefcache.train(config, callbacks=[StopAt(6)], quiet=True)
    run = tmp_path / "runs/tiny/trained"
    (run / "manifest.json").unlink()  # as if it had been killed after its last checkpoint
    result = prefcache.train(config, quiet=True)
    assert result.steps == 6 and result.stopped.callback == "StopAt"


def test_an_evaluation_may_stop_too_and_a_stop_at_the_last_step_is_none(config):
    class Patience(prefcache.TrainCallback):
        def on_evaluation(self, event):
            return prefcache.Stop("\ud800" * 1000)

    stopped = prefcache.train(config, overrides={"train.run": "a"}, callbacks=[Patience()], quiet=True).stopped
    assert stopped.describe() == f"stopped at step 4 of 12 by Patience: {'?' * 500}"
    whole = prefcache.train(config, overrides={"train.run": "b"}, callbacks=[StopAt(N_STEPS)], quiet=True)
    assert whole.steps == N_STEPS and whole.stopped is None


def test_a_failing_callback_leaves_a_checkpoint_and_its_own_traceback(config, plain, tmp_path):
    with pytest.raises(CallbackError) as caught:
        prefcache.train(config, callbacks=[FailAt(7)], quiet=True)
    assert str(caught.value) == (
        "FailAt.on_step failed at step 7 (ZeroDivisionError: a slip of the user's). Train again to resume from step 7, at which "
        "there is a checkpoint."
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "raise ZeroDivisionError" in "".join(traceback.format_exception(caught.value))
    run = tmp_path / "runs/tiny/trained"
    folder, state = checkpoints.find_newest(run, pytest.fail)
    assert folder.name == "step-00000007" and state.stopped is None and not (run / "manifest.json").exists()
    losses = Losses()
    assert prefcache.train(config, callbacks=[losses], quiet=True).steps == N_STEPS
    assert sorted(losses.losses) == list(range(8, N_STEPS + 1))
    assert weights(run) == weights(plain) and logged(run) == logged(plain)


@pytest.mark.parametrize(
    ("method", "answer", "sentence"),
    [
        ("on_step", True, r"on_step returned True; expected None or prefcache\.Stop"),
        ("on_step", prefcache.Stop, r"on_step returned <class .*Stop'>; expected None or prefcache\.Stop"),
        ("on_checkpoint", prefcache.Stop(), r"only on_step and on_evaluation may stop a run.* resume from step 5"),
        ("on_start", prefcache.Stop(), r"only on_step and on_evaluation may stop a run.* No step was taken"),
        ("on_end", 1, r"on_end returned 1; expected None.* The run is finished"),
    ],
)
def test_any_other_answer_is_refused(config, method, answer, sentence):
    odd = type("Odd", (prefcache.TrainCallback,), {method: lambda self, event: answer})
    with pytest.raises(CallbackError, match=sentence):
        prefcache.train(config, callbacks=[odd()], quiet=True)


def test_what_is_no_callback_and_what_would_never_be_called_is_refused(config):
    with pytest.raises(UsageError, match=r"found the class StopAt, expected an instance: StopAt\(\)"):
        prefcache.train(config, callbacks=[StopAt])
    with pytest.raises(UsageError, match=r"expected instances of prefcache\.TrainCallback"):
        prefcache.train(config, callbacks=[print])
    for no_list in (None, prefcache.TrainCallback()):
        with pytest.raises(UsageError, match=r"expected a list, as in callbacks=\[MyCallback\(\)\]"):
            prefcache.train(config, callbacks=no_list)
    with pytest.raises(UsageError, match=r"Slip\.on_step_end is never called\. A callback has on_start, on_step, "):
        type("Slip", (prefcache.TrainCallback,), {"on_step_end": lambda self, event: None})
    assert type("Fine", (prefcache.TrainCallback,), {"on_gpu": True}).on_gpu


def test_the_methods_are_those_of_the_class():
    own = [name for name in vars(prefcache.TrainCallback) if name.startswith("on_")]
    assert tuple(own) == callbacks._METHODS
    # None of them does anything by default.
    assert {getattr(prefcache.TrainCallback(), name)(None) for name in own} == {None}


# -- two processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import prefcache

rank = os.environ["RANK"]

class Seen(prefcache.TrainCallback):
    def __init__(self):
        self.steps = []
    def on_step(self, event):
        self.steps.append(event.step)
        if event.step == 3 and os.environ.get("RUN") == "stopped":
            return prefcache.Stop("all of us")
        if event.step == 3 and os.environ.get("RUN") == "failed":
            raise ValueError("only in the main process")

said = {}
for run in ("stopped", "failed"):
    os.environ["RUN"], seen = run, Seen()
    # A process other than the main one may as well have none.
    given = [seen] if rank == "0" else []
    try:
        result = prefcache.train("config.yaml", overrides={"train.run": run}, callbacks=given, quiet=True)
        said[run] = [seen.steps, result and result.stopped.describe()]
    except prefcache.CallbackError as error:
        said[run] = [seen.steps, str(error), repr(error.__cause__)]
with open(f"said-{rank}.json", "w") as file:
    json.dump(said, file)
"""


def test_all_processes_agree_on_a_stop_and_on_a_failure(config, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "script.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    main, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in "01")
    assert main["stopped"] == [[1, 2, 3], "stopped at step 3 of 12 by Seen: all of us"] and other["stopped"] == [
        [],
        None,
    ]
    sentence = main["failed"][1]
    assert (
        sentence.startswith("Seen.on_step failed at step 3 (ValueError: only in the main process).")
        and other["failed"][1] == sentence
    )
    assert main["failed"][2] == "ValueError('only in the main process')" and other["failed"][2] == "None"
    assert (tmp_path / "runs/tiny/failed/checkpoints/step-00000003/manifest.json").exists()
