"""Attention within the branches of a packed row: what sequences begin with is computed once, and each sees only its own path.

A row holds trees one after another (packed_row.py). `use_segments` makes a Transformers model attend that way without touching the
model's files or building a mask over the row. Whether a model computes the same this way is checked by forward.py.

Shapes: H heads, T positions of the row, Q queries and K keys of one call, D width of a head.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoConfig,
)

from prefcache.pipeline.model.device import kind_of

NAME = "prefcache_segments"
# The layer types, as Transformers calls them, whose attention segments can express.
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# Config keys of what segments cannot express: chunks, recurrent states, positions as biases.
_UNSUPPORTED_KEYS = (
    "attention_chunk_size",
    "alibi",
    "ssm_cfg",
    "state_size",
    "mamba_d_state",
    "linear_num_key_heads",
    "attn_layer_period",
)
# Models whose configs do not show it.
_UNSUPPORTED_MODELS = {
    "bloom",
    "falcon",
    "mpt",
    "stablelm",
    "nemotron",
    "recurrent_gemma",
    "rwkv",
    "mamba",
    "mamba2",
    "jamba",
    "zamba",
}


class Branch(NamedTuple):
    """Consecutive positions of a row, and what they see before themselves: the path from the root of their tree.

    Each span of a path is the beginning of an earlier branch.
    """

    path: tuple[slice, ...]  # empty for the first branch of a tree
    own: slice
    blocks: tuple[slice, ...] = ()  # within `own`: positions that attend to one another in both directions

    @property
    def n_queries(self) -> int:
        return _length(self.own)

    @property
    def n_keys(self) -> int:
        return sum(map(_length, (*self.path, self.own)))


class CallIndices(NamedTuple):
    """A call for each branch, as one call, on the device: the keys to gather, and where each one's queries and keys begin."""

    keys: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor


@dataclass(frozen=True)
class Segments:
    """Which positions of a row attend to which."""

    branches: list[Branch]  # that make up the row, in its order
    eager: bool = False  # compute as eager attention does, without a fused kernel
    indices: CallIndices | None = None  # for a kernel that computes all calls at once

    @cached_property
    def has_blocks(self) -> bool:
        return any(branch.blocks for branch in self.branches)

    @cached_property
    def n_queries(self) -> list[int]:
        """Queries of each call."""
        return [branch.n_queries for branch in self.branches]

    @cached_property
    def n_keys(self) -> list[int]:
        return [branch.n_keys for branch in self.branches]

    def index_calls(self) -> dict[str, np.ndarray]:
        """The arrays of `CallIndices`, on the host."""
        spans = [span for branch in self.branches for span in (*branch.path, branch.own)]
        return {
            "keys": np.concatenate([np.arange(span.start, span.stop) for span in spans]),
            "query_starts": np.cumsum([0, *self.n_queries]).astype(np.int32),
            "key_starts": np.cumsum([0, *self.n_keys]).astype(np.int32),
        }


def _length(span: slice) -> int:
    return int(span.stop - span.start)


# -- what a model supports -------------------------------------------------------------------------------------------


def choose_kernel(folder: Path, wanted: str) -> str:
    """Return the attention that computes what the model in `folder` defines, without loading its weights.

    This is `wanted`, except for models that SDPA does not compute: those with caps or sinks, and those whose class in
    Transformers has no SDPA (BLOOM, GPT-J, Mamba). They take the model's own attention, which is eager.
    """
    # It imports pydantic, which the rest of this module does without.
    from prefcache.pipeline import model_files

    kernel = model_files.attention_kernel(folder, wanted)
    if kernel != "sdpa":
        return kernel
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # A folder that Transformers cannot load: loading it says why.
        return kernel
    return kernel if all(model_class._supports_sdpa for model_class in _model_classes(config)) else "eager"


def _model_classes(config: Any) -> tuple[Any, ...]:
    """The classes that Transformers may load as a causal language model for this config, or as one that also sees images."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    classes = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), ())
    return classes if isinstance(classes, tuple) else (classes,)


def unsupported_reason(config: Any) -> str | None:
    """Why a model with this config cannot be kept to segments, or None."""
    for model_class in _model_classes(config):
        if model_class._is_stateful:
            return f"{model_class.__name__} carries a state from token to token"
        if not model_class._can_set_attn_implementation():
            return f"{model_class.__name__} computes its attention by itself"
    config = config.get_text_config()
    if config.model_type in _UNSUPPORTED_MODELS:
        return f"{config.model_type} models take no segments"
    if unsupported := set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS:
        return f"it has layers of {', '.join(sorted(unsupported))}"
    if key := next((key for key in _UNSUPPORTED_KEYS if getattr(config, key, None)), None):
        return f"its config has {key}"
    return None


def missing_positions_reason(model: Any) -> str | None:
    """Why the decoder's signature rules packed rows out, or None."""
    parameters = inspect.signature(type(model.get_decoder()).forward).parameters
    # Further keywords of a decoder go to its attention, not to its positions.
    if "input_ids" in parameters and "position_ids" not in parameters:
        return "it computes positions from the row, so rows cannot be packed"
    return None


# -- the attention ---------------------------------------------------------------------------------------------------


def use_segments(model: Any) -> None:
    """Make the model's decoder require the keyword `segments`."""
    AttentionInterface.register(NAME, attend)
    set_kernel(model, NAME)


def set_kernel(model: Any, name: str) -> None:
    """Set the attention of the model's decoder; a vision tower next to it keeps its own."""
    decoder = model.get_decoder()
    is_wrapped = decoder is not getattr(model, model.base_model_prefix, decoder)
    (decoder if is_wrapped else model).set_attn_implementation(name)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Replace Transformers' own attention. If a model drops the keyword `segments`, this is a TypeError."""
    assert len(query) == 1
    assert attention_mask is None, "the model masks its attention by itself"
    eager = segments.eager or softcap is not None or s_aux is not None
    dtype = _compute_dtype(query)
    fits = not eager and not segments.has_blocks
    if kind_of(query.device) == "cuda" and fits and _fits_varlen_kernel(query, value, dtype):
        q_HTD, k_HTD, v_HTD = (states[0].to(dtype) for states in (query, key, value))
        return _varlen_attention(q_HTD, k_HTD, v_HTD, segments, scaling, sliding_window).unsqueeze(0), None
    outputs: list[torch.Tensor] = []
    calls = _split_calls(query[0], key[0], value[0], segments)
    for branch, (q_HQD, k_HKD, v_HKD) in zip(segments.branches, calls, strict=True):
        n_q, n_k = q_HQD.shape[1], k_HKD.shape[1]
        always = eager or n_q < n_k or bool(branch.blocks)
        mask_QK = _mask(n_q, n_k, sliding_window, query.device, branch.blocks, always=always)
        if eager:
            out_HQD = _eager_attention(q_HQD, k_HKD, v_HKD, mask_QK, scaling, softcap, s_aux)
        else:
            out_HQD = F.scaled_dot_product_attention(
                q_HQD[None],
                k_HKD[None],
                v_HKD[None],
                mask_QK,
                is_causal=mask_QK is None,
                scale=scaling,
                enable_gqa=True,
            )[0]
        outputs.append(out_HQD.transpose(0, 1))
    # In the model's order of dimensions, so that each call's result is copied once.
    return torch.cat(outputs).unsqueeze(0), None


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, if active: rotated queries and keys arrive in float32 there, and values do not."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def _fits_varlen_kernel(query: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether FlashAttention's kernel takes these shapes. DeepSeek's values, for one, are narrower than its keys."""
    width = query.shape[-1]
    return dtype in (torch.float16, torch.bfloat16) and value.shape[-1] == width <= 256 and width % 8 == 0


def _split_calls(
    q_HTD: torch.Tensor, k_HTD: torch.Tensor, v_HTD: torch.Tensor, segments: Segments
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield queries, keys and values of each call.

    The row is split once: the gradient of a slice of it would be as large as the row, and there would be one for every call.
    """
    q, k, v = (torch.split(x_HTD, segments.n_queries, 1) for x_HTD in (q_HTD, k_HTD, v_HTD))
    starts = {branch.own.start: i for i, branch in enumerate(segments.branches)}
    for i, branch in enumerate(segments.branches):
        if not branch.path:
            yield q[i], k[i], v[i]
        else:
            path = [(starts[span.start], _length(span)) for span in branch.path]
            keys, values = (torch.cat([*(x[j][:, :n] for j, n in path), x[i]], 1) for x in (k, v))
            yield q[i], keys, values


def _mask(
    n_q: int, n_k: int, window: int | None, device: torch.device, blocks: Sequence[slice] = (), *, always: bool
) -> torch.Tensor | None:
    """The last query sees all keys, the one before all but the last, ...; None if plain causal attention does that.

    Within each block of queries, all see one another.
    """
    if not always and (window is None or n_k <= window):
        return None
    last_Q1 = torch.arange(n_k - n_q, n_k, device=device).unsqueeze(1)
    key_K = torch.arange(n_k, device=device)
    seen_QK = key_K <= last_Q1
    for block in blocks:
        seen_QK[block, n_k - n_q + block.start : n_k - n_q + block.stop] = True
    return seen_QK if window is None else seen_QK & (key_K > last_Q1 - window)


def _eager_attention(
    q_HQD: torch.Tensor,
    k_HKD: torch.Tensor,
    v_HKD: torch.Tensor,
    mask_QK: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Support capped scores (Gemma 2) and heads that may attend to nothing (GPT-OSS), which no fused kernel takes."""
    groups = len(q_HQD) // len(k_HKD)
    k_HKD, v_HKD = k_HKD.repeat_interleave(groups, 0), v_HKD.repeat_interleave(groups, 0)
    scores_HQK = q_HQD @ k_HKD.transpose(1, 2) * (q_HQD.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_HQK = torch.tanh(scores_HQK / softcap) * softcap
    assert mask_QK is not None
    scores_HQK = scores_HQK.float().masked_fill(~mask_QK, float("-inf"))
    if sinks_H is not None:
        sinks_HQ1 = sinks_H.float().reshape(-1, 1, 1).expand(-1, scores_HQK.shape[1], 1)
        weights_HQK = torch.cat([scores_HQK, sinks_HQ1], -1).softmax(-1)[..., :-1]
    else:
        weights_HQK = scores_HQK.softmax(-1)
    return weights_HQK.to(v_HKD.dtype) @ v_HKD


def _varlen_attention(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute the whole row in one kernel, with the keys of a path repeated for each branch."""
    from torch.nn.attention.varlen import varlen_attn

    assert segments.indices is not None
    keys, query_starts, key_starts = segments.indices
    # PyTorch 2.11 accepts fewer key heads without this keyword, which it does not have.
    has_keyword = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if has_keyword and q_HTD.shape[0] != k_HTD.shape[0] else {}
    out_THD: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # it returns more only when asked for more
        q_HTD.transpose(0, 1).contiguous(),
        k_HTD.transpose(0, 1)[keys],
        v_HTD.transpose(0, 1)[keys],
        query_starts,
        key_starts,
        max(segments.n_queries),
        max(segments.n_keys),
        scale=scaling,
        # To the left, not counting the query itself. Queries are aligned with the last keys.
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return out_THD
