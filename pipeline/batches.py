"""What a training step reads: pairs with their reference log-probs, in the sampler's order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.packing import token_budget_batches
from pipeline.schema import Sequence


@dataclass(frozen=True)
class Batch:
    """Some pairs: their tokens, and the columns that a loss may read. Shape of every column: [B]."""

    chosen: list[Sequence]
    rejected: list[Sequence]
    columns: dict[str, torch.Tensor]


class Pairs:
    """The examples of one split that have reference values, by row."""

    def __init__(self, table: pa.Table, sequences: Any, reference: dict[str, np.ma.MaskedArray]) -> None:
        masks = [np.ma.getmaskarray(values) for values in reference.values()]
        self._rows = np.flatnonzero(~np.logical_or.reduce(masks)) if len(table) else np.array([], dtype=np.int64)
        self.n_without_reference = len(table) - len(self._rows)
        self._sequences = sequences
        self._example_id, self._prompt = table["example_id"], table["prompt"]
        counts = {name: table[name].to_numpy() for name in ("n_prompt", "n_chosen", "n_rejected")}
        self._columns = {name: counts[name] for name in ("n_chosen", "n_rejected")} | {
            name: np.ma.getdata(values) for name, values in reference.items()
        }
        self._longest = counts["n_prompt"] + np.maximum(counts["n_chosen"], counts["n_rejected"])
        self._tokens = 2 * counts["n_prompt"] + counts["n_chosen"] + counts["n_rejected"]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def column_names(self) -> set[str]:
        return {"chosen_logp", "rejected_logp", *self._columns}

    def batch(self, indices: np.ndarray, device: torch.device | str) -> Batch:
        rows = self._rows[indices]
        columns = {
            name: torch.as_tensor(values[rows], dtype=torch.float64, device=device)
            for name, values in self._columns.items()
        }
        chosen, rejected = self._sequences.pairs(rows.tolist())
        return Batch(chosen, rejected, columns)

    def micro_batches(self, indices: np.ndarray, budget: int) -> list[np.ndarray]:
        """`indices` split so that both padded answers of the pairs in a part stay within `budget` tokens."""
        lengths = (2 * self._longest[self._rows[indices]]).tolist()
        return [indices[part] for part in token_budget_batches(lengths, budget)]

    def n_tokens(self, indices: np.ndarray) -> int:
        return int(self._tokens[self._rows[indices]].sum())

    def example_ids(self, indices: np.ndarray) -> list[str]:
        return list(self._example_id.take(pa.array(self._rows[indices])).to_pylist())

    def prompts(self, indices: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
        """Prompts as text and as ids."""
        rows = self._rows[indices]
        return self._prompt.take(pa.array(rows)).to_pylist(), [self._sequences[2 * row].prompt_ids for row in rows]


def n_steps(n_pairs: int, batch_size: int, epochs: float) -> int:
    return max(1, round(epochs * -(-n_pairs // batch_size)))


def steps(
    n_pairs: int, batch_size: int, epochs: float, seed: int, after: int
) -> Iterator[tuple[int, float, np.ndarray]]:
    """(step from 1, epoch reached, pairs of the step), from the step after `after` on.

    The order depends on the seed, the epoch and the number of pairs alone, so a resumed run, another number of
    processes and a run with a live reference all see the same batches.
    """
    per_epoch = -(-n_pairs // batch_size)
    shuffled = None
    for step in range(after, n_steps(n_pairs, batch_size, epochs)):
        epoch, i = divmod(step, per_epoch)
        if shuffled != epoch:
            order, shuffled = np.random.default_rng([seed, epoch]).permutation(n_pairs), epoch
        yield step + 1, (step + 1) / per_epoch, order[i * batch_size : (i + 1) * batch_size]
