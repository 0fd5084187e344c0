"""The shapes of published models, as their config.json has them, in folders without weights."""

import json
import shutil
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# Llama 3.1 8B has 8,030,261,248 parameters and Qwen2.5 7B 7,615,616,512, by their model cards' files.
PARAMETERS = {"llama": 8_030_261_248, "qwen2": 7_615_616_512}


def write_shape(folder: Path, shape: dict[str, Any], like: Path) -> Path:
    """Write a model's folder that has this config.json, the tokenizer of another model, and no weights."""
    shutil.copytree(
        like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    )
    (folder / "config.json").write_text(json.dumps(shape))
    return folder
