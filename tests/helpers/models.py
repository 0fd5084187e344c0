"""Tiny random models of many architectures, and sequences to score with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from prefcache.pipeline.model.forward import Forward, flatten
from prefcache.pipeline.model.logprobs import sum_logps
from prefcache.pipeline.schema import TokenSequence

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    # Windows shorter than the sequences below.
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        # Caps low enough to bite: with random weights of this size logits reach well beyond 2.
        {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 5}),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "cohere2": ("Cohere2Config", {"sliding_window": 5, "logit_scale": 0.25, "head_dim": 8}),
    # Scales what goes into its head.
    "minicpm3": (
        "MiniCPM3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
}
# Models whose layers cannot be kept to segments: states that run on, chunks, positions as biases, deaf to keywords.
UNSHARABLE = {
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "init_std": 0.3}),
    "falcon": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False}),
    "stablelm": ("StableLmConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "mamba2": (
        "Mamba2Config",
        {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    # Halves what every layer but the first gives, as the published models do every six layers.
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 128, "rescale_every": 1}),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 1],
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
        },
    ),
}


def build(name: str, **more):
    """A tiny random model in memory."""
    kind, own = (ARCHITECTURES | UNSHARABLE)[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SIZES | own | more))
    # SDPA would leave out Gemma 2's caps without a word, and some models do not have it.
    has_sdpa = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
    kernel = "sdpa" if has_sdpa and name != "gemma2" else "eager"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


def save_mixture(model: Path, folder: Path, **more) -> Path:
    """A tiny Qwen3-MoE, whose experts are fused, with the tokenizer of another model."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    build("qwen3-moe", vocab_size=vocabulary, max_position_embeddings=512, **more).save_pretrained(folder)
    return folder


def start_forward(model, layout: str, like: list[TokenSequence]) -> Forward:
    """The model's forward in a layout that was tried on these sequences."""
    forward = Forward(model, model.config._attn_implementation, layout, "float32", "train.rows")
    forward.choose_layout(like)
    assert layout in (forward.layout, "auto"), forward.layout_reason
    return forward


def sequence(n_prompt: int, n_completion: int, seed: int = 0) -> TokenSequence:
    ids = np.random.default_rng([seed, n_prompt, n_completion]).integers(2, 60, n_prompt + n_completion, dtype=np.int32)
    return TokenSequence(ids[:n_prompt], ids[n_prompt:])


def answers(n_prompt: int, *n_completions: int) -> list[TokenSequence]:
    """Answers to one prompt."""
    prompt = sequence(n_prompt, 1, seed=9).prompt_ids
    lengths = enumerate(n_completions, n_prompt)
    return [TokenSequence(prompt, sequence(1, n, seed=seed).completion_ids) for seed, n in lengths]


# Chosen and rejected in turn: ragged, one token against many, a prompt of one token, and one longer than any window.
PAIRS = [each for n_prompt, *n in [(20, 9, 14), (7, 1, 5), (1, 6, 1), (40, 2, 3)] for each in answers(n_prompt, *n)]


def tree(n_prompt: int = 20) -> list[TokenSequence]:
    """Answers to one prompt that share more than it: they nest, begin, repeat one another, or differ in their last token only."""
    prompt = sequence(n_prompt, 1, seed=9).prompt_ids
    first, second, third, other = (sequence(1, n, seed=seed).completion_ids for seed, n in enumerate((14, 8, 6, 4)))
    # So that they differ where they are to part.
    second[0], third[0], other[0] = (first[9] + 1) % 60, (second[3] + 1) % 60, (first[0] + 1) % 60
    changed = first.copy()
    changed[-1] = (first[-1] + 1) % 60
    return [
        TokenSequence(prompt, np.concatenate(parts))
        for parts in (
            [first],
            [first[:9], second],
            [first[:9], second[:3], third],
            [first[:5]],
            [first],
            [changed],
            [other],
            [first[:1]],
        )
    ]


# What the trees of `tree` take: the prompt, then of its answers first without its last token, what the second, the third and the
# last but one have of their own without theirs.
TREE_TOKENS = 20 + 13 + (8 - 1) + (6 - 1) + (4 - 1)
# Tokens that are predicted: 14 of first and one that replaces its last, 8, 6 and 4.
TREE_PREDICTIONS = 14 + 1 + 8 + 6 + 4


def compute(forward: Forward, sequences: list[TokenSequence], *, squares: bool = False) -> list[list[torch.Tensor]]:
    """Log-probs and, if asked for, squares, in the order of the sequences."""
    groups = forward.group(sequences)
    back = np.argsort(flatten(groups))
    result = forward.logps([[sequences[i] for i in group] for group in groups], squares=squares)
    return [[lists[i] for i in back] if lists else [] for lists in (result.logps, result.squares)]


def dpo_loss(logps: list[torch.Tensor]) -> torch.Tensor:
    """Against a reference with log-probs of minus 2, minus 3, ... for the answers."""
    ratios = sum_logps(logps) + torch.arange(2.0, 2 + len(logps))
    return -F.logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()


def gradient(model) -> torch.Tensor:
    """Of all weights, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()
