"""Inputs of recomputed layers that wait on the host give the same gradients. Here, the host's memory is other memory of the same."""

import gc
import weakref

import numpy as np
import pytest
import torch

from prefcache.pipeline.model import offload, trainable
from prefcache.pipeline.model.lm_head import set_head_dtype
from prefcache.pipeline.model.offload import OffloadedInputs, Shuttle
from tests.helpers.models import answers, build, start_forward

PAIRS = [*answers(7, 5, 3), *answers(8, 5, 3)]


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Copy whatever a GPU would, however small; return what is sent and fetched."""
    monkeypatch.setattr(offload, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(offload, "_LEAST_BYTES", 0)
    copies: list[tuple[str, int]] = []
    send, fetch = Shuttle.send, Shuttle.fetch

    def sent(self, tensor, host=None):
        copies.append(("send", len(copies)))
        host = send(self, tensor, host)
        host.number = len(copies) - 1
        return host

    def fetched(self, host):
        copies.append(("fetch", host.number))
        return fetch(self, host)

    monkeypatch.setattr(Shuttle, "send", sent)
    monkeypatch.setattr(Shuttle, "fetch", fetched)
    return copies


def gradients(inputs: OffloadedInputs | None, name: str) -> dict[str, torch.Tensor]:
    model = build(name, num_hidden_layers=4)
    assert trainable.recompute_layers(model, inputs) is None
    set_head_dtype(model, "float32")
    forward = start_forward(model, "shared", PAIRS)
    for _ in range(2):  # a second step finds nothing of the first
        torch.cat(forward.logps([PAIRS[:2], PAIRS[2:]]).logps).sum().backward()
    return {key: each.grad for key, each in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3-moe"])
def test_gradients_are_the_same_bit_by_bit_and_each_layers_input_is_copied_once(name, as_on_a_gpu):
    expected, found = gradients(None, name), gradients(OffloadedInputs(), name)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in found)
    forward, backward = as_on_a_gpu[:4], as_on_a_gpu[4:8]
    assert [kind for kind, _ in forward] == ["send"] * 4 and len(as_on_a_gpu) == 16
    # The last layer's first; each before the one that needs it asks, after the one above it has come.
    assert backward == [("fetch", i) for i in (3, 2, 1, 0)]


def test_what_waits_on_the_host_is_not_kept_on_the_device(as_on_a_gpu):
    layer = torch.nn.Linear(8, 8)
    for inputs, is_kept in ((None, True), (OffloadedInputs(), False)):
        array = np.ones((4, 8), np.float32)
        memory = weakref.ref(array)
        output = trainable.Recomputed(lambda x: layer(x).sum(), inputs)(torch.from_numpy(array))
        del array
        gc.collect()
        assert output.requires_grad and (memory() is not None) == is_kept
        output.backward()


def test_on_a_cpu_and_for_small_tensors_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(Shuttle, "send", lambda *_: pytest.fail("a copy on a CPU"))
    gradients(OffloadedInputs(), "llama")
    monkeypatch.setattr(offload, "kind_of", lambda device: "cuda")
    gradients(OffloadedInputs(), "llama")  # its hidden states take fewer bytes than a copy is worth
