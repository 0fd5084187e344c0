"""A checkpoint is whole or not there, and a damaged one is passed over by name."""

import shutil
import subprocess
import sys

import pytest
import torch

from prefcache.pipeline.stored.artifact import MANIFEST
from prefcache.pipeline.stored.records import BestEntry, CheckpointManifest
from prefcache.pipeline.training.checkpoints import (
    WEIGHTS,
    CheckpointState,
    discard_after,
    find_newest,
    read_optimizer,
    save,
)


def save_model(value: float):
    def write(folder):
        from safetensors.torch import save_file

        save_file({"a.weight": torch.full((3,), value)}, folder / "model-1.safetensors")
        save_file({"b.weight": torch.full((2,), value)}, folder / "model-2.safetensors")
        (folder / "config.json").write_text("{}")
        save_file({}, folder / WEIGHTS)

    return write


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for i in (1, 2) for name, tensor in load_file(folder / f"model-{i}.safetensors").items()}


def save_step(run, step: int, keep: int = 9) -> None:
    moments = {"0.exp_avg": torch.full((3,), step / 10), "0.step": torch.tensor(float(step))}
    save(run, save_model(float(step)), moments, CheckpointState(step, 100 * step), keep)


def steps_of(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def none(line: str) -> None:
    raise AssertionError(line)


def test_what_was_saved_comes_back(tmp_path):
    save_step(tmp_path, 7)
    folder, state = find_newest(tmp_path, none)
    assert folder.name == "step-00000007"
    assert (state.step, state.num_tokens) == (7, 700)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}  # no pickle
    found = weights(folder)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.weight": [7, 7, 7], "b.weight": [7, 7]}
    moments = dict(read_optimizer(folder))
    assert torch.equal(moments["0.exp_avg"], torch.full((3,), 0.7)) and moments["0.step"].item() == 7


def test_tensors_keep_every_bit(tmp_path):
    torch.manual_seed(0)
    exact = {"t": torch.randn(5, 4).T, "n": torch.tensor(float("inf")), "b": torch.randn(3).bfloat16()}
    save(tmp_path, save_model(1.0), exact, CheckpointState(1), 2)
    found = dict(read_optimizer(find_newest(tmp_path, none)[0]))
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in exact.items())


def test_the_newest_is_the_highest_step_not_the_last_saved(tmp_path):
    assert find_newest(tmp_path, none) is None
    for step in (2, 10, 9):
        save_step(tmp_path, step)
    assert find_newest(tmp_path, none)[1].step == 10


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save_step(tmp_path, step, keep=2)
    assert steps_of(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_step(tmp_path, 5)
    save(tmp_path, save_model(1.0), {}, CheckpointState(5, 1), 2)
    folder, state = find_newest(tmp_path, none)
    assert steps_of(tmp_path) == ["step-00000005"] and state.num_tokens == 1
    assert weights(folder)["a.weight"].tolist() == [1, 1, 1]


def test_a_save_that_fails_leaves_the_checkpoints_before_it(tmp_path):
    save_step(tmp_path, 5, keep=1)

    def fails(folder):
        save_model(1.0)(folder)
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError):
        save(tmp_path, fails, {}, CheckpointState(10), 1)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert find_newest(tmp_path, none)[1].step == 5


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "weights": lambda folder: flip(folder / "model-2.safetensors"),
    "optimizer": lambda folder: flip(folder / "optimizer.safetensors"),
    "config": lambda folder: flip(folder / "config.json"),
    "manifest": lambda folder: flip(folder / MANIFEST),
    "no-weights": lambda folder: (folder / "model-1.safetensors").unlink(),
    "no-manifest": lambda folder: (folder / MANIFEST).unlink(),
    "cut": lambda folder: (folder / "model-1.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, damages):
    for step in (5, 10):
        save_step(tmp_path, step)
    damages(tmp_path / "checkpoints" / "step-00000010")
    said: list[str] = []
    folder, state = find_newest(tmp_path, said.append)
    assert folder.name == "step-00000005" and state.step == 5
    assert len(said) == 1 and "step-00000010" in said[0] and "Going back" in said[0]


def test_with_every_checkpoint_damaged_there_is_none(tmp_path):
    for step in (5, 10):
        save_step(tmp_path, step)
        DAMAGES["weights"](tmp_path / "checkpoints" / f"step-{step:08}")
    said: list[str] = []
    assert find_newest(tmp_path, said.append) is None and len(said) == 2


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    # A run went back past a damaged step 20; what it saves at step 15 is the only checkpoint it can go on from.
    save_step(tmp_path, 20)
    DAMAGES["weights"](tmp_path / "checkpoints" / "step-00000020")
    save_step(tmp_path, 15, keep=1)
    found = find_newest(tmp_path, lambda line: None)
    assert found is not None and found[1].step == 15


def test_a_full_disk_is_a_resource_error_and_keeps_the_checkpoint_before(tmp_path):
    save_step(tmp_path, 5, keep=1)
    # A limit on the size of files fails a write as a full disk does.
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from prefcache.pipeline.training.checkpoints import save; from prefcache.pipeline.errors import ResourceError\n"
        "from prefcache.pipeline.training.checkpoints import CheckpointState; state = CheckpointState(step=10)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: save(Path(sys.argv[1]), lambda folder: None, {'a': torch.zeros(5000)}, state, 1)\n"
        "except ResourceError as error: sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert done.returncode == 6, done.stderr


def test_temporaries_of_a_killed_save_are_no_checkpoints(tmp_path):
    save_step(tmp_path, 5)
    left = tmp_path / "checkpoints" / ".step-00000009.some_machine-1.tmp"
    left.mkdir()
    assert find_newest(tmp_path, none)[1].step == 5
    assert weights(find_newest(tmp_path, none)[0])["a.weight"].tolist() == [5, 5, 5]


def test_a_copy_of_a_checkpoint_is_neither_used_nor_deleted(tmp_path):
    save_step(tmp_path, 5)
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-00000005-mine", "step-9", "step-00000007.bak"):
        shutil.copytree(checkpoints / "step-00000005", checkpoints / name)
    (checkpoints / "step-00000009").write_text("a file")
    assert find_newest(tmp_path, none)[1].step == 5
    discard_after(tmp_path, 4)
    save_step(tmp_path, 6, keep=1)
    mine = ["step-00000005-mine", "step-00000007.bak", "step-00000009", "step-9"]
    assert steps_of(tmp_path) == sorted(["step-00000006", *mine])


def test_of_a_checkpoint_on_another_disk_only_the_link_is_deleted(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (5, 10):
        save_step(run, step)
        folder = run / f"checkpoints/step-{step:08}"
        shutil.move(folder, elsewhere / folder.name)
        folder.symlink_to(elsewhere / folder.name)
    assert find_newest(run, none)[1].step == 10
    discard_after(run, 5)
    assert steps_of(run) == ["step-00000005"]
    save_step(run, 6, keep=1)
    assert steps_of(run) == ["step-00000006"]
    assert all((elsewhere / f"step-{step:08}" / WEIGHTS).exists() for step in (5, 10))


@pytest.mark.parametrize(
    ("file", "best", "said"),
    [
        (WEIGHTS, None, "does not list weights"),
        ("optimizer.safetensors", None, "does not list opt"),
        (None, 11, "later step"),
    ],
)
def test_a_manifest_that_lacks_what_a_checkpoint_is_made_of_is_passed_over(tmp_path, file, best, said):
    for step in (5, 10):
        save_step(tmp_path, step)
    folder = tmp_path / "checkpoints/step-00000010"
    facts = CheckpointManifest.find(folder).facts()
    facts["files"] = [entry for entry in facts["files"] if entry["file"] != file]
    if best:
        facts["best"] = {"metric": "loss", "step": best, "evaluation": {}, "waited": 0}
    CheckpointManifest.make(**facts).commit(folder / MANIFEST)
    lines: list[str] = []
    assert find_newest(tmp_path, lines.append)[1].step == 5 and said in lines[0]


def test_a_checkpoint_that_lacks_what_the_run_adds_to_it_is_passed_over(tmp_path):
    for step in (5, 10):
        save_step(tmp_path, step)
    lines: list[str] = []
    folder, _ = find_newest(tmp_path, lines.append, lambda step: {"reference.safetensors"} if step > 5 else set())
    assert folder.name == "step-00000005" and "does not list reference.safetensors" in lines[0]


def test_a_state_survives_and_its_file_is_that_of_earlier_versions(tmp_path):
    best = BestEntry(metric="eval_loss", step=3, evaluation={"loss": 0.5}, waited=2)
    state = CheckpointState(5, 70, {"bco/delta": {"n": 8.0, "mean": 0.25}}, best)
    save(tmp_path, save_model(1.0), {}, CheckpointState(3), 9)
    save(tmp_path, save_model(1.0), {}, state, 9)
    assert find_newest(tmp_path, none)[1] == state
    facts = CheckpointManifest.find(tmp_path / "checkpoints/step-00000005").facts()
    assert (facts["step"], facts["num_tokens"], facts["memory"]) == (5, 70, {"bco/delta": {"n": 8.0, "mean": 0.25}})
    assert facts["best"] == {"metric": "eval_loss", "step": 3, "evaluation": {"loss": 0.5}, "waited": 2}
