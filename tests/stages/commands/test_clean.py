"""`prefcache clean` removes nothing until it is told, and then only what no command needs."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import prefcache as api
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.training import checkpoints
from tests.helpers.processes import start_process
from tests.helpers.project import invoke, options, write_config
from tests.helpers.runs import weights

SETTINGS = {"max_steps": 6, "checkpoint_every": 2, "samples": 0}
ENDED = f".manifest.json.{artifact._HOST}-{2**22 + 1}.tmp"  # no process has a number above 2**22


class StopAtThree(api.TrainCallback):
    def on_step(self, event):
        return api.Stop() if event.step == 3 else None


@pytest.fixture(scope="module")
def once(scored_once, model, tmp_path_factory) -> Path:
    """Runs: of an earlier version, kept by choice, stopped by a callback, and unfinished."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("clean") / "it")
    config = write_config(folder, model, **SETTINGS)
    os.chdir(folder)
    api.train(config, quiet=True)
    stopped = {"train.run": "stopped", "train.checkpoints_at_end": "remove"}
    api.train(config, overrides=stopped, callbacks=[StopAtThree()], quiet=True)
    runs = folder / "runs/tiny"
    for name in ("kept", "begun"):
        shutil.copytree(runs / "trained", runs / name)
    (runs / "begun/manifest.json").unlink()
    forget_choice(runs / "trained")
    return folder


def forget_choice(run: Path) -> None:
    """Make it a run of a version that kept all checkpoints."""
    content = artifact.unseal(run / "manifest.json")
    del content["checkpoints"]
    (run / "manifest.json").write_bytes(artifact.seal(content))


@pytest.fixture
def experiment(once, tmp_path, monkeypatch) -> Path:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/tiny"


def clean(*arguments, code: int = 0) -> dict:
    return json.loads(invoke(Path.cwd(), "clean", *arguments, "--json", code=code).stdout)


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def size(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))


# -- what goes -------------------------------------------------------------------------------------------------------


def test_without_yes_it_says_what_can_go_and_changes_nothing(prefcache, experiment):
    before = contents(experiment)
    found = clean()
    (item,) = found["items"]
    folders = [experiment / f"trained/checkpoints/step-0000000{n}" for n in (4, 6)]
    assert (item["kind"], item["area"]) == ("checkpoints", "trained") and not found["removed"]
    assert item["bytes"] == found["bytes"] == size(*folders)
    assert {(each["kind"], each["area"]) for each in found["optional"]} == {("kept", "kept"), ("stopped", "stopped")}
    assert contents(experiment) == before
    said = prefcache("clean").stdout
    assert f"{size(*folders) / 1000:.0f} kB can go" in said and "Nothing was removed. To remove it, add --yes." in said


def test_with_yes_it_removes_just_that_and_then_finds_nothing(prefcache, experiment):
    before = contents(experiment)
    assert clean("--yes")["removed"]
    gone = before.keys() - contents(experiment).keys()
    assert gone and all(name.startswith("trained/checkpoints") for name in gone)
    assert {name: before[name] for name in before.keys() - gone} == contents(experiment)
    assert clean()["items"] == [] and "nothing to remove" in prefcache("clean", "--yes").stdout
    # What is left still works.
    assert "nothing to do" in prefcache("train", "config.yaml").stderr
    assert "resuming from step 6" in prefcache("train", "config.yaml", *options("train.run=begun")).stderr


def test_what_somebody_may_want_goes_only_if_it_is_named(experiment):
    clean("--yes", "--also", "kept", "--run", "kept")
    assert not (experiment / "kept/checkpoints").exists() and steps_of(experiment / "trained") == [4, 6]
    clean("--yes", "--also", "stopped")
    assert not (experiment / "stopped/checkpoints").exists() and not (experiment / "trained/checkpoints").exists()
    assert steps_of(experiment / "begun") == [4, 6]
    assert "has no run 'none'" in invoke(Path.cwd(), "clean", "--run", "none", code=2).stderr
    assert "has no run 'prepared'" in invoke(Path.cwd(), "clean", "--run", "prepared", code=2).stderr


def test_a_stopped_run_keeps_its_last_checkpoint_and_can_be_continued(experiment, tmp_path):
    config = tmp_path / "config.yaml"
    api.train(config, overrides={"train.run": "late"}, callbacks=[StopAtThree()], quiet=True)
    assert steps_of(experiment / "late") == [2, 3]  # train.checkpoints_at_end: keep
    forget_choice(experiment / "late")
    clean("--yes")
    assert steps_of(experiment / "late") == [3]
    again = api.train(config, overrides={"train.run": "late"}, continue_stopped=True, quiet=True)
    assert again.steps == 6 and weights(experiment / "late") == weights(experiment / "trained")


def test_unfinished_files_of_ended_processes_go_and_those_of_other_machines_if_named(experiment):
    left = [experiment / "begun/metrics" / ENDED, experiment / "prepared" / ENDED]
    for path in left:
        path.write_bytes(b"x" * 100)
    alive = experiment / "begun" / f".manifest.json.{artifact._HOST}-{os.getpid()}.tmp"
    other, mine = experiment / "begun/.manifest.json.elsewhere-7.tmp", experiment / "begun/.notes.tmp"
    for path in (alive, other, mine):
        path.write_bytes(b"y")
    found = clean("--yes", "--run", "begun")
    assert [(each["kind"], each["bytes"]) for each in found["items"]] == [("leftovers", 100)]
    assert not left[0].exists() and left[1].exists()
    clean("--yes", "--also", "other-machines")
    assert not left[1].exists() and not other.exists() and alive.exists() and mine.exists()


def test_parts_of_an_interrupted_preparation_go_if_named_and_only_next_to_a_finished_one(experiment):
    parts = experiment / "prepared/.parts-0123abcd"
    parts.mkdir()
    (parts / "part-000000.json").write_text("{}")
    clean("--yes")
    manifest = (experiment / "prepared/manifest.json").read_bytes()
    (experiment / "prepared/manifest.json").unlink()
    clean("runs/tiny", "--yes", "--also", "parts")
    assert parts.exists()
    (experiment / "prepared/manifest.json").write_bytes(manifest)
    clean("--yes", "--also", "parts")
    assert not parts.exists()


# -- what stays ------------------------------------------------------------------------------------------------------


def test_files_of_the_users_stay(experiment):
    run = experiment / "trained/checkpoints"
    shutil.copytree(run / "step-00000006", run / "step-00000006.copy")
    (run / "step-00000004/notes.txt").write_text("do not lose")
    found = clean("--yes")
    assert [Path(path).name for path in found["items"][0]["paths"]] == ["step-00000006"]
    assert [each["why"] for each in found["left_alone"]] == ["holds notes.txt, which is not a checkpoint's"]
    assert sorted(path.name for path in run.iterdir()) == ["step-00000004", "step-00000006.copy"]


@pytest.mark.parametrize("link", ["trained", "trained/checkpoints", "trained/checkpoints/step-00000006"])
def test_nothing_behind_a_link_is_removed(experiment, tmp_path, link):
    outside = tmp_path / "outside"
    shutil.move(experiment / link, outside)
    (experiment / link).symlink_to(outside)
    before = contents(outside)
    found = clean("--yes")
    assert contents(outside) == before and (experiment / link).is_symlink()
    assert str(Path("runs/tiny") / link) in [each["path"] for each in found["left_alone"]]


def test_a_link_within_a_checkpoint_leads_nowhere(experiment, tmp_path):
    file = experiment / "trained/checkpoints/step-00000004/weights.safetensors"
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    clean("--yes")
    assert (tmp_path / "outside").exists() and not (experiment / "trained/checkpoints").exists()


def test_bytes_that_have_another_name_elsewhere_are_not_counted(experiment, tmp_path):
    folders = [experiment / f"trained/checkpoints/step-0000000{n}" for n in (4, 6)]
    whole = size(*folders)
    kept = folders[1] / "optimizer.safetensors"
    os.link(kept, tmp_path / "mine")
    assert clean()["bytes"] == whole - kept.stat().st_size


def test_a_damaged_model_keeps_the_checkpoint_from_which_it_is_made_again(prefcache, experiment):
    file = experiment / "trained/model/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size: only a hash tells
    assert clean()["items"]
    found = clean("--yes")
    assert found["items"] == [] and "the model is damaged" in found["left_alone"][0]["why"]
    assert "made again from the last checkpoint" in prefcache("train", "config.yaml").stderr
    assert file.read_bytes() == content


def test_a_run_at_work_is_left_alone(experiment, tmp_path):
    process = start_process(tmp_path, "train", "config.yaml", *options("train.run=long", "train.max_steps=100000"))
    until = time.monotonic() + 120
    while not (experiment / "long/checkpoints/step-00000002").exists() and time.monotonic() < until:
        time.sleep(0.02)
    (experiment / "long" / ENDED).write_bytes(b"x")
    found = clean("--yes")
    assert process.is_alive() and (experiment / "long" / ENDED).exists()
    (left,) = found["left_alone"]
    assert left["path"] == "runs/tiny/long" and f"process {process.pid}" in left["why"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (leftovers,) = clean("--yes", "--run", "long")["items"]
    killed_at_work = f"{artifact._HOST}-{process.pid}.tmp"  # its file, if it died while it wrote one
    assert [path for path in leftovers["paths"] if killed_at_work not in path] == [f"runs/tiny/long/{ENDED}"]
    assert steps_of(experiment / "long")  # it resumes from them


def test_an_unreadable_record_leaves_its_run_alone(experiment):
    (experiment / "trained/manifest.json").write_text("{}")
    found = clean("--yes")
    assert found["items"] == [] and "cannot be judged" in found["left_alone"][0]["why"]
    assert steps_of(experiment / "trained") == [4, 6]


def test_what_cannot_be_removed_is_an_error_and_the_rest_goes(experiment, monkeypatch):
    """As root, no folder is read-only: the system call fails here as it does for others."""
    replace = os.replace

    def refuse(source, target, **options):
        if "step-00000004" in str(source):
            raise PermissionError(13, "Permission denied", str(source))
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", refuse)
    done = invoke(Path.cwd(), "clean", "--yes", code=2)
    assert "step-00000004 cannot be removed (Permission denied)" in done.stderr
    assert steps_of(experiment / "trained") == [4]


# -- killed ----------------------------------------------------------------------------------------------------------


def _clean_until_kill(folder: Path, nth: int) -> None:
    n_changes = 0

    def watch(change):
        def kill_or_change(*arguments, **options):
            nonlocal n_changes
            n_changes += ".claim" not in str(arguments[0])
            if n_changes == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return kill_or_change

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, watch(getattr(os, name)))
    invoke(folder, "clean", "runs/tiny", "--yes")


@pytest.mark.parametrize("nth", [1, 2, 4, 7])
def test_killed_at_any_point_it_leaves_whole_checkpoints_and_goes_on(experiment, tmp_path, nth):
    processes = multiprocessing.get_context("forkserver")
    process = processes.Process(target=_clean_until_kill, args=(tmp_path, nth))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    checkpoints.find_newest(experiment / "trained", pytest.fail)  # none counts that is not whole
    clean("--yes")
    assert not (experiment / "trained/checkpoints").exists() and clean()["items"] == []
