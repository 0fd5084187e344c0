"""A GGUF file becomes the model that was written into it, or is refused with a remedy."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from prefcache.pipeline import gguf_files, identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored.gguf_conversion import convert_models
from tests.helpers.gguf import write_gguf
from tests.helpers.project import pair


def config_for(model: Path, folder: Path, **keys) -> Config:
    tree = {"model": str(model), "out": str(folder / "out"), "cache": str(folder / "cache")}
    return Config.model_validate({**tree, "prepare": {"data": "pairs.jsonl"}, **keys})


def converted(file: Path, folder: Path) -> Reference:
    config = config_for(file, folder)
    convert_models(config, Progress(quiet=True))
    return identity.find_reference(config)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> tuple[Path, Reference]:
    """A GGUF file in float32, and what it was converted into."""
    folder = tmp_path_factory.mktemp("gguf")
    file = write_gguf(model, folder / "whole.gguf")
    return file, converted(file, folder)


def test_a_float32_file_gives_the_very_tensors_tokens_and_template_of_its_model(model, whole):
    _, reference = whole
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (reference.folder, model))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (model, reference.folder))
    texts = [text for i in range(20) for text in pair(i).values()] + [
        "<|im_start|>user\nNaïve 12,345<|im_end|>\n  don't"
    ]
    assert after(texts)["input_ids"] == before(texts)["input_ids"]
    assert after.chat_template == before.chat_template and after.eos_token_id == before.eos_token_id


def test_quantized_blocks_become_the_float32_values_that_they_stand_for(model, tmp_path):
    reference = converted(write_gguf(model, tmp_path / "small.gguf", "Q8_0"), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"  # has no rope, so its rows keep their order
    blocks = gguf.quantize(load_file(model / "model.safetensors")[name], gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    found = load_file(reference.folder / "model.safetensors")[name]
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    assert "quantization_config" not in json.loads((reference.folder / "config.json").read_text())


def test_the_model_id_comes_from_tensors_and_config_and_not_from_the_file(model, whole, tmp_path):
    def id_of(reference: Reference) -> str:
        return identity.model_identity(reference)["model_id"]

    first = id_of(whole[1])
    assert id_of(converted(write_gguf(model, tmp_path / "renamed.gguf", name="another"), tmp_path)) == first
    assert id_of(converted(write_gguf(model, tmp_path / "small.gguf", "Q8_0"), tmp_path)) != first


def test_a_file_is_converted_once_wherever_it_lies_and_again_when_it_changes(model, other_model, tmp_path):
    file = write_gguf(model, tmp_path / "m.gguf")
    first = converted(file, tmp_path).folder
    written = (first / "model.safetensors").stat().st_mtime_ns
    moved = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    assert converted(moved, tmp_path).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    # Both are known by their stamps now, so that neither is read again to find the folder.
    assert len(gguf_files.find_converted(moved, tmp_path / "cache")[1].stamps) == 2
    write_gguf(other_model, file)
    assert converted(file, tmp_path).folder != first


def test_before_conversion_there_are_a_config_and_a_tokenizer_but_no_weights(model, tmp_path):
    file = write_gguf(model, tmp_path / "m.gguf")
    reference = identity.find_reference(config_for(file, tmp_path))
    assert reference.unconverted == file and not (tmp_path / "cache").exists()
    assert AutoTokenizer.from_pretrained(reference.tokenizer).chat_template
    with pytest.raises(UsageError, match=r"m\.gguf has not been converted yet.*prefcache prepare"):
        identity.model_identity(reference)


def test_only_the_file_is_read_and_not_what_lies_next_to_it(model, whole, tmp_path):
    file = Path(shutil.copy(whole[0], tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    folder = converted(file, tmp_path).folder
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (whole[1].folder / name).read_bytes()


def test_a_damaged_note_costs_another_conversion_and_nothing_else(model, tmp_path):
    file = write_gguf(model, tmp_path / "m.gguf")
    folder = converted(file, tmp_path).folder
    (folder / gguf_files.NOTE).write_text("{")
    assert converted(file, tmp_path).folder == folder
    assert gguf_files.find_converted(file, tmp_path / "cache")[0] == folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40_000])


def as_text(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (cut, r"m\.gguf does not load as a causal language model .*Fetch it again if it is damaged"),
        (as_text, r"m\.gguf is not a GGUF file: it begins with b'vers', expected b'GGUF'"),
        (Path.unlink, r"model .*m\.gguf cannot be read: No such file"),
    ],
)
def test_a_broken_file_is_refused_and_leaves_nothing_behind(model, tmp_path, breaks, found):
    file = write_gguf(model, tmp_path / "m.gguf")
    breaks(file)
    with pytest.raises(UsageError, match=found):
        converted(file, tmp_path)
    assert not list((tmp_path / "cache").glob(".gguf/*"))


def test_an_architecture_that_transformers_does_not_know_is_refused(model, tmp_path):
    file = write_gguf(model, tmp_path / "m.gguf", architecture="rwkv6")
    with pytest.raises(UsageError, match=r"architecture rwkv6 is not supported.*name the model's own folder or hub id"):
        converted(file, tmp_path)


def test_without_the_package_the_remedy_is_named(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UsageError, match=r"package gguf, which is not installed. Install it \(pip install 'prefcache\[gguf\]'\)"
    ):
        converted(whole[0], tmp_path)


def test_a_folder_with_only_a_gguf_file_says_to_name_the_file(whole, tmp_path):
    shutil.copy(whole[0], tmp_path)
    shutil.copy(whole[1].folder / "config.json", tmp_path)
    with pytest.raises(UsageError, match=r"weights only as GGUF \(name the file itself, as in model: .*whole\.gguf\)"):
        identity.find_reference(config_for(tmp_path, tmp_path))


def test_a_revision_of_a_file_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match=r"revision main is a hub id's, and model .*whole\.gguf is a local file"):
        identity.find_reference(config_for(whole[0], tmp_path, revision="main"))
