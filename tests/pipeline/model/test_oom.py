"""Every kind of out-of-memory error is recognized, and nothing else."""

import subprocess
import sys

import pytest
import torch

from prefcache.pipeline.model.oom import is_out_of_memory
from tests.helpers.project import ROOT

# 64 TiB, more than any machine's address space has left.
TOO_MUCH = 1 << 46


def raise_from_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "allocate",
    [raise_from_gpu, lambda: torch.empty(TOO_MUCH), lambda: bytearray(TOO_MUCH)],
    ids=["cuda", "torch-cpu", "python"],
)
def test_memory_that_runs_out_is_recognized(allocate):
    with pytest.raises(Exception) as error:
        allocate()
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("out of memory")])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_asking_does_not_load_pytorch():
    code = "import sys; from prefcache.pipeline.model.oom import is_out_of_memory as ask; ask(ValueError()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
