"""What a training step reads: examples with their reference log-probs, in the sampler's order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.model.logprobs import sent
from pipeline.model.packing import balanced, shares, token_budget_batches
from pipeline.schema import Sequence as TokenSequence
from pipeline.stored.prepared import IdLists
from pipeline.training.objective import GIVEN_WEIGHT
from pipeline.training.selection import Choice
from pipeline.training.token_logps import TokenLogps

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Some examples. Shape of every column: [B]."""

    rows: list[int]  # in the prepared table
    columns: dict[str, torch.Tensor]
    answers: dict[str, list[TokenSequence | None]]  # None: this example has no such answer
    reference_tokens: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Scores:
    """What a reference gave some examples, by answer: sums of shape [B], nan where there is no such answer; and each one's
    tokens, where they are read."""

    indices: np.ndarray
    sums: dict[str, np.ndarray]
    tokens: dict[str, list[np.ndarray]]


class Examples:
    """The examples of one split of which all is known that the objective needs, by row."""

    def __init__(
        self,
        table: pa.Table,
        answers: Sequence[str],
        optional: Sequence[str],
        columns: Columns,
        tokens: Mapping[str, TokenLogps] | None = None,
        learned: Sequence[str] | None = None,
        choose: Callable[[np.ndarray], Choice] = Choice,
    ) -> None:
        """`columns` are what the data and the cache give, nan where they give nothing; `optional` answers may be missing.
        `learned` are those of the answers that a step computes, if not all. `choose` is asked which of the rows are taken."""
        complete = np.ones(len(table), bool)
        self.left_out: dict[str, int] = {}  # column -> examples that lack it, and nothing before it
        for name, values in columns.items():
            if _answer_of(name) not in optional:
                lacking = complete & np.isnan(values)
                if lacking.any():
                    self.left_out[name] = int(lacking.sum())
                complete &= ~np.isnan(values)
        choice = choose(np.flatnonzero(complete))
        self._rows, self.ranks, self.said = choice.rows, choice.ranks, choice.said
        if choice.weight is not None:
            columns = {**columns, GIVEN_WEIGHT: np.full(len(table), np.nan)}
            columns[GIVEN_WEIGHT][choice.rows] = choice.weight
        self._prompt_ids = IdLists(table["prompt_ids"])
        self._answer_ids = {name: IdLists(table[f"{name}_ids"]) for name in (*answers, *optional)}
        # Without the reference's log-prob, nothing could be learned from the policy's.
        self._has = {
            name: np.logical_and.reduce(
                [table[f"{name}_ids"].is_valid().to_numpy()]
                + [~np.isnan(values) for column, values in columns.items() if _answer_of(column) == name]
            )
            for name in optional
        }
        self._columns = dict(columns)
        self._tokens: dict[str, TokenLogps | dict[int, np.ndarray]] = dict(tokens or {})
        self._example_id, self._prompt = table["example_id"], table["prompt"]
        self._n_answer = {name: table[f"n_{name}"].fill_null(0).to_numpy() for name in self._answer_ids}
        lengths = {name: table["n_prompt"].to_numpy() + n.astype(np.int64) for name, n in self._n_answer.items()}
        # Tokens of the forward that an example's answers share, by the way they do (forward.py). The last token of an answer
        # is no input. Optional answers have a forward of their own.
        of_answers = np.stack([lengths[name] for name in answers])
        n_prompt = table["n_prompt"].to_numpy().astype(np.int64)
        together = {
            "padded": len(answers) * of_answers.max(0),
            "packed": (of_answers - 1).sum(0),
            "shared": (of_answers - 1).sum(0) - (len(answers) - 1) * n_prompt,
        }
        apart = [lengths[name] for name in optional]
        self._sizes = {way: np.maximum.reduce([sizes, *apart]) for way, sizes in together.items()}
        self._n_tokens = np.sum([lengths[name] for name in learned or answers], axis=0)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def missing_kind(self) -> str | None:
        """The kind of labels of which there is none; None where there are both, or pairs."""
        if "label" not in self._columns or not len(self):
            return None
        label = self._columns["label"][self._rows]
        return "undesirable" if label.all() else None if label.any() else "desirable"

    def batch(self, indices: np.ndarray, device: torch.device | str, answers: Sequence[str] = ()) -> Batch:
        """Some examples with their columns, and the tokens of these answers."""
        rows = self._rows[indices].tolist()
        return Batch(
            rows,
            {
                name: sent(torch.as_tensor(values[rows], dtype=torch.float64), device)
                for name, values in self._columns.items()
            },
            {name: [self._sequence(name, row) for row in rows] for name in answers},
            {
                name: [sent(torch.from_numpy(self._tokens[name][row]), device) for row in rows]
                for name in answers
                if name in self._tokens
            },
        )

    def forget_reference(self) -> None:
        """Its log-probs are nan until others take their place, so that none that is out of date can be read unnoticed."""
        self._tokens = {}
        self._columns |= {
            name: np.full_like(values, np.nan) for name, values in self._columns.items() if name.startswith("ref_")
        }

    def take_reference(self, scores: Scores) -> None:
        """Let these log-probs be the reference's."""
        rows = self._rows[scores.indices]
        for name, sums in scores.sums.items():
            self._columns[f"ref_{name}_logp"][rows] = sums
        self._tokens |= {name: dict(zip(rows.tolist(), each, strict=True)) for name, each in scores.tokens.items()}

    def _sequence(self, answer: str, row: int) -> TokenSequence | None:
        if answer in self._has and not self._has[answer][row]:
            return None
        return TokenSequence(self._prompt_ids[row], self._answer_ids[answer][row])

    def micro_batches(
        self, indices: np.ndarray, budget: int, most: int | None = None, way: str = "padded"
    ) -> list[np.ndarray]:
        """`indices` in parts of at most `most` examples, none of whose forwards has more than `budget` tokens."""
        parts = np.split(indices, range(most, len(indices), most)) if most else [indices]
        cut = token_budget_batches if way == "padded" else balanced
        return [part[chosen] for part in parts for chosen in cut(self.sizes(part, way).tolist(), budget)]

    def sizes(self, indices: np.ndarray, way: str) -> np.ndarray:
        """Tokens that each takes of a forward."""
        sizes: np.ndarray = self._sizes[way][self._rows[indices]]
        return sizes

    def shares(self, indices: np.ndarray, n: int, way: str) -> list[np.ndarray]:
        """`indices` for `n` processes, each about as many tokens of forwards, so that none waits long for the others."""
        sizes = self.sizes(indices, way).tolist()
        return [indices[sorted(part)] if part else indices[:0] for part in shares(sizes, n)]

    def longest(self, n: int) -> list[TokenSequence]:
        """Sequences of the longest example and of others from all over the data, `n` examples in all."""
        if not len(self):
            return []
        by_size = np.argsort(-self._sizes["padded"][self._rows], kind="stable")
        chosen = dict.fromkeys([int(by_size[0]), *map(int, np.linspace(0, len(self) - 1, n - 1))])
        rows = [int(self._rows[i]) for i in chosen]
        found = (self._sequence(name, row) for row in rows for name in self._answer_ids)
        return [sequence for sequence in found if sequence is not None]

    def n_answer_tokens(self, answer: str, indices: np.ndarray) -> np.ndarray:
        n: np.ndarray = self._n_answer[answer][self._rows[indices]]
        return n

    def n_tokens(self, indices: np.ndarray) -> int:
        return int(self._n_tokens[self._rows[indices]].sum())

    def example_ids(self, indices: np.ndarray) -> list[str]:
        return list(self._example_id.take(pa.array(self._rows[indices])).to_pylist())

    def prompts(self, indices: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
        """Prompts as text and as ids."""
        rows = self._rows[indices]
        return self._prompt.take(pa.array(rows)).to_pylist(), [self._prompt_ids[row] for row in rows]


def _answer_of(column: str) -> str:
    return column.removeprefix("ref_").removesuffix("_logp")


def n_steps(n_examples: int, batch_size: int, epochs: float) -> int:
    return max(1, round(epochs * -(-n_examples // batch_size)))


def evaluates(step: int, n_steps: int, every: int | None) -> bool:
    """Whether the held-out examples are looked at after a step."""
    return step == n_steps or (every is not None and step % every == 0)


def steps(
    n_examples: int, batch_size: int, epochs: float, seed: int, after: int, ranks: Sequence[np.ndarray] = ()
) -> Iterator[tuple[int, float, np.ndarray]]:
    """(step from 1, epoch reached, examples of the step), from the step after `after` on.

    The order depends on the seed, the epoch and the number of examples alone, so a resumed run, another number of
    processes and a run with a live reference all see the same batches. `ranks`, of each epoch or one for all, are what it is
    sorted by; of equal ones it stays the order.
    """
    per_epoch = -(-n_examples // batch_size)
    shuffled = None
    for step in range(after, n_steps(n_examples, batch_size, epochs)):
        epoch, i = divmod(step, per_epoch)
        if shuffled != epoch:
            order, shuffled = np.random.default_rng([seed, epoch]).permutation(n_examples), epoch
            if ranks:
                order = order[np.argsort(ranks[min(epoch, len(ranks) - 1)][order], kind="stable")]
        yield step + 1, (step + 1) / per_epoch, order[i * batch_size : (i + 1) * batch_size]
