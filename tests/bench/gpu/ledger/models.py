"""The models of the ledger, by the shapes of their publishers' config.json, and the pairs of a step."""

from typing import Any

from transformers import AutoConfig

from prefcache.pipeline.training.step_trace import Lengths
from tests.bench import corpus
from tests.bench.gpu.work import SHAPES

LLAMA_70B = SHAPES["8B"] | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
}
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 151_655,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    # It is frozen: its features are read, and it is not in memory.
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
IMAGE_TOKENS = {"VL-7B": 1024}  # of each prompt
MODELS: dict[str, dict[str, Any]] = {
    # Shallow, for the gate of the default test run.
    "0.5B-4-layers": SHAPES["0.5B"] | {"num_hidden_layers": 4},
    "0.5B": SHAPES["0.5B"],
    "1.5B": SHAPES["1.5B"],
    "8B": SHAPES["8B"],
    "30B-A3B": QWEN3_30B_A3B,
    "70B": LLAMA_70B,
    "VL-7B": QWEN2_5_VL_7B,
}


def make_config(model: str, layers: int | None = None) -> Any:
    return AutoConfig.for_model(**MODELS[model] | ({"num_hidden_layers": layers} if layers else {}))


def step_pairs(n: int = 16, model: str = "") -> list[Lengths]:
    """Pairs with lengths as real ones have: one row of 3,424 tokens, and those of a picture in each prompt of a model that sees."""
    n_image = IMAGE_TOKENS.get(model, 0)
    pairs = (tuple(map(len, pair)) for pair in corpus.token_pairs(n, vocabulary=1000))
    return [Lengths(prompt + n_image, chosen, rejected, n_image) for prompt, chosen, rejected in pairs]
