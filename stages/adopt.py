"""import: reference log-probs that were made elsewhere, from columns of the data into the cache.

They are marked as imported, and used only where the user accepts them by name. Rows are refused one by one for what is
wrong with them, all of them where a sample is not what the reference computes.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import identity
from pipeline.config import Config
from pipeline.errors import DataError, IntegrityError, UsageError
from pipeline.preparing import records
from pipeline.preparing.records import Outcomes
from pipeline.progress import Progress
from pipeline.schema import CACHE, OK, Sequence
from pipeline.scoring.scorer import TOLERANCE
from pipeline.stored import artifact
from pipeline.stored.cache import Cache, identify
from pipeline.stored.keys import KeyIndex, keys_of
from pipeline.stored.prepared import Prepared, Sequences, sequence_table

# Largest deviation of a sequence's mean per token from the plain float32 forward that is still rounding, as where
# training starts. A single token may be as far off as where an engine is checked.
MEAN_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
# The first pair of names that the data has is read: TRL's, and TRL's older ones.
_NAMES: dict[str, list[tuple[str, ...]]] = {
    "pairs": [("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps")],
    "labels": [("ref_logps",), ("reference_logps",)],
}
_TOKEN_NAMES = {"pairs": ("ref_chosen_token_logps", "ref_rejected_token_logps"), "labels": ("ref_token_logps",)}
_ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion",)}
# A probability of 1 may have a logarithm just above 0.
_ROUNDING = 1e-4


def run(config: Config, columns: dict[str, str | None], dtype: str, progress: Progress) -> dict[str, Any]:
    """`columns`: the name of each answer's column, None where it has its usual one."""
    prepared = Prepared(config.prepared)
    opened = records.reopen(config, prepared)
    found = _Found(prepared, columns)
    with progress.count("import", None, "records") as counter:
        for batch in records.batches(opened):
            found.read(batch)
            counter.add(len(batch.lines))
    names = found.check()
    values = found.distinct(MEAN_TOLERANCE[dtype])
    if not len(values):
        raise DataError(f"No row has log-probs that can be used ({_said(found.refused)}).")

    reference = identity.find_reference(config)
    parity = _checked(config, reference, values, dtype, progress)
    numerics = {
        "engine": "imported",
        "dtype": dtype,
        "from": ", ".join(sorted({file.name for each in opened for file in each.files} or {e.name for e in opened})),
        "xxh3_128": artifact.checksum_bytes(artifact.canonical_json([_content(each.identity()) for each in opened])),
        "columns": ", ".join(names),
    }
    cache = Cache.create(Path(config.cache), config.model, identify(reference, Path(config.cache)))
    _commit(config, cache, values, numerics, parity)
    return _summary(config, cache, prepared, values, numerics, parity) | {"refused": dict(found.refused)}


def _content(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a source holds, wherever it lies."""
    return [{key: value for key, value in each.items() if key != "file"} for each in described]


def _said(refused: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(refused.items())) or "none was found"


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """One log-prob for each of several sequences, in the order of their keys."""

    keys: pa.Array
    slots: np.ndarray  # of `sequences`
    sums: np.ndarray
    tokens: dict[int, np.ndarray]  # slot -> of each token, where the data has that
    sequences: Sequences

    def __len__(self) -> int:
        return len(self.slots)

    def sequence(self, i: int) -> Sequence:
        return self.sequences[int(self.slots[i])]


class _Refused(Exception):
    """Why a row's value is not taken."""


class _Found:
    """What the records hold, by the slots of the prepared sequences."""

    def __init__(self, prepared: Prepared, columns: dict[str, str | None]) -> None:
        self._examples, self._answers = prepared.table(), _ANSWERS[prepared.kind]
        self._kind, self._outcomes = prepared.kind, Outcomes(prepared, self._examples)
        if strange := [name for name in columns if columns[name] and name not in self._answers]:
            raise UsageError(f"--{strange[0]} does not fit: {prepared.folder} holds {prepared.kind}.")
        self._named = [columns.get(answer) for answer in self._answers]
        self._seen: dict[str, None] = {}  # columns of the data
        self._n = {name: self._examples[f"n_{name}"].to_numpy() for name in self._answers}
        self._sums = np.full((len(self._examples), 2), np.nan)
        self._tokens: dict[int, np.ndarray] = {}
        self.refused: Counter[str] = Counter()

    def read(self, batch: records.Batch) -> None:
        self._seen |= dict.fromkeys(batch.names)
        names = self._names()
        for record, outcome in zip(batch.dicts, self._outcomes.of(batch.lines), strict=True):
            if len(outcome.examples) == 1:
                self._read_one(record, outcome.examples[0], names)
            else:
                self.refused["of several examples of one record" if outcome.examples else "of no example"] += 1

    def _names(self) -> list[str]:
        usual = next((names for names in _NAMES[self._kind] if set(names) <= set(self._seen)), _NAMES[self._kind][0])
        return [named or name for named, name in zip(self._named, usual, strict=True)]

    def check(self) -> list[str]:
        """The columns that were read, if the data has them."""
        names = self._names()
        if missing := [name for name in names if name not in self._seen]:
            options = " and ".join(f"--{answer} COLUMN" for answer in self._answers)
            raise UsageError(
                f"The data has no column {' and no '.join(missing)}. It has: {', '.join(self._seen)}. Name the columns of the "
                f"reference's log-probs with {options}."
            )
        return names

    def _read_one(self, record: dict[str, Any], row: int, names: list[str]) -> None:
        for side, (answer, name) in enumerate(zip(self._answers, names, strict=True)):
            try:
                total = _number(record.get(name))
                tokens = record.get(_TOKEN_NAMES[self._kind][side])
                if tokens is not None:
                    logps = _list(tokens, total, int(self._n[answer][row]))
                    # Others add in float32. In the cache a sum is that of its list, added in float64.
                    self._tokens[2 * row + side], total = logps, float(logps.sum(dtype=np.float64))
                self._sums[row, side] = total
            except _Refused as refused:
                self.refused[str(refused)] += 1

    def distinct(self, tolerance: float) -> Values:
        """One value for each sequence; none where the data has several that differ by more than rounding."""
        slots = np.flatnonzero(~np.isnan(self._sums).ravel())
        sums = self._sums.ravel()[slots]
        both = [self._examples[f"{answer}_key"] for answer in self._answers]
        keys = pa.concat_arrays([chunk for column in both for chunk in column.chunks]).take(
            pa.array(slots % 2 * len(self._examples) + slots // 2)
        )
        index = KeyIndex(keys_of([pa.chunked_array([keys])]))
        largest, smallest = np.full(len(index), -np.inf), np.full(len(index), np.inf)
        np.maximum.at(largest, index.rank, sums)
        np.minimum.at(smallest, index.rank, sums)
        first = np.full(len(index), len(slots))
        np.minimum.at(first, index.rank, np.arange(len(slots)))
        n = np.array([self._n[self._answers[slot % 2]][slot // 2] for slot in slots[first]])
        agrees = largest - smallest <= tolerance * n
        if n_disputed := int((~agrees[index.rank]).sum()):
            self.refused["with another value for the same sequence"] += n_disputed
        kept = first[agrees]
        return Values(keys.take(pa.array(kept)), slots[kept], sums[kept], self._tokens, Sequences(self._examples))


def _number(value: Any) -> float:
    if value is None or value == "":
        raise _Refused("without a value")
    if isinstance(value, bool):
        raise _Refused("with a value that is no number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _Refused("with a value that is no number") from None
    if not math.isfinite(number):
        raise _Refused("with a value that is not finite")
    if number > _ROUNDING:
        raise _Refused("with a positive value")
    return number


def _list(values: Any, total: float, n: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != n:
        raise _Refused("with another number of token values than the answer has tokens")
    tokens = np.array([_number(value) for value in values], np.float32)
    if abs(float(tokens.sum(dtype=np.float64)) - total) > 1e-3 * max(n, 1):
        raise _Refused("with token values that do not add up to the sum")
    return tokens


# -- trust -----------------------------------------------------------------------------------------------------------


def _checked(
    config: Config, reference: identity.Reference, values: Values, dtype: str, progress: Progress
) -> dict[str, Any] | None:
    """How far a sample is from the plain float32 forward."""
    n = min(config.score.parity_sample, len(values))
    if not n:
        return None
    from pipeline.scoring.engines.loading import plain_scores

    # Keys are hashes: the smallest are a random sample.
    plain = plain_scores(reference, [values.sequence(i) for i in range(n)])
    means = np.array([abs(values.sums[i] - logps.sum(dtype=np.float64)) / len(logps) for i, logps in enumerate(plain)])
    _refuse(
        config,
        values,
        plain,
        int(means.argmax()),
        float(means.max()),
        MEAN_TOLERANCE[dtype],
        "a token on average",
        dtype,
    )
    lists = [values.tokens.get(int(slot)) for slot in values.slots[:n]]
    apart = [
        0.0 if mine is None else float(np.abs(mine - logps).max()) for mine, logps in zip(lists, plain, strict=True)
    ]
    _refuse(config, values, plain, int(np.argmax(apart)), max(apart), TOLERANCE[dtype], "on a token", dtype)
    progress.say(f"import: within {means.max():.1e} nats per token of the plain float32 forward ({n} sequences)")
    return {
        "sequences": n,
        "of": "sums, per token",
        "p50": float(np.quantile(means, 0.5)),
        "p99": float(np.quantile(means, 0.99)),
        "max": float(means.max()),
    }


def _refuse(
    config: Config,
    values: Values,
    plain: list[np.ndarray],
    i: int,
    worst: float,
    allowed: float,
    where: str,
    dtype: str,
) -> None:
    if worst <= allowed:
        return
    raise IntegrityError(
        f"The data says {values.sums[i]:.4f} for an answer of {len(plain[i])} tokens, to which {config.model} gives "
        f"{plain[i].sum(dtype=np.float64):.4f} in float32: {worst:.3g} nats off {where}; {allowed} is rounding in {dtype}. Were they made "
        "by another model, template or length? If they were computed in another dtype, name it (--dtype bfloat16)."
    )


# -- into the cache --------------------------------------------------------------------------------------------------


def _commit(
    config: Config, cache: Cache, values: Values, numerics: dict[str, str], parity: dict[str, Any] | None
) -> None:
    numerics_id = identity.numerics_id(numerics)
    for part in _parts(values, config.score.tokens_per_shard):
        rows = pa.Table.from_pylist([_row(values, i, numerics_id) for i in part], schema=CACHE)
        if not cache.has_chunk(rows["key"].to_pylist(), numerics_id):
            cache.commit(rows, numerics, numerics_id, parity)


def _parts(values: Values, tokens_per_shard: int) -> Iterator[range]:
    begin = n_tokens = 0
    for i in range(len(values)):
        n_tokens += values.sequence(i).n_tokens
        if n_tokens >= tokens_per_shard:
            yield range(begin, i + 1)
            begin, n_tokens = i + 1, 0
    if begin < len(values):
        yield range(begin, len(values))


def _row(values: Values, i: int, numerics_id: str) -> dict[str, Any]:
    sequence = values.sequence(i)
    return {
        "key": values.keys[i].as_py(),
        "n_prompt": len(sequence.prompt_ids),
        "n_completion": len(sequence.completion_ids),
        "logp_sum": float(values.sums[i]),
        "logps": values.tokens.get(int(values.slots[i])),
        "numerics_id": numerics_id,
        "status": OK,
    }


def _summary(
    config: Config,
    cache: Cache,
    prepared: Prepared,
    values: Values,
    numerics: dict[str, str],
    parity: dict[str, Any] | None,
) -> dict[str, Any]:
    numerics_id = identity.numerics_id(numerics)
    accepted = [*config.score.accept_numerics, numerics_id]
    n_needed = len(pc.unique(sequence_table(prepared.table())["key"]))
    return {
        "cache": str(cache.folder),
        "imported": len(values),
        "with_tokens": sum(int(slot) in values.tokens for slot in values.slots),
        "left": n_needed - len(values),
        "numerics_id": numerics_id,
        "numerics": numerics,
        "parity": parity,
        "use": f"--set score.accept_numerics=[{','.join(accepted)}]",
    }
