"""A checkpoint is whole or not there, and a damaged one is passed over by name."""

import subprocess
import sys

import pytest
import torch

from pipeline.stored.artifact import MANIFEST
from pipeline.training.checkpoints import newest, optimizer, save


def save_model(value: float):
    def write(folder):
        from safetensors.torch import save_file

        save_file({"a.weight": torch.full((3,), value)}, folder / "model-1.safetensors")
        save_file({"b.weight": torch.full((2,), value)}, folder / "model-2.safetensors")
        (folder / "config.json").write_text("{}")

    return write


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for i in (1, 2) for name, tensor in load_file(folder / f"model-{i}.safetensors").items()}


def save_step(run, step: int, keep: int = 9) -> None:
    moments = {"0.exp_avg": torch.full((3,), step / 10), "0.step": torch.tensor(float(step))}
    save(run, step, save_model(float(step)), moments, {"num_tokens": 100 * step}, keep)


def steps_of(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def none(line: str) -> None:
    raise AssertionError(line)


def test_what_was_saved_comes_back(tmp_path):
    save_step(tmp_path, 7)
    folder, state = newest(tmp_path, none)
    assert folder.name == "step-00000007"
    assert (state["step"], state["num_tokens"]) == (7, 700)
    found = weights(folder)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.weight": [7, 7, 7], "b.weight": [7, 7]}
    moments = dict(optimizer(folder))
    assert torch.equal(moments["0.exp_avg"], torch.full((3,), 0.7)) and moments["0.step"].item() == 7


def test_tensors_keep_every_bit(tmp_path):
    torch.manual_seed(0)
    exact = {"t": torch.randn(5, 4).T, "n": torch.tensor(float("inf")), "b": torch.randn(3).bfloat16()}
    save(tmp_path, 1, lambda folder: None, exact, {}, 2)
    found = dict(optimizer(newest(tmp_path, none)[0]))
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in exact.items())


def test_no_checkpoint_is_none(tmp_path):
    assert newest(tmp_path, none) is None


def test_the_newest_is_the_highest_step_not_the_last_saved(tmp_path):
    for step in (2, 10, 9):
        save_step(tmp_path, step)
    assert newest(tmp_path, none)[1]["step"] == 10


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save_step(tmp_path, step, keep=2)
    assert steps_of(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_step(tmp_path, 5)
    save(tmp_path, 5, save_model(1.0), {}, {"num_tokens": 1}, 2)
    folder, state = newest(tmp_path, none)
    assert steps_of(tmp_path) == ["step-00000005"] and state["num_tokens"] == 1
    assert weights(folder)["a.weight"].tolist() == [1, 1, 1]


def test_a_save_that_fails_leaves_the_checkpoints_before_it(tmp_path):
    save_step(tmp_path, 5, keep=1)

    def fails(folder):
        save_model(1.0)(folder)
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError):
        save(tmp_path, 10, fails, {}, {}, 1)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert newest(tmp_path, none)[1]["step"] == 5


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
    folder, state = newest(tmp_path, said.append)
    assert folder.name == "step-00000005" and state["step"] == 5
    assert len(said) == 1 and "step-00000010" in said[0] and "Going back" in said[0]


def test_with_every_checkpoint_damaged_there_is_none(tmp_path):
    for step in (5, 10):
        save_step(tmp_path, step)
        DAMAGES["weights"](tmp_path / "checkpoints" / f"step-{step:08}")
    said: list[str] = []
    assert newest(tmp_path, said.append) is None and len(said) == 2


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    # A run went back past a damaged step 20; what it saves at step 15 is the only checkpoint it can go on from.
    save_step(tmp_path, 20)
    DAMAGES["weights"](tmp_path / "checkpoints" / "step-00000020")
    save_step(tmp_path, 15, keep=1)
    found = newest(tmp_path, lambda line: None)
    assert found is not None and found[1]["step"] == 15


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save_step(tmp_path, 1)
    suffixes = {path.suffix for path in newest(tmp_path, none)[0].iterdir()}
    assert suffixes == {".safetensors", ".json"}


def test_a_full_disk_is_a_resource_error_and_keeps_the_checkpoint_before(tmp_path):
    save_step(tmp_path, 5, keep=1)
    # A limit on the size of files fails a write as a full disk does.
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from pipeline.training.checkpoints import save; from pipeline.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: save(Path(sys.argv[1]), 10, lambda folder: None, {'a': torch.zeros(5000)}, {}, 1)\n"
        "except ResourceError as error: sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert done.returncode == 6, done.stderr


def test_temporaries_of_a_killed_save_are_no_checkpoints(tmp_path):
    save_step(tmp_path, 5)
    left = tmp_path / "checkpoints" / ".step-00000009.some_machine-1.tmp"
    left.mkdir()
    assert newest(tmp_path, none)[1]["step"] == 5
    assert weights(newest(tmp_path, none)[0])["a.weight"].tolist() == [5, 5, 5]
