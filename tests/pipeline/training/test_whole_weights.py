"""A model is loaded whole, or not at all: what is missing, misshapen or left over is named."""

import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import weights
from tests.helpers.project import build_model


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = build_model(tmp_path_factory.mktemp("broken") / "tiny")
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def broken(kept) -> Callable[..., Path]:
    """The model with other tensors than it had."""
    folder, tensors = kept

    def write(without: str | None = None, **further: np.ndarray) -> Path:
        changed = {name: value for name, value in tensors.items() if name != without} | further
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


LACKS = "lacks tensors of LlamaForCausalLM: {}. Random values would take their place"
CASES = [
    ({"without": "model.norm.weight"}, LACKS.format("model.norm.weight")),
    ({"without": "lm_head.weight"}, LACKS.format("lm_head.weight")),
    (
        {"model.norm.weight": np.ones(7, np.float32)},
        "has tensors of other shapes than LlamaForCausalLM in its config.json: model.norm.weight [7] (expected [32])",
    ),
    (
        {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)},
        "has tensors that LlamaForCausalLM does not have: model.layers.0.self_attn.q_proj.bias",
    ),
]


@pytest.fixture
def prepared(prefcache, config):
    prefcache("prepare", config)
    return config


@pytest.mark.parametrize(("change", "found"), CASES)
def test_scoring_refuses_weights_that_are_not_the_whole_model(prefcache, prepared, broken, change, found):
    folder = broken(**change)
    for sample in (4, 0):
        done = prefcache(
            "score", prepared, "--set", f"model={folder}", "--set", f"score.parity_sample={sample}", code=2
        )
        assert found in done.stderr


def test_doctor_names_what_is_missing(prefcache, prepared, broken):
    folder = broken(without="lm_head.weight")
    said = prefcache("doctor", prepared, "--set", f"model={folder}", code=None).stdout
    assert LACKS.format("lm_head.weight") in said


def test_training_refuses_weights_that_are_not_the_whole_model(prefcache, prepared, broken):
    prefcache("score", prepared)
    for change, found in CASES[:2]:
        done = prefcache("train", prepared, "--set", f"train.model={broken(**change)}", code=2)
        assert found in done.stderr


def test_an_engine_that_loads_it_elsewhere_is_not_asked_to_unchecked(prefcache, prepared, broken):
    """Without a parity check nothing else here would read the weights."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "tiny"}], "version": "1"}).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "model": broken(without="model.norm.weight"),
        "score.engine": "server",
        "score.server.url": f"http://127.0.0.1:{server.server_port}/v1",
        "score.parity_sample": 0,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    try:
        done = prefcache("score", prepared, *arguments, code=2)
    finally:
        server.shutdown()
    assert LACKS.format("model.norm.weight") in done.stderr


def test_the_check_without_loading_tells_a_whole_model_from_one_without_its_head(broken):
    folder = broken()
    assert weights.check_tensors(Reference(folder)) is None
    with pytest.raises(UsageError, match=r"lacks tensors .*lm_head\.weight"):
        weights.check_tensors(Reference(broken(without="lm_head.weight")))


def test_tied_heads_and_buffers_of_older_versions_are_no_false_alarm(tmp_path, model):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied/model.safetensors")
    assert "lm_head.weight" not in tensors
    # What the hub's older Llamas and GPT-2s hold.
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for n in range(2)}
    save_file(tensors | frequencies, tmp_path / "tied/model.safetensors", {"format": "pt"})
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2/model.safetensors")
    masks = {f"transformer.h.{n}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for n in range(2)}
    save_file(tensors | masks, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    for folder in (tmp_path / "tied", tmp_path / "gpt2", model):
        loaded = weights.load_base(Reference(folder), "float32", "sdpa", "cpu")
        plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        assert loaded.state_dict().keys() == plain.state_dict().keys()


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(plain, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_whole_or_not_at_all(model, adapter):
    def load():
        weights.load_frozen_adapter(weights.load_base(Reference(model), "float32", "sdpa", "cpu"), adapter, "cpu")

    load()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "v_proj.lora_A" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="Found missing adapter keys"):
        load()
    save_file(tensors | {name.replace("v_proj", "k_proj"): tensors[name]}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"has tensors for which its adapter_config\.json has no place.*k_proj"):
        load()
