"""What a training step reads: examples with their reference log-probs, in the order of the steps."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from prefcache.pipeline.model.packing import (
    balanced_batches,
    order_tree,
    row_tokens,
    split_evenly,
    token_budget_batches,
)
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.stored.counted_logps import CountedLogps
from prefcache.pipeline.stored.prepared import CountedTokens, IdLists, ImageLists
from prefcache.pipeline.training.objective import GIVEN_WEIGHT
from prefcache.pipeline.training.selection import Choice

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Some examples. Shape of every column: [B]."""

    rows: list[int]  # in the prepared table
    columns: dict[str, np.ndarray]
    answers: dict[str, list[TokenSequence | None]]  # None: this example lacks the answer
    reference_tokens: dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Scores:
    """A reference's log-probs of some examples, by answer: sums of shape [B], nan for a missing answer; tokens if they are read.

    Both are of the tokens that count.
    """

    indices: np.ndarray
    sums: dict[str, np.ndarray]
    tokens: dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class SplitData:
    """One split: its prepared table, and what the data and the cache give for each of its rows."""

    table: pa.Table
    columns: Columns  # nan for a missing value
    answers: Sequence[str]  # computed in one forward
    optional: Sequence[str] = ()  # answers that an example may lack; they have a forward of their own
    learned: Sequence[str] | None = None  # the answers that a step computes, if not all
    tokens: Mapping[str, CountedLogps] = field(default_factory=dict)  # the reference's, by answer

    @cached_property
    def incomplete_rows(self) -> dict[str, np.ndarray]:
        """Rows that lack a value, by the first column that they lack."""
        complete, incomplete = np.ones(len(self.table), bool), {}
        for name, values in self.columns.items():
            if _answer_of(name) not in self.optional:
                rows = np.flatnonzero(complete & np.isnan(values))
                if len(rows):
                    incomplete[name] = rows
                    complete[rows] = False
        return incomplete

    @property
    def complete_rows(self) -> np.ndarray:
        complete = np.ones(len(self.table), bool)
        for rows in self.incomplete_rows.values():
            complete[rows] = False
        return np.flatnonzero(complete)


class Examples:
    """The examples of a split that have all that the objective reads; with a choice, only the chosen ones."""

    def __init__(self, data: SplitData, choice: Choice | None = None) -> None:
        table, answers, optional = data.table, data.answers, data.optional
        choice = choice or Choice(data.complete_rows)
        self._rows, self.ranks, self.notes = choice.rows, choice.ranks, choice.notes
        self.left_out = {column: len(rows) for column, rows in data.incomplete_rows.items()}
        self._columns = dict(data.columns)
        if choice.weight is not None:
            self._columns[GIVEN_WEIGHT] = np.full(len(table), np.nan)
            self._columns[GIVEN_WEIGHT][choice.rows] = choice.weight
        self._tokens: dict[str, CountedLogps | dict[int, np.ndarray]] = dict(data.tokens)
        self._example_id, self._prompt = table["example_id"], table["prompt"]
        self._prompt_ids, self._images = IdLists(table["prompt_ids"]), ImageLists(table)
        self._answer_ids = {name: IdLists(table[f"{name}_ids"]) for name in (*answers, *optional)}
        # Without the reference's log-prob, nothing could be learned from the policy's.
        self._has = {
            name: np.logical_and.reduce(
                [table[f"{name}_ids"].is_valid().to_numpy()]
                + [~np.isnan(values) for column, values in self._columns.items() if _answer_of(column) == name]
            )
            for name in optional
        }
        self._counted = {name: CountedTokens(table, name) for name in self._answer_ids}
        n_prompt = table["n_prompt"].to_numpy().astype(np.int64)
        lengths = {name: n_prompt + counted.n_all.astype(np.int64) for name, counted in self._counted.items()}
        # Tokens of the forward that an example's answers share, by layout. The last token of an answer is not an input.
        answer_lengths = np.stack([lengths[name] for name in answers])
        packed = (answer_lengths - 1).sum(0)
        together = {"padded": len(answers) * answer_lengths.max(0), "packed": packed, "shared": packed}
        if len(answers) > 1:
            n_common = n_prompt + table["n_common"].fill_null(0).to_numpy()
            together["shared"] = packed - np.minimum(n_common, answer_lengths.min(0) - 1)
        self._together = answers
        alone = [lengths[name] for name in optional]
        self._sizes = {layout: np.maximum.reduce([sizes, *alone]) for layout, sizes in together.items()}
        self._n_tokens = np.sum([lengths[name] for name in data.learned or answers], axis=0)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def missing_kind(self) -> str | None:
        """The kind of labels that no example has; None if both occur, or for pairs."""
        if "label" not in self._columns or not len(self):
            return None
        label = self._columns["label"][self._rows]
        return "undesirable" if label.all() else None if label.any() else "desirable"

    def batch(self, indices: np.ndarray, answers: Sequence[str] = ()) -> Batch:
        """Some examples with their columns, and the tokens of these answers."""
        rows = self._rows[indices].tolist()
        return Batch(
            rows,
            {name: values[rows].astype(np.float64) for name, values in self._columns.items()},
            {name: [self._sequence(name, row) for row in rows] for name in answers},
            {name: [self._tokens[name][row] for row in rows] for name in answers if name in self._tokens},
        )

    def _sequence(self, answer: str, row: int) -> TokenSequence | None:
        if answer in self._has and not self._has[answer][row]:
            return None
        counted = self._counted[answer].positions(row)
        return TokenSequence(self._prompt_ids[row], self._answer_ids[answer][row], counted, self._images[row])

    # -- the reference -----------------------------------------------------------------------------------------------

    def forget_reference(self) -> None:
        """Set its log-probs to nan until others replace them, so that no stale one is read unnoticed."""
        self._tokens = {}
        self._columns |= {
            name: np.full_like(values, np.nan) for name, values in self._columns.items() if name.startswith("ref_")
        }

    def take_reference(self, scores: Scores) -> None:
        """Use these log-probs as the reference's."""
        rows = self._rows[scores.indices]
        for name, sums in scores.sums.items():
            self._columns[f"ref_{name}_logp"][rows] = sums
        self._tokens |= {name: dict(zip(rows.tolist(), lists, strict=True)) for name, lists in scores.tokens.items()}

    # -- sizes -------------------------------------------------------------------------------------------------------

    def sizes(self, indices: np.ndarray, layout: str) -> np.ndarray:
        """Tokens that each example takes in a forward of its own."""
        sizes: np.ndarray = self._sizes[layout][self._rows[indices]]
        return sizes

    def count_tokens(self, indices: np.ndarray, layout: str) -> int:
        """Tokens of one forward of these examples."""
        sizes = self.sizes(indices, layout)
        if layout == "padded":
            return len(sizes) * int(sizes.max(initial=0))
        return sum(self._unit_tokens(indices[unit], layout) for unit in self._units(indices, layout))

    def micro_batches(
        self, indices: np.ndarray, budget: int, max_examples: int | None = None, layout: str = "padded"
    ) -> list[np.ndarray]:
        """Split `indices` so that no forward has more than `budget` tokens and no part more than `max_examples`."""
        parts = np.split(indices, range(max_examples, len(indices), max_examples)) if max_examples else [indices]
        if layout == "padded":
            batches = [token_budget_batches(self.sizes(part, layout).tolist(), budget) for part in parts]
        else:
            batches = [self._balance(part, layout, budget) for part in parts]
        return [part[batch] for part, split in zip(parts, batches, strict=True) for batch in split]

    def _balance(self, indices: np.ndarray, layout: str, budget: int) -> list[list[int]]:
        units = self._units(indices, layout, budget)
        sizes = [self._unit_tokens(indices[unit], layout) for unit in units]
        return [[i for k in batch for i in units[k]] for batch in balanced_batches(sizes, budget)]

    def shares(self, indices: np.ndarray, n: int, layout: str) -> list[np.ndarray]:
        """Split `indices` among `n` processes into shares of about as many tokens, so that none waits long for the others."""
        if n == 1:
            return [indices]
        units = self._units(indices, layout, -(-self.count_tokens(indices, layout) // n))
        sizes = [self._unit_tokens(indices[unit], layout) for unit in units]
        shares = [sorted(i for k in part for i in units[k]) for part in split_evenly(sizes, n)]
        return [indices[share] if share else indices[:0] for share in shares]

    def _units(self, indices: np.ndarray, layout: str, budget: int = sys.maxsize) -> list[list[int]]:
        """Positions in `indices` of examples that are best computed together: in shared rows those of a prompt."""
        if layout != "shared":
            return [[i] for i in range(len(indices))]
        by_prompt: dict[tuple[bytes, tuple[bytes, ...]], list[int]] = {}
        for i, row in enumerate(self._rows[indices].tolist()):
            by_prompt.setdefault((self._prompt_ids[row].tobytes(), self._images[row]), []).append(i)
        return [part for unit in by_prompt.values() for part in self._split_unit(indices, unit, budget)]

    def _split_unit(self, indices: np.ndarray, unit: list[int], budget: int) -> list[list[int]]:
        """Cut a unit that is too large, so that examples whose first answers have most in common stay together."""
        if len(unit) == 1 or self._unit_tokens(indices[unit]) <= budget:
            return [unit]
        first = [self._sequence(self._together[0], row) for row in self._rows[indices[unit]].tolist()]
        parts: list[list[int]] = []
        for place, _ in order_tree([each for each in first if each is not None]):
            if not parts or self._unit_tokens(indices[[*parts[-1], unit[place]]]) > budget:
                parts.append([])
            parts[-1].append(unit[place])
        return parts

    def _unit_tokens(self, indices: np.ndarray, layout: str = "shared") -> int:
        """Tokens of one forward of these examples, which are one, or have one prompt."""
        if len(indices) == 1:
            return int(self.sizes(indices, layout)[0])
        forwards = [
            [
                each
                for row in self._rows[indices].tolist()
                for name in names
                if (each := self._sequence(name, row)) is not None
            ]
            for names in (self._together, self._has)
        ]
        return max(row_tokens(sequences, range(len(sequences))) for sequences in forwards if sequences)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return max((sequence.n_tokens for sequence in self.longest(1)), default=0)

    def longest(self, n: int) -> list[TokenSequence]:
        """Sequences of the longest example and of others from all over the data, `n` examples in all."""
        if not len(self):
            return []
        longest = int(np.argmax(self._sizes["padded"][self._rows]))
        chosen = dict.fromkeys([longest, *map(int, np.linspace(0, len(self) - 1, n - 1))])
        # Whether rows are right for images shows only where there are some.
        if n > 1 and not any(self.images(np.array(list(chosen)))):
            chosen |= dict.fromkeys(itertools.islice((i for i in range(len(self)) if self._images[self._rows[i]]), 1))
        rows = [int(self._rows[i]) for i in chosen]
        sequences = (self._sequence(name, row) for row in rows for name in self._answer_ids)
        return [sequence for sequence in sequences if sequence is not None]

    def n_counted_tokens(self, answer: str, indices: np.ndarray) -> np.ndarray:
        n: np.ndarray = self._counted[answer].n[self._rows[indices]]
        return n

    def n_tokens(self, indices: np.ndarray) -> int:
        return int(self._n_tokens[self._rows[indices]].sum())

    # -- ids and text ------------------------------------------------------------------------------------------------

    def example_ids(self, indices: np.ndarray) -> list[str]:
        return list(self._example_id.take(pa.array(self._rows[indices])).to_pylist())

    def prompts(self, indices: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
        """Prompts as text and as ids."""
        rows = self._rows[indices]
        return self._prompt.take(pa.array(rows)).to_pylist(), [self._prompt_ids[row] for row in rows]

    def images(self, indices: np.ndarray) -> list[tuple[bytes, ...]]:
        """The images of each example's prompt, in their order."""
        return [self._images[row] for row in self._rows[indices].tolist()]


def _answer_of(column: str) -> str:
    return column.removeprefix("ref_").removesuffix("_logp")


# -- the order of the steps ------------------------------------------------------------------------------------------


def n_steps(n_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Count the steps of a run. `max_steps` replaces the epochs."""
    return max_steps or max(1, round(epochs * -(-n_examples // batch_size)))


def evaluates(step: int, n_steps: int, every: int | None) -> bool:
    """Whether the held-out examples are evaluated after a step."""
    return step == n_steps or (every is not None and step % every == 0)


def steps(
    n_examples: int,
    batch_size: int,
    epochs: float,
    seed: int,
    after: int,
    ranks: Sequence[np.ndarray] = (),
    max_steps: int | None = None,
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Yield (step from 1, epoch reached, examples of the step), from the step after `after`.

    The order depends on the seed, the epoch and the number of examples alone, so a resumed run, another number of
    processes and a run with a live reference all see the same batches. `ranks`, one array for each epoch or one for all, sort it;
    equal ranks keep it.
    """
    per_epoch = -(-n_examples // batch_size)
    shuffled = None
    for step in range(after, n_steps(n_examples, batch_size, epochs, max_steps)):
        epoch, i = divmod(step, per_epoch)
        if shuffled != epoch:
            order, shuffled = np.random.default_rng([seed, epoch]).permutation(n_examples), epoch
            if ranks:
                order = order[np.argsort(ranks[min(epoch, len(ranks) - 1)][order], kind="stable")]
        yield step + 1, (step + 1) / per_epoch, order[i * batch_size : (i + 1) * batch_size]
