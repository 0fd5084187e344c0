"""The language model and the tower of a model that sees images, each loaded without the other."""

import pytest
import torch
from safetensors.torch import load_file

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import tower, trainable, weights
from tests.helpers import vision_models

FAMILIES = list(vision_models.FAMILIES)


def load(name: str, part: tower.Part):
    return weights.load_base(Reference(vision_models.save(name)), "float32", "sdpa", "cpu", part)


def n_bytes(model) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_two_parts_are_the_whole_model(name):
    whole, language, seeing = (load(name, part) for part in ("whole", "language", "tower"))
    expected = dict(whole.named_parameters())
    parts = {**dict(language.named_parameters()), **dict(seeing.named_parameters())}
    assert parts.keys() == expected.keys() and all(torch.equal(parts[key], expected[key]) for key in expected)
    assert n_bytes(language) + n_bytes(seeing) == n_bytes(whole)
    assert type(language) is type(seeing) is type(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_s_names_are_the_same_with_and_without_it(name):
    whole, language = load(name, "whole"), load(name, "language")
    assert tower.tower_names(language) == tower.tower_names(whole) != []
    assert tower.tower_parameters(language) == {} == dict.fromkeys(tower.tower_modules(language))
    assert tower.tower_parameters(whole).keys() == whole.state_dict().keys() - language.state_dict().keys()


def test_a_model_without_a_tower_is_loaded_whole(model):
    loaded = weights.load_base(Reference(model), "float32", "sdpa", "cpu", "language")
    assert tower.tower_names(loaded) == [] and tower.tower_pattern(loaded) is None
    assert n_bytes(loaded) == n_bytes(weights.load_base(Reference(model), "float32", "sdpa", "cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_has_the_tower_of_the_start_byte_for_byte(name, dtype, tmp_path):
    start = vision_models.save(name)
    trained = trainable.load(Reference(start), Train(weights=dtype), "sdpa", torch.device("cpu"))
    with torch.no_grad():
        for parameter in trained.parameters().values():
            parameter.add_(1)
    trained.save(tmp_path, trained.state())
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    same = {key for key, value in before.items() if after[key].dtype == value.dtype and torch.equal(after[key], value)}
    tower_alone = load(name, "tower").state_dict()
    assert before.keys() == after.keys() and len(same) == len(tower_alone)
    # The policy's own weights, and the tower's, are what another program loads.
    loaded = weights.load_base(Reference(tmp_path), "float32", "sdpa", "cpu").state_dict()
    expected = {key: value.float() for key, value in trained.state().items()} | tower_alone
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["gemma3", "llava-onevision", "qwen2.5-vl"])
def test_an_adapter_leaves_the_tower_alone_wherever_it_is_loaded(name, tmp_path):
    """The layers of SigLIP are named as those of the language model are."""
    start = Reference(vision_models.save(name))
    trained = trainable.load(start, Train(lora=Lora(r=2)), "sdpa", torch.device("cpu"))
    with torch.no_grad():
        for parameter in trained.parameters().values():
            parameter.add_(0.1)
    trained.save(tmp_path)
    loaded = weights.load_adapter(load(name, "whole"), tmp_path, "cpu")
    adapted = {key for key, _ in loaded.named_parameters() if "lora_" in key}
    assert adapted == {key for key, _ in trained.adapter.named_parameters() if "lora_" in key}
    assert adapted and not any("visi" in key or "visual" in key or "projector" in key for key in adapted)
