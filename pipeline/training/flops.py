"""The arithmetic of a step, from the shapes of the model and of its rows; and which share of a GPU's best that is (MFU).

Counted are multiplications of matrices, a multiplication with its addition as two, of forwards that have a backward. The backward pass
multiplies as much for what a layer was given, and as much again for weights that are trained. Attention is the whole square of
queries and keys. What is computed once more to spare memory, and a first pass over the batch, is not counted: Chowdhery et al.
2022, https://arxiv.org/abs/2204.02311, App. B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from pipeline.schema import Sequence as TokenSequence

# In bf16, dense, as the makers' data sheets have them; the first whose words are all in the device's name.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Computed(NamedTuple):
    """By one forward."""

    positions: int
    head_positions: int
    attended: int  # pairs of a query and a key, in each head of each layer


def computed(groups: Sequence[Sequence[TokenSequence]], way: str) -> Computed:
    """See forward.py for the ways."""
    if way == "padded":
        sequences = [each for group in groups for each in group]
        longest = max(each.n_tokens for each in sequences) - 1
        n_head = longest - (min(len(each.prompt_ids) for each in sequences) - 1)
        return Computed(len(sequences) * longest, len(sequences) * n_head, len(sequences) * longest**2)
    positions = head_positions = attended = 0
    for group in groups:
        n_prompt, (first, *others) = len(group[0].prompt_ids), [len(each.completion_ids) - 1 for each in group]
        positions += n_prompt + first + sum(others)
        head_positions += first + 1 + sum(n + 1 for n in others)
        attended += (n_prompt + first) ** 2 + sum(n * (n_prompt + n) for n in others)
    return Computed(positions, head_positions, attended)


@dataclass(frozen=True)
class Shapes:
    """Of a model: multiplications for one position or pair, forward and backward."""

    of_position: float
    of_head_position: float
    of_attended: float

    def flops(self, done: Computed) -> float:
        return 2 * (
            self.of_position * done.positions
            + self.of_head_position * done.head_positions
            + self.of_attended * done.attended
        )


def shapes_of(model: Any) -> Shapes:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    body = sum(_multiplied(module, model) for module in model.modules() if module is not head)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_layer = config.num_attention_heads * (
        (getattr(config, "qk_head_dim", None) or width) + (getattr(config, "v_head_dim", None) or width)
    )
    return Shapes(body, _passes(head.weight) * head.weight.numel(), 3 * config.num_hidden_layers * of_layer)


def _passes(weight: torch.Tensor) -> int:
    return 3 if weight.requires_grad else 2


def _multiplied(module: torch.nn.Module, model: Any) -> float:
    """With the weights of this module alone, for one position."""
    if isinstance(module, torch.nn.Embedding):
        return 0
    if isinstance(module, torch.nn.Linear):  # a quantised weight has fewer elements than it stands for
        return _passes(module.weight) * module.in_features * module.out_features
    if isinstance(module, Conv1D):
        return float(_passes(module.weight) * module.weight.numel())
    found = 0.0
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim == 2 and not name.endswith("bias"):  # experts have biases of two dimensions
            found += _passes(weight) * weight.numel()
        if weight.ndim == 3:  # experts, of which each position takes some
            taken = int(model.config.get_text_config().num_experts_per_tok)
            found += _passes(weight) * weight.numel() * taken / len(weight)
    return found


def peak(device: torch.device, precision: str) -> float | None:
    """What a device can do at best in a second; None where that is not known."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """By the name that CUDA gives, where it is that of a whole GPU and not of a smaller one's."""
    words = set(name.replace("-", " ").split())
    if words & {"MIG", "Laptop", "D"}:
        return None
    return next((found for known, found in _PEAKS.items() if words.issuperset(known.split())), None)
