"""A model's config.json is somebody else's file: what is read of it is typed, and what is wrong with it is one sentence."""

import json
import shutil
from pathlib import Path

import pytest

from prefcache.pipeline import identity, model_config, model_files
from prefcache.pipeline.errors import UsageError


def written(folder: Path, content: bytes | dict) -> Path:
    folder.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(data)
    return folder


MALFORMED = {
    "a word for a number": {"vocab_size": "x"},
    "no vocabulary": {"vocab_size": -1},
    "a list of ropes": {"rope_parameters": [1]},
    "a rope of a wrong kind": {"rope_parameters": {"full_attention": {"rope_type": [1]}}},
    "a list for a part": {"text_config": [1]},
    "a part of a wrong length": {"text_config": {"max_position_embeddings": {"a": 1}}},
    "a cap that is none": {"attn_logit_softcapping": "high"},
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "not text": b"\xff\xfe\x00",
    "nested": b'{"text_config":' * 900 + b"1" + b"}" * 900,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_one_sentence(tmp_path, what):
    folder = written(tmp_path / "model", MALFORMED[what])
    for read in (
        model_files.longest_sequence,
        model_files.saved_dtype,
        lambda folder: model_files.attention_kernel(folder, "sdpa"),
    ):
        with pytest.raises(UsageError) as refused:
            read(folder)
        sentence = str(refused.value)
        assert str(folder / "config.json") in sentence and "\n" not in sentence and len(sentence) < 600


def test_what_is_not_read_here_may_be_anything(tmp_path):
    config = {"vocab_size": 7, "hidden_size": "many", "architectures": 3, "text": [[]], "n_ctx": 0, "n_positions": None}
    found = model_config.read(written(tmp_path, config | {"max_position_embeddings": 2048.0}))
    assert (found.vocab_size, found.lengths) == (7, [2048])


def test_the_shortest_of_all_limits_counts_and_that_of_a_language_model(tmp_path):
    # Of a model that sees images, too, the part that reads text; longrope changes its frequencies beyond 1,024 tokens.
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 1024}
    text = {"max_position_embeddings": 4096, "rope_parameters": {"full_attention": rope, "sliding_attention": {}}}
    folder = written(tmp_path, {"max_position_embeddings": 100, "text_config": text})
    assert model_files.longest_sequence(folder) == 1024


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    assert model_files.saved_dtype(written(tmp_path, {"torch_dtype": "torch.bfloat16"})) == "bfloat16"
    with pytest.raises(UsageError, match=r"weights are in 'float4'.*--dtype"):
        model_files.saved_dtype(written(tmp_path, {"dtype": "float4"}))


@pytest.mark.parametrize("what", ["a word for a number", "a list for a part", "brackets"])
def test_a_command_says_so_before_anything_is_done(prefcache, config, model, tmp_path, what):
    shutil.copytree(model, tmp_path / "broken")
    written(tmp_path / "broken", MALFORMED[what])
    done = prefcache("prepare", config, "--set", "model=broken", code=2)
    assert "broken/config.json" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b'{"base_model_name_or_path": 3}', b'{"peft_type": []}'])
def test_an_adapter_s_config_is_no_more_believed(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        identity.find_adapter(tmp_path)


def test_half_a_character_is_named_before_it_gets_into_a_record(tmp_path):
    folder = written(tmp_path, b'{"model_type": "llama", "note": "\\ud800"}')
    with pytest.raises(UsageError, match=r"config\.json holds \\ud800, half of a character"):
        model_config.read(folder)
