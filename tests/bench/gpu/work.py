"""What is computed: models from their config with random weights, pairs of random ids, and the arithmetic that they need.

Needed arithmetic is what no technique can leave out: a prompt once, no padding, no answer's last token, the head where an
answer's token is predicted, of attention's scores those that causality allows. Everyone's rate is told in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefcache.pipeline.schema import TokenSequence
from tests.bench.contest import SMALL
from tests.bench.corpus import TokenPair
from tests.bench.gpu.machine import DEVICE

# As their publishers' config.json has them.
QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1e6, "tie_word_embeddings": True}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "1.5B": QWEN | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "8B": {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 5e5, "tie_word_embeddings": False, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    # To try all of it on a CPU.
    "tiny": SMALL | {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "tiny-8B": SMALL | {"model_type": "llama", "tie_word_embeddings": False},
}  # fmt: skip


def build(shape: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Any:
    """In eval mode; there is no dropout in any."""
    torch.manual_seed(seed)
    with DEVICE:
        return model_of(shape, dtype)


def model_of(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    config = AutoConfig.for_model(**shape)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def sequences(pairs: list[TokenPair]) -> list[TokenSequence]:
    """Of each pair the chosen, then the rejected answer."""
    return [TokenSequence(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


@dataclass(frozen=True)
class Needed:
    """Of some pairs."""

    positions: int
    head_positions: int
    scores: int  # of attention, of a head in a layer

    @classmethod
    def of(cls, pairs: list[TokenPair]) -> "Needed":
        positions = head_positions = scores = 0
        for prompt, *answers in pairs:
            p, own = len(prompt), [len(answer) - 1 for answer in answers]
            positions += p + sum(own)
            head_positions += sum(own) + len(own)
            scores += p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in own)
        return cls(positions, head_positions, scores)

    def flops(self, model: Any) -> int:
        """Of a forward. A step that trains all weights computes three times that, one that trains an adapter twice."""
        config = model.config
        layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2 and "lora_" not in name)  # fmt: skip
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)  # fmt: skip
        head = config.hidden_size * config.vocab_size
        of_scores = 4 * config.num_hidden_layers * width * self.scores
        return 2 * self.positions * layers + 2 * self.head_positions * head + of_scores
