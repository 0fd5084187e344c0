"""What the engines' tests share."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.project import build_model

TORCHVISION = "torchvision==0.28.0"  # for torch 2.13


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's kernels for CPUs take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = build_model(tmp_path_factory.mktemp("vllm") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, head_dim=32)).save_pretrained(folder)
    return folder


# torchvision, which vLLM's models with images import, has no build for a CPU's PyTorch where this was written. The usual one works
# but for two operators, which it describes without having them.
_DEFINE_OPERATORS = """
import importlib.abc, sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_finder = self


sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="session")
def vllm_python_for_images(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with vLLM and torchvision: that of .venv-vllm, or one that finds torchvision in a folder of its own."""
    if subprocess.run([vllm_python, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return vllm_python
    folder = tmp_path_factory.mktemp("torchvision")
    pip = [vllm_python, "-m", "pip", "install", "--quiet", "--retries=1", "--timeout=15", "--no-deps"]
    if subprocess.run([*pip, "--target", folder, TORCHVISION], capture_output=True).returncode:
        pytest.skip(f"{TORCHVISION} is not installed and cannot be here (no network?): vLLM was not given any images")
    (folder / "sitecustomize.py").write_text(_DEFINE_OPERATORS)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {vllm_python} "$@"\n')
    program.chmod(0o755)
    return program
