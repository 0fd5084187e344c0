"""Which examples are trained on, how much each counts and in what order: train.only, where, weight and order_by.

train.only names a file (example_filter.py); the others are SQL expressions (example_expression.py). The held-out split is never
filtered, so runs with different selections stay comparable.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.training.example_expression import EPOCH, Expression, input_table
from prefcache.pipeline.training.example_filter import ExampleFilter

_NUMBER = r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|BOOLEAN|DECIMAL\(.*\)"


@dataclass(frozen=True)
class Choice:
    """The chosen rows of the training split, ascending. `weight` and each entry of `ranks` have one value per row."""

    rows: np.ndarray
    weight: np.ndarray | None = None  # 1 on average
    ranks: tuple[np.ndarray, ...] = ()  # by train.order_by, with ties; one entry per epoch, or one for all
    notes: tuple[str, ...] = ()  # to print


class Selection:
    """A run's file and expressions, checked before anything is loaded."""

    def __init__(self, train: Train, kind: str) -> None:
        self._kind = kind
        given = {"where": train.where, "weight": train.weight, "order_by": train.order_by}
        self._expressions = {
            name: Expression(f"train.{name}", sql, kind) for name, sql in given.items() if sql is not None
        }
        self._filter = ExampleFilter(train.only) if train.only is not None else None
        self._train = train
        if (where := self._expressions.get("where")) and where.type != "BOOLEAN":
            raise UsageError(f"{where} is of type {where.type}; expected a condition, such as margin > 0.")
        if (weight := self._expressions.get("weight")) and not re.fullmatch(_NUMBER, weight.type):
            raise UsageError(f"{weight} is of type {weight.type}; expected a number for each example.")

    def __bool__(self) -> bool:
        return bool(self._expressions) or self._filter is not None

    @property
    def identity(self) -> dict[str, str]:
        """What identifies a run in place of a config key: the content of train.only's file, not its path."""
        return {} if self._filter is None else {"only": self._filter.id}

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """The answers whose reference log-probs the expressions need, whatever the loss reads."""
        read = (answer for expression in self._expressions.values() for answer in expression.reference_answers)
        return tuple(dict.fromkeys(read))

    @property
    def readers(self) -> dict[str, str]:
        """The keys whose expressions need the reference, and the first of its columns that each reads."""
        reads = {expression.key: expression.reference_column for expression in self._expressions.values()}
        return {key: column for key, column in reads.items() if column is not None}

    def choose(self, table: pa.Table, reference: Mapping[str, np.ndarray], rows: np.ndarray) -> Choice:
        """Choose among `rows` of the training split's table, on which the objective has all that it reads.

        `reference` has `ref_X_logp` and `ref_X_logp_all` of the answers that are read, nan where missing.
        """
        if not len(rows):
            return Choice(rows)
        columns, notes = input_table(self._kind, table, reference), []
        if self._filter:
            rows, note = self._filter.apply(table, rows)
            notes.append(note)
        if where := self._expressions.get("where"):
            is_true, is_null = where.evaluate(columns, rows)
            chosen, n_null = is_true.astype(bool) & ~is_null, int(is_null.sum())
            if not chosen.any():
                null = f" For {n_null:,} of them it is null, which is not true." if n_null else ""
                ranges = "; ".join(where.ranges(columns, rows))
                raise DataError(
                    f"{where} chooses none of {len(rows):,} train examples.{null} Loosen it{f': {ranges}' if ranges else ''}."
                )
            null = f"; it is null for {n_null:,}" if n_null else ""
            notes.append(f"train: {int(chosen.sum()):,} of {len(rows):,} train examples chosen by train.where{null}")
            rows = rows[chosen]
        weights = None
        if weight := self._expressions.get("weight"):
            weights, is_null = weight.evaluate(columns, rows)
            _refuse_negative(weight, weights, is_null, table, rows)
            is_visited = weights > 0
            if not is_visited.any():
                raise DataError(f"{weight} is 0 for all {len(rows):,} examples that could be trained on. Change it.")
            if n_skipped := int((~is_visited).sum()):
                notes.append(f"train: {n_skipped:,} of them weigh 0 by train.weight and are not visited")
            rows, weights = rows[is_visited], _normalize(weights[is_visited])
        ranks: list[np.ndarray] = []
        if order := self._expressions.get("order_by"):
            # All epochs now, so that what fails in the third is found before the first.
            for epoch in range(1, self._count_epochs(len(rows)) + 1 if EPOCH in order.names else 2):
                values = order.evaluate(columns, rows, epoch)[0].astype(np.int32)
                ranks.append(ranks[-1] if ranks and np.array_equal(ranks[-1], values) else values)
        return Choice(rows, weights, tuple(ranks), tuple(notes))

    def _count_epochs(self, n_examples: int) -> int:
        """Count the passes over the examples that a run begins."""
        if self._train.max_steps is None:
            return math.ceil(self._train.epochs)
        return -(-self._train.max_steps // -(-n_examples // self._train.batch_size))


def _refuse_negative(
    weight: Expression, values: np.ndarray, is_null: np.ndarray, table: pa.Table, rows: np.ndarray
) -> None:
    is_wrong = is_null | ~np.isfinite(values) | (values < 0)
    if is_wrong.any():
        first = int(np.flatnonzero(is_wrong)[0])
        value = "null" if is_null[first] else f"{values[first]:g}"
        example_id = table["example_id"][int(rows[first])].as_py()
        raise DataError(
            f"{weight} is {value} for example {example_id}, one of {int(is_wrong.sum()):,} such; expected a number that is not "
            "negative. Give these a weight (coalesce(..., 1)), or leave them out (train.where)."
        )


def _normalize(weights: np.ndarray) -> np.ndarray:
    """Scale weights to a mean of 1, so that neither a common factor nor the number of examples matters.

    A step's loss divides the weighted sum by the number of its examples, as without weights. Dividing by the sum of the step's own
    weights would cancel what its examples have in common: steps of one example would have no weights at all, nor would sources
    that are trained on one after the other.
    """
    scaled = weights / weights.max()  # a sum of the largest numbers would overflow
    normalized: np.ndarray = scaled / scaled.mean()
    return normalized
