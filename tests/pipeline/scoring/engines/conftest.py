"""What the engines' tests share."""

from pathlib import Path

import pytest
import torch

from tests.helpers.project import build_model


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's kernels for CPUs take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = build_model(tmp_path_factory.mktemp("vllm") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, head_dim=32)).save_pretrained(folder)
    return folder
