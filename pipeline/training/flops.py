"""The arithmetic of a step, from the shapes of the model and of its rows; and its share of a GPU's peak (MFU).

Only matrix products of forwards that have a backward are counted, a multiplication with its addition as two operations. The
backward pass multiplies as much for a layer's input, and as much again for trained weights. Attention is the whole square of
queries and keys. Layers and logits recomputed to save memory and a first pass over the batch are not counted: Chowdhery et al.
2022, https://arxiv.org/abs/2204.02311, App. B.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from prefcache.pipeline.model.packed_row import lay_out
from prefcache.pipeline.model.tower import tower_modules
from prefcache.pipeline.model.trainable import adapted_parameters
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training import gpus

_PROJECTOR = re.compile(r"merger|projector|connector")


class Work(NamedTuple):
    """What one forward computes, or several."""

    positions: float
    head_positions: float
    attended: float  # pairs of a query and a key, in each head of each layer
    image_tokens: float = 0  # tokens of images that the vision tower computes; 0 where their features are stored

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> "Work":
        return Work(*(n * value for value in self))


def count_work(groups: Sequence[Sequence[TokenSequence]], layout: str, image_token: int | None = None) -> Work:
    """Count a forward of these groups; forward.py explains the layouts.

    `image_token`: its id, if the forward computes the tower; each prompt's images then count once.
    """
    prompts = {sequence.prompt: sequence for group in groups for sequence in group if sequence.images}
    seen = sum(int((each.prompt_ids == image_token).sum()) for each in prompts.values()) if image_token else 0
    if layout == "padded":
        sequences = [sequence for group in groups for sequence in group]
        longest = max(sequence.n_tokens for sequence in sequences) - 1
        # The head computes a position for all if it predicts a counted token of any.
        kept = np.unique(np.concatenate([len(each.prompt_ids) + each.counted_positions for each in sequences]))
        return Work(len(sequences) * longest, len(sequences) * len(kept), len(sequences) * longest**2, seen)
    row = lay_out(groups)
    attended = sum(branch.n_queries * branch.n_keys for branch in row.branches)
    return Work(len(row.input_T), len(row.source_M), attended, seen)


@dataclass(frozen=True)
class Cost:
    """A model's multiplications for one position or pair, forward and backward."""

    position: float
    head_position: float
    attended: float
    each_forward: float = 0  # the products of an adapter's factors, which are added to the weights of experts
    image_token: float = 0  # of the vision tower, without its attention

    def flops(self, work: Work) -> float:
        by_size = (
            self.position * work.positions + self.head_position * work.head_positions + self.attended * work.attended
        )
        return 2 * (by_size + self.image_token * work.image_tokens + self.each_forward)


def model_cost(model: Any, *, backward: bool = True) -> Cost:
    """Count the multiplications of a forward, with those of its backward pass or without."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    # An adapter of a parameter is multiplied out and added to it. The gradient of the sum is whole, and goes on to the factors.
    wrappers = list(adapted_parameters(model).values())
    pairs = [(a, wrapper.lora_B[name]) for wrapper in wrappers for name, a in wrapper.lora_A.items()]
    apart = {id(module) for module in (head, *itertools.chain(*pairs))}
    summed = {id(wrapper.get_param()) for wrapper in wrappers}
    apart |= set(map(id, tower_modules(model)))
    modules = [module for module in model.modules() if id(module) not in apart]
    body = sum(_module_cost(module, model, summed, backward) for module in modules)
    most = 3 if backward else 1
    products = sum(most * a.weight.numel() * b.out_features for a, b in pairs)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_width, value_width = (getattr(config, name, None) or width for name in ("qk_head_dim", "v_head_dim"))
    attended = most * config.num_hidden_layers * config.num_attention_heads * (key_width + value_width)
    head_cost = _passes(head.weight, backward) * head.weight.numel()
    return Cost(body, head_cost, attended, products, _tower_cost(model, backward))


def _tower_cost(model: Any, backward: bool) -> float:
    """Multiplications of a trained tower for one token of an image, which several patches make up.

    Its attention is left out, and so is what its features do not depend on, which is frozen (vision.freeze_unused).
    """
    tower, cost = tower_modules(model), 0.0
    for name, module in model.named_modules():
        if module in tower and not isinstance(module, torch.nn.Embedding):
            per_token = 1 if _PROJECTOR.search(name) else _patches_of_token(model.config)
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1 and p.requires_grad]
            cost += per_token * sum(_passes(weight, backward) * weight.numel() for weight in matrices)
    return cost


def _patches_of_token(config: Any) -> float:
    """How many patches of a picture the projector makes one token of."""
    vision = config.vision_config
    side = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    side = side or getattr(config, "scale_factor", None)
    if side is None and (ratio := getattr(config, "downsample_ratio", None)):
        side = 1 / ratio
    if side is None and (n_tokens := getattr(config, "mm_tokens_per_image", None)):
        return float((vision.image_size // vision.patch_size) ** 2 / n_tokens)
    return float(side**2) if side else 1.0


def _passes(weight: torch.Tensor, backward: bool) -> int:
    return (3 if weight.requires_grad else 2) if backward else 1


def _module_cost(module: torch.nn.Module, model: Any, summed: set[int], backward: bool) -> float:
    """Multiplications by this module's own weights for one position. Those `summed` with an adapter have a gradient."""
    if isinstance(module, torch.nn.Embedding):
        return 0
    if isinstance(module, torch.nn.Linear):  # a quantized weight has fewer elements than it stands for
        return _passes(module.weight, backward) * module.in_features * module.out_features
    if isinstance(module, Conv1D):
        return float(_passes(module.weight, backward) * module.weight.numel())
    cost = 0.0
    for name, weight in module.named_parameters(recurse=False):
        passes = 3 if backward and id(weight) in summed else _passes(weight, backward)
        if weight.ndim == 2 and not name.endswith("bias"):  # experts have biases of two dimensions
            cost += passes * weight.numel()
        if weight.ndim == 3:  # experts, of which each position takes some
            n_chosen = int(model.config.get_text_config().num_experts_per_tok)
            cost += passes * weight.numel() * n_chosen / len(weight)
    return cost


def peak_flops(device: torch.device, precision: str) -> float | None:
    """A device's peak operations per second, or None if unknown."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    gpu = gpus.find_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16_flops if gpu else None
