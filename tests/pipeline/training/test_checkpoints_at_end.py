"""A finished run keeps its model; its checkpoints go once the manifest is on disk, however often the process is killed."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

import prefcache as api
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training import checkpoints
from tests.helpers.project import invoke, options, write_config
from tests.helpers.runs import weights

SETTINGS = {"max_steps": 6, "checkpoint_every": 2, "eval_every": 2, "samples": 1, "checkpoints_at_end": "remove"}


@pytest.fixture
def config(scored, model, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, model, **SETTINGS)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs/tiny/trained"


def steps_of(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


class StopAt(api.TrainCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event):
        return api.Stop("seen enough") if event.step == self.step else None


# -- what stays ------------------------------------------------------------------------------------------------------


def test_a_finished_run_keeps_its_model_and_says_what_it_removed(prefcache, config, run):
    kept = prefcache("train", config, *options("train.run=kept", "train.checkpoints_at_end=keep"))
    assert steps_of(run.with_name("kept")) == [4, 6] and "removed" not in kept.stderr
    n_bytes = sum(
        file.stat().st_size for file in (run.with_name("kept") / "checkpoints").rglob("*.*") if file.is_file()
    )
    done = prefcache("train", config)
    assert (
        f"train: removed the checkpoints, {n_bytes / 1000:.3g} kB" in done.stderr
        and "checkpoints_at_end" in done.stderr
    )
    assert not (run / "checkpoints").exists()
    assert weights(run) == weights(run.with_name("kept"))
    # Everything that reads a finished run still does.
    again = prefcache("train", config, *options("train.checkpoints_at_end=keep"))
    assert "nothing to do" in again.stderr
    rows = json.loads(prefcache("sql", "select run, step from checkpoints order by step", "runs/tiny", "--json").stdout)
    assert rows == [{"run": "kept", "step": 4}, {"run": "kept", "step": 6}]
    findings = json.loads(prefcache("doctor", config, "--json").stdout)["findings"]
    assert [each["state"] for each in findings if each["area"] == "runs"] == ["ok", "ok"]
    prefcache("report", "runs/tiny")


def test_the_best_checkpoint_goes_too_after_its_weights_have_become_the_model(prefcache, config, run):
    best = options(
        "train.best=eval_loss", "train.learning_rate=1.0"
    )  # the evaluation before the first step is not a candidate
    prefcache("train", config, *best, "--set", "train.run=kept", "--set", "train.checkpoints_at_end=keep")
    prefcache("train", config, *best)
    assert not (run / "checkpoints").exists() and weights(run) == weights(run.with_name("kept"))


def test_a_folder_of_the_users_among_the_checkpoints_stays(prefcache, config, run):
    prefcache("train", config, *options("train.checkpoints_at_end=keep"))
    shutil.copytree(run / "checkpoints/step-00000006", run / "checkpoints/step-00000006-mine")
    (run / "manifest.json").unlink()
    prefcache("train", config)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006-mine"]


def test_the_weights_of_a_moving_reference_go_too(prefcache, config, run):
    moving = options("train.moving_reference.every=2", "train.moving_reference.alpha=0.5")
    kept = (*moving, "--set", "train.checkpoints_at_end=keep")
    prefcache("train", config, *kept)
    assert [each.name for each in (run / "reference").iterdir()] == ["weights.safetensors"]
    (run / "manifest.json").unlink()
    prefcache("train", config, *moving)
    assert not (run / "reference").exists() and not (run / "checkpoints").exists()


def test_a_finished_run_of_an_earlier_version_keeps_its_checkpoints(prefcache, config, run):
    prefcache("train", config, *options("train.checkpoints_at_end=keep"))
    content = artifact.unseal(run / "manifest.json")
    del content["checkpoints"]
    artifact.commit_bytes(run / "manifest.json", artifact.seal(content))
    assert "nothing to do" in prefcache("train", config).stderr
    assert steps_of(run) == [4, 6]


# -- stopped runs ----------------------------------------------------------------------------------------------------


def test_a_stopped_run_keeps_what_it_needs_to_be_continued(prefcache, config, run):
    prefcache("train", config, *options("train.run=whole"))
    assert api.train(config, callbacks=[StopAt(3)], quiet=True).stopped
    assert steps_of(run) == [3]
    assert "Take the remaining steps" in prefcache("train", config).stderr
    assert api.train(config, continue_stopped=True, quiet=True).steps == 6
    assert weights(run) == weights(run.with_name("whole")) and not (run / "checkpoints").exists()


def test_a_stopped_run_keeps_the_best_checkpoint_with_the_last(prefcache, config, run):
    best = {"train.best": "eval_loss", "train.learning_rate": 1.0}  # so high that the first evaluation is the best
    assert api.train(config, overrides=best, callbacks=[StopAt(5)], quiet=True).stopped
    _, state = checkpoints.find_newest(run, pytest.fail)
    assert state.best.step < 5 and steps_of(run) == [state.best.step, 5]


def test_a_stopped_run_without_its_checkpoint_stays_finished_and_says_so(config, run, capsys):
    api.train(config, callbacks=[StopAt(3)], quiet=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        UsageError, match=r"stopped at step 3 of 6 by StopAt.*its last checkpoint is gone or damaged, so it"
    ):
        api.train(config, continue_stopped=True, quiet=True)
    assert RunManifest.find(run).stopped
    api.train(config)
    assert "It has no checkpoint to be continued from" in capsys.readouterr().err


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_model_without_a_checkpoint_is_an_error_that_says_what_to_do(prefcache, config, run):
    prefcache("train", config)
    (run / "model/config.json").write_text("{}")
    remedy = "No checkpoint is left to make it again from (train.checkpoints_at_end): delete runs/tiny/trained and train again"
    error = prefcache("train", config, code=4).stderr
    assert "config.json has 2 bytes" in error and remedy in error
    assert RunManifest.find(run) is not None and (run / "metrics").is_dir()  # nothing was thrown away
    (finding,) = [
        each for each in json.loads(prefcache("doctor", config, "--json").stdout)["findings"] if each["area"] == "runs"
    ]
    assert finding["state"] == "problem" and remedy in finding["remedy"]
    assert remedy in prefcache("push", "runs/tiny/trained", "me/it", code=4).stderr


def test_a_damaged_table_of_tokens_names_the_remedy_that_helps(prefcache, config, run):
    for at_end, remedy in (("keep", "only that is made again, from the last"), ("remove", "No checkpoint is left")):
        name = f"train.run={at_end}"
        prefcache("train", config, *options(name, f"train.checkpoints_at_end={at_end}"))
        (run.with_name(at_end) / "tokens.parquet").write_bytes(b"")
        assert remedy in prefcache("report", config, "--set", name, code=4).stderr
    prefcache("train", config, *options("train.run=keep", "train.checkpoints_at_end=keep"))
    prefcache("report", config, *options("train.run=keep"))


# -- killed ----------------------------------------------------------------------------------------------------------


def _train_until_kill(folder: Path, first: str, nth: int) -> None:
    """Train, and kill this process before the `nth` change of a name on disk, from the one that puts `first` in its place."""
    n_changes = 0

    def watch(change):
        def kill_or_change(*arguments, **options):
            nonlocal n_changes
            n_changes += n_changes > 0 or Path(arguments[-1]) == Path("runs/tiny/trained") / first
            if n_changes == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return kill_or_change

    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, watch(getattr(os, name)))
    invoke(folder, "train", "config.yaml")


def kill_training(folder: Path, first: str, nth: int) -> bool:
    """Whether it was killed, and not finished before."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["prefcache.cli", "prefcache.commands.train", __name__])
    process = processes.Process(target=_train_until_kill, args=(folder, first, nth))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize(
    ("first", "points"),
    [
        # Before the manifest, before the first checkpoint, within it, within the second, before their empty folder.
        ("manifest.json", (1, 3, 5, 10, 13)),
        pytest.param("model", range(1, 100), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_point_of_its_end_it_is_finished_or_resumes(prefcache, config, run, tmp_path, first, points):
    prefcache("train", config, *options("train.run=whole"))
    assert kill_training(tmp_path, first, 1)
    at_end = shutil.copytree(run, tmp_path / "at-end")
    seen = set()
    for nth in points:
        shutil.rmtree(run)
        shutil.copytree(at_end, run)
        if not kill_training(tmp_path, first, nth):
            break
        is_finished = RunManifest.find(run) is not None
        newest = checkpoints.find_newest(run, pytest.fail)  # none counts that is not whole
        assert is_finished or newest[1].step == 6
        seen.add((is_finished, len(steps_of(run))))
        done = prefcache("train", config)
        assert ("nothing to do" if is_finished else "resuming from step 6") in done.stderr
        assert weights(run) == weights(run.with_name("whole"))
        assert not (run / "checkpoints").exists() and not artifact.find_leftovers(run)
    assert seen == {(False, 2), (True, 2), (True, 1), (True, 0)}
