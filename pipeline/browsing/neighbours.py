"""The neighbours of an example: those with the same prompt, its duplicates, and those that contradict it.

Numbers rule out nearly all examples before a text or a key is read, so millions of mapped examples take a moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Positions = np.ndarray  # of examples in the prepared data


@dataclass(frozen=True)
class Neighbours:
    """Positions of other examples, each in one of the groups."""

    duplicates: Positions  # the same answers, token by token, preferred in the same way
    contradictions: Positions  # the same answers, preferred the other way round
    same_prompt: Positions  # other answers to the same prompt


def find_neighbours(examples: pa.Table, position: int, kind: str) -> Neighbours:
    same, swapped = _find_pairs(examples, position) if kind == "pairs" else _find_labels(examples, position)
    duplicates = same[same != position]
    known = np.concatenate([[position], duplicates, swapped])
    prompts = _find_prompts(examples, position)
    return Neighbours(duplicates, swapped, prompts[~np.isin(prompts, known)])


def _find_pairs(examples: pa.Table, position: int) -> tuple[Positions, Positions]:
    """Find the pairs with the same keys, and those with the same keys swapped."""
    counts = {name: examples[name].to_numpy() for name in ("n_prompt", "n_chosen", "n_rejected")}
    n_prompt, n_chosen, n_rejected = (column[position] for column in counts.values())
    chosen, rejected = (examples[name][position] for name in ("chosen_key", "rejected_key"))
    has_prompt = counts["n_prompt"] == n_prompt

    def find(sizes: tuple[int, int], keys: tuple[pa.Scalar, pa.Scalar]) -> Positions:
        at = np.flatnonzero(has_prompt & (counts["n_chosen"] == sizes[0]) & (counts["n_rejected"] == sizes[1]))
        return _keep_equal(examples, at, dict(zip(("chosen_key", "rejected_key"), keys, strict=True)))

    swapped = find((n_rejected, n_chosen), (rejected, chosen))
    return find((n_chosen, n_rejected), (chosen, rejected)), swapped[swapped != position]


def _find_labels(examples: pa.Table, position: int) -> tuple[Positions, Positions]:
    """Find the labels with the same key, and those of them that say the opposite."""
    counts = [examples[name].to_numpy() for name in ("n_prompt", "n_completion")]
    at = np.flatnonzero(np.logical_and.reduce([column == column[position] for column in counts]))
    at = _keep_equal(examples, at, {"completion_key": examples["completion_key"][position]})
    labels = _take(examples, "label", at).to_numpy(zero_copy_only=False)
    is_same = labels == examples["label"][position].as_py()
    return at[is_same], at[~is_same]


def _find_prompts(examples: pa.Table, position: int) -> Positions:
    prompt = examples["prompt"][position]
    if prompt.as_py() is None:
        return np.empty(0, np.int64)
    # The whole prompt's tokens, however many truncation left, and its bytes.
    n_tokens = examples["n_prompt"].to_numpy() + examples["cut_prompt"].to_numpy()
    n_bytes = pc.binary_length(examples["prompt"]).to_numpy()
    at = np.flatnonzero((n_tokens == n_tokens[position]) & (n_bytes == n_bytes[position]))
    return _keep_equal(examples, at, {"prompt": prompt})


def _keep_equal(examples: pa.Table, at: Positions, values: dict[str, pa.Scalar]) -> Positions:
    for name, value in values.items():
        is_equal = pc.equal(_take(examples, name, at), value)
        at = at[pc.fill_null(is_equal, False).to_numpy(zero_copy_only=False)]
    return at


def _take(examples: pa.Table, name: str, at: Positions | Sequence[int]) -> pa.Array:
    taken = examples[name].take(pa.array(at, pa.int64()))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
