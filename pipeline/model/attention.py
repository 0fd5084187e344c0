"""Attention within the segments of a packed row: a prompt is computed once, and every answer sees it and itself only.

A row holds groups one after another, each a prompt and its answers: `prompt, answer, answer, ...`. `use_segments` tells
a Transformers model to attend that way; no file of the model is touched and no mask over the row is built. Whether a
model computes the same this way is for its caller to check: see engines/transformers.py.

Shapes: H heads, T positions of the row, Q queries and K keys of one call, D width of a head.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.model.logprobs import sent

NAME = "prefcache_segments"
# What Transformers calls layers whose attention is within reach of segments.
_LAYERS = {"full_attention", "sliding_attention"}
# Keys of a config that stand for what segments cannot express: chunks, states that run on, positions as biases.
_SIGNS = (
    "attention_chunk_size",
    "alibi",
    "ssm_cfg",
    "state_size",
    "mamba_d_state",
    "linear_num_key_heads",
    "attn_layer_period",
)
# No file of theirs says it in the config.
_MODELS = {
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
    """An answer that is not the first of its group."""

    prompt: slice
    own: slice


@dataclass(frozen=True)
class Segments:
    """Where in a row what attends to what."""

    trunks: list[slice]  # a prompt and its first answer, causal
    branches: list[Branch]
    device: torch.device | str
    spelt_out: bool = False  # without a fused kernel, as eager attention computes

    @cached_property
    def calls(self) -> list[tuple[slice, tuple[slice, ...]]]:
        """(queries, spans of their keys) in the order of the row."""
        trunks: list[tuple[slice, tuple[slice, ...]]] = [(trunk, (trunk,)) for trunk in self.trunks]
        branches = [(branch.own, tuple(branch)) for branch in self.branches]
        return sorted([*trunks, *branches], key=lambda call: call[0].start)

    @cached_property
    def variable_lengths(self) -> dict[str, Any]:
        """The same for one call over the whole row: the keys gathered, and where each call's queries and keys begin."""
        n_q = [_length(queries) for queries, _ in self.calls]
        n_k = [sum(map(_length, spans)) for _, spans in self.calls]
        keys = [torch.arange(span.start, span.stop) for _, spans in self.calls for span in spans]
        return {
            "keys": sent(torch.cat(keys), self.device),
            "cu_q": _starts(n_q, self.device),
            "cu_k": _starts(n_k, self.device),
            "max_q": max(n_q),
            "max_k": max(n_k),
        }


def _length(span: slice) -> int:
    return int(span.stop - span.start)


def _starts(counts: list[int], device: torch.device | str) -> torch.Tensor:
    return sent(F.pad(torch.tensor(counts).cumsum(0), (1, 0)).to(torch.int32), device)


def why_not(config: Any) -> str | None:
    """What in a model's config rules segments out; None where nothing does."""
    config = config.get_text_config()
    if config.model_type in _MODELS:
        return f"{config.model_type} models take no segments"
    if other := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        return f"it has layers of {', '.join(sorted(other))}"
    if found := [sign for sign in _SIGNS if getattr(config, sign, None)]:
        return f"its config has {found[0]}"
    return None


def use_segments(model: Any) -> None:
    """From now on the model's forward wants `segments`."""
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


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
    """What Transformers calls in place of its own attention. A keyword `segments` that does not arrive is a TypeError."""
    assert len(query) == 1 and attention_mask is None
    special = segments.spelt_out or softcap is not None or s_aux is not None
    dtype = _computed_in(query)
    if query.is_cuda and not special and _fits_one_call(query, value, dtype):
        q_HTD, k_HTD, v_HTD = (each[0].to(dtype) for each in (query, key, value))
        return _in_one_call(q_HTD, k_HTD, v_HTD, segments, scaling, sliding_window).unsqueeze(0), None
    found: list[torch.Tensor] = []
    for q_HQD, k_HKD, v_HKD in _of_each_call(query[0], key[0], value[0], segments):
        n_q, n_k = q_HQD.shape[1], k_HKD.shape[1]
        mask_QK = _mask(n_q, n_k, sliding_window, query.device, always=special or n_q < n_k)
        if special:
            found_HQD = _spelt_out(q_HQD, k_HKD, v_HKD, mask_QK, scaling, softcap, s_aux)
        else:
            found_HQD = F.scaled_dot_product_attention(
                q_HQD[None],
                k_HKD[None],
                v_HKD[None],
                mask_QK,
                is_causal=mask_QK is None,
                scale=scaling,
                enable_gqa=True,
            )[0]
        found.append(found_HQD.transpose(0, 1))
    # As the model reads it next: each call's result is copied once.
    return torch.cat(found).unsqueeze(0), None


def _computed_in(query: torch.Tensor) -> torch.dtype:
    """Under autocast, rotated queries and keys arrive in float32 and values do not: what they are computed in says autocast."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _fits_one_call(query: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> bool:
    """What FlashAttention's kernel takes. DeepSeek's values, for one, are narrower than its keys."""
    width = query.shape[-1]
    return dtype in (torch.float16, torch.bfloat16) and value.shape[-1] == width <= 256 and width % 8 == 0


def _of_each_call(
    q_HTD: torch.Tensor, k_HTD: torch.Tensor, v_HTD: torch.Tensor, segments: Segments
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of each call. They are split off the row all at once: the gradient of a slice of the row
    would be as large as the row, and there would be one for every call."""
    calls = segments.calls
    lengths = [_length(queries) for queries, _ in calls]
    q, k, v = (torch.split(x_HTD, lengths, 1) for x_HTD in (q_HTD, k_HTD, v_HTD))
    trunk = 0  # the call in which the prompt is that this branch sees
    for i, (_, spans) in enumerate(calls):
        if len(spans) == 1:
            trunk = i
            yield q[i], k[i], v[i]
        else:
            assert spans[0].start == calls[trunk][0].start
            n = _length(spans[0])
            keys, values = (torch.cat([x[trunk][:, :n], x[i]], 1) for x in (k, v))
            yield q[i], keys, values


def _mask(n_q: int, n_k: int, window: int | None, device: torch.device, *, always: bool) -> torch.Tensor | None:
    """The last query sees all keys, the one before all but the last, ...; None where plain causal attention says it."""
    if not always and (window is None or n_k <= window):
        return None
    last_Q1 = torch.arange(n_k - n_q, n_k, device=device).unsqueeze(1)
    at_K = torch.arange(n_k, device=device)
    seen_QK = at_K <= last_Q1
    return seen_QK if window is None else seen_QK & (at_K > last_Q1 - window)


def _spelt_out(
    q_HQD: torch.Tensor,
    k_HKD: torch.Tensor,
    v_HKD: torch.Tensor,
    mask_QK: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """For capped scores (Gemma 2) and heads that may attend to nothing (GPT-OSS), which no fused kernel takes."""
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


def _in_one_call(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One kernel for the whole row; prompts' keys are there once more for each further answer."""
    from torch.nn.attention.varlen import varlen_attn

    at = segments.variable_lengths
    # PyTorch 2.11 takes fewer heads of keys as they are, and knows no keyword that says so.
    takes_it = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if takes_it and q_HTD.shape[0] != k_HTD.shape[0] else {}
    out_THD: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # it returns more only when asked for more
        q_HTD.transpose(0, 1).contiguous(),
        k_HTD.transpose(0, 1)[at["keys"]],
        v_HTD.transpose(0, 1)[at["keys"]],
        at["cu_q"],
        at["cu_k"],
        at["max_q"],
        at["max_k"],
        scale=scaling,
        # To the left; the query itself comes on top. Queries are aligned with the last keys.
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return out_THD
