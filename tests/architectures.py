"""Walk every class that Transformers loads as a causal language model: tiny, random, scored and trained as users do it.

    make architectures                      all of them, some minutes; writes pipeline/model/architectures.json
    python -m tests.architectures bloom     some, by name, whose rows are put in place of those that are there

Each is scored by the Transformers engine, in the layout that it chooses, and compared with the plain forward of one sequence at
a time; and one step of DPO is compared with that forward's loss and gradient. Each has a process and a time limit of its own.
"""

import math
import multiprocessing
import sys
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefcache.pipeline.config import Score, Train
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import architectures, trainable
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.forward import Forward, flatten
from prefcache.pipeline.model.lm_head import set_head_dtype
from prefcache.pipeline.model.logprobs import plain_logps, sum_logps
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import load_frozen, score_plainly
from prefcache.pipeline.scoring.engines import transformers as engine_file

LIMIT = 120  # seconds for one class
N_VOCABULARY = 60
# What a config's numbers become, wherever it has one of these names; windows and chunks are shorter than the sequences.
SIZES = {
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim attention_hidden_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim lru_width hidden_size_global input_size",
    48: "intermediate_size dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_dim ffn_hidden_size feed_forward_size "
    "shared_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "dense_intermediate_size intermediate_size_mlp",
    24: "moe_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts moe_num_experts n_routed_experts "
    "state_size ssm_state_size mamba_d_state linear_num_value_heads linear_num_heads swa_num_attention_heads "
    "rotary_dim index_topk laurel_rank adapter_rank gated_norm_rank mamba_dt_rank time_step_rank router_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_top_k moe_topk moe_k linear_num_key_heads n_groups mamba_n_groups num_query_groups mamba_ngroups depth",
    # Too few would often score two tokens the same, of which either may be chosen.
    16: "index_n_heads",
    1: "n_group topk_group num_shared_experts n_shared_experts moe_num_shared_experts num_expert_group first_k_dense_replace",
    8: "head_dim attention_head_dim attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank "
    "q_lora_rank o_lora_rank index_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "attention_chunk_size chunk_size mamba_chunk_size kv_channels dim_head global_head_dim dim_model_base",
    5: "sliding_window sliding_window_size attention_window_size local_attention window_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions max_source_positions",
    N_VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
# Random weights large enough that a token's log-prob depends on all that it sees.
SCALES = {"initializer_range": 0.3, "init_std": 0.3}
# Special tokens: within the vocabulary, and none of those that the sequences are made of.
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
# What else a family needs.
FURTHER: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "blt": {"encoder_hash_byte_group_vocab": 500, "vocab_size": 260},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "partial_rotary_factor": 0.5,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "intermediate_size": [48, 48, 48, 48],
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 200,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"logits_soft_cap": 30.0, "w_init_variance_scale": 3.0, "final_w_init_variance_scale": 3.0},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 8],
        "axial_pos_embds_dim": [8, 24],
    },
    # Halves what every layer but the first gives, as the published models do every six layers.
    "rwkv": {"rescale_every": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# What is not a language model over tokens, or wants more than is installed, and so is not run.
NOT_RUN = {
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts from the hidden states of another model, and reads no text by itself",
    "gemma4_unified_assistant": "it drafts from the hidden states of another model, and reads no text by itself",
    "musicgen": "it predicts the codes of several audio codebooks at once",
    "musicgen_melody": "it predicts the codes of several audio codebooks at once",
}


# -- tiny models -----------------------------------------------------------------------------------------------------


def tiny_config(model_type: str) -> Any:
    """Shrink the family's own defaults and keep one layer of each kind."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**shrink(kind()))


def shrink(config: Any) -> dict[str, Any]:
    """The arguments that make a config small."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in (config.sub_configs or {}) and value is not None:
            found[name] = type(value)(**shrink(value)).to_dict()
        elif name in BY_NAME and isinstance(value, int) and not isinstance(value, bool):
            found[name] = BY_NAME[name]
        elif name in SCALES and isinstance(value, float):
            found[name] = SCALES[name]
        elif name in TOKENS and value is not None:
            found[name] = TOKENS[name]
    names = {theirs: ours for ours, theirs in (config.attribute_map or {}).items()}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if kinds := vars(config).get(name):
            kinds = list(dict.fromkeys(kinds))
            n = max(2, len(kinds), found.get(names.get("num_hidden_layers", "num_hidden_layers"), 2))
            found[name] = (kinds * n)[:n]
            found["num_hidden_layers"] = n
    if len({len(found[name]) for name in ("layer_types", "mlp_layer_types") if name in found}) == 2:
        n = found["num_hidden_layers"] = max(len(found["layer_types"]), len(found["mlp_layer_types"]))
        for name in ("layer_types", "mlp_layer_types"):
            found[name] = (found[name] * n)[:n]
    if set(found.get("layer_types", ())) == {"full_attention"} and hasattr(config, "sliding_window"):
        found["layer_types"][-1] = "sliding_attention"
        found |= {"sliding_window": BY_NAME["sliding_window"], "use_sliding_window": True}
    if hasattr(config, "kv_lora_rank"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found | FURTHER.get(config.model_type, {})


def save_tiny(model_type: str, folder: Path, *, is_decoder: bool | None = None) -> str:
    """A tiny random model, as files; returns its class's name."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if is_decoder is not None:
        config.is_decoder = is_decoder
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    # The text model of some families saves a config of its own, that Transformers then does not load.
    config.architectures = model.config.architectures
    config.save_pretrained(folder)
    return type(model).__name__


def sequences() -> list[TokenSequence]:
    """Pairs of answers to prompts, ragged: a token against many, a prompt of one token, lengths beyond every window."""
    dice = np.random.default_rng(0)
    found = []
    for n_prompt, *lengths in [(20, 9, 14), (7, 1, 5), (1, 6, 1), (40, 2, 3), (33, 30, 17), (5, 5, 5)]:
        prompt = dice.integers(2, N_VOCABULARY, n_prompt, dtype=np.int32)
        found += [TokenSequence(prompt, dice.integers(2, N_VOCABULARY, n, dtype=np.int32)) for n in lengths]
    return found


# -- one class -------------------------------------------------------------------------------------------------------


def examine(model_type: str, is_decoder: bool | None = None) -> architectures.Architecture:
    """Its row of the table."""
    row: dict[str, Any] = {"model_type": model_type, "is_decoder": is_decoder, "layout": "refused"}
    if model_type in NOT_RUN:
        row["model_class"] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        return architectures.Architecture(**row | {"layout": "not run", "reason": NOT_RUN[model_type]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row["model_class"] = save_tiny(model_type, folder, is_decoder=is_decoder)
        row["attention"] = choose_kernel(folder, "sdpa")
        reference, chosen = Reference(folder), sequences()
        try:
            row |= score_all(reference, chosen)
        except PrefcacheError as error:
            return architectures.Architecture(**row | {"reason": f"{error}".replace(name, "the model")})
        try:
            row["gradient"] = train_once(reference, chosen)
        except PrefcacheError as error:
            row["training"] = f"{error}".replace(name, "the model")
    return architectures.Architecture(**row)


def score_all(reference: Reference, chosen: list[TokenSequence]) -> dict[str, Any]:
    """In large forwards and once more in many small ones, which begin and end elsewhere; against the plain forward."""
    plain = score_plainly(reference, chosen)
    assert far_from_deaf(reference, chosen) > 1e-3, "the tiny model's answers do not depend on its prompts"
    engine = engine_file.TransformersEngine(reference, Score(device="cpu"))
    found = engine.score(chosen)
    found += engine_file.TransformersEngine(reference, Score(device="cpu", tokens_per_batch=64)).score(chosen)
    deviation = np.abs(np.concatenate(found) - np.concatenate([*plain, *plain]))
    assert np.isfinite(deviation).all()
    return {
        "layout": engine.facts["rows"],
        "reason": shortened(engine.facts.get("why")),
        "deviation": float(f"{deviation.max():.1e}"),
    }


def far_from_deaf(reference: Reference, chosen: list[TokenSequence]) -> float:
    """How far an answer's log-probs move with a prompt's tokens in another order."""
    model = load_frozen(reference, "float32", "sdpa", "cpu")
    prompt, answer = chosen[0].prompt_ids, chosen[0].completion_ids
    with torch.inference_mode():
        return float(
            (plain_logps(model, TokenSequence(prompt[::-1], answer)) - plain_logps(model, chosen[0])).abs().max()
        )


def train_once(reference: Reference, chosen: list[TokenSequence]) -> float:
    """How far the gradient of DPO's first step is from that of the plain forward. The loss must be ln 2."""
    kernel, cpu = choose_kernel(reference.folder, "sdpa"), torch.device("cpu")
    ref_B = torch.tensor([float(logps.sum(dtype=np.float64)) for logps in score_plainly(reference, chosen)])

    def step(together: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = trainable.load(reference, Train(), kernel, cpu).model
        if together:
            set_head_dtype(model, "float32")
            forward = Forward(model, kernel, "auto", "float32", "train.rows")
            forward.choose_layout(chosen)
            groups = forward.group(chosen)
            logps = forward.logps([[chosen[i] for i in group] for group in groups]).logps
            logps = [logps[i] for i in np.argsort(flatten(groups))]
        else:
            logps = [plain_logps(model, each) for each in chosen]
        ratio_B = sum_logps(logps) - ref_B
        loss = -F.logsigmoid(0.1 * (ratio_B[::2] - ratio_B[1::2])).mean()
        loss.backward()
        return loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    (loss, ours), (_, theirs) = step(together=True), step(together=False)
    assert abs(loss - math.log(2)) < 1e-4, f"the loss at the start is {loss}, not ln 2"
    assert all(each.isfinite().all() for each in ours.values()), "a gradient is not finite"
    assert ours.keys() == theirs.keys(), f"gradients of other weights: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    return float(f"{math.sqrt(apart / sum(float(each.square().sum()) for each in theirs.values())):.1e}")


def shortened(why: str | None) -> str | None:
    """The same reason against sharing and against packing is one."""
    if why is None:
        return None
    first, *others = [part.partition(": ")[2] for part in why.split("; ") if part.startswith("not ")]
    further = [part for part in why.split("; ") if not part.startswith("not ")]
    return "; ".join([f"neither shared nor packed: {first}", *further]) if [first] == others else why


# -- all of them -----------------------------------------------------------------------------------------------------


def examine_apart(model_type: str, is_decoder: bool | None = None) -> architectures.Architecture:
    """In a process of its own: a class may crash it, or never end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        torch.set_num_threads(1)
        try:
            theirs.send(examine(model_type, is_decoder))
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    process = context.Process(target=work)
    process.start()
    theirs.close()
    failure = f"no answer in {LIMIT} seconds"
    try:
        if ours.poll(LIMIT):
            row = ours.recv()
            if isinstance(row, architectures.Architecture):
                return row
            failure = row
    except EOFError:
        failure = "its process ended"
    finally:
        process.kill()
        process.join()
    return architectures.Architecture(model_type, None, is_decoder, "failed", reason=failure)


def walk(names: list[str]) -> list[architectures.Architecture]:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    rows = []
    for model_type in names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = [examine_apart(model_type)]
        # An encoder by default, which its config makes a decoder.
        if found[0].layout == "refused" and getattr(CONFIG_MAPPING[model_type], "is_decoder", None) is False:
            found.append(examine_apart(model_type, is_decoder=True))
        print(*found, sep="\n", flush=True)
        rows += found
    return rows


def main(names: list[str]) -> int:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    table = architectures.load() if names else None
    if table and any(table.measured[package] != version for package, version in versions.items()):
        print(f"The table is of {table.measured}, not of {versions}: walk all of them (no names).", file=sys.stderr)
        return 2
    rows = walk(names)
    wrong = [row for row in rows if row.layout == "failed" or (row.deviation or 0) > 1e-3 or (row.gradient or 0) > 1e-3]
    for row in wrong:
        print(f"wrong: {row}", file=sys.stderr)
    if wrong:
        return 1
    kept = [row for row in table.rows if row.model_type not in names] if table else []
    architectures.write(versions | {"date": f"{date.today()}"}, sorted(kept + rows, key=lambda row: row.model_type))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
