"""import: reference log-probs that were computed elsewhere, from columns of the data into the cache.

They are marked as imported, and used only where the user accepts them by name. A bad value is refused alone; if a sample
is not what the reference computes, all are refused.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.command_results import ImportResult
from prefcache.pipeline import identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.preparing import record_outcomes
from prefcache.pipeline.preparing.record_outcomes import Outcomes
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import CACHE, OK, TokenSequence
from prefcache.pipeline.scoring.sample_check import MEAN_TOLERANCE, Sample, compare_with_plain_forward
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.mirror import open_root
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.prepared import Prepared, Sequences, sequence_table
from prefcache.pipeline.stored.records import Parity
from prefcache.pipeline.stored.signatures import require_key

# TRL's names and its older ones; the first pair of them that the data has is read.
_USUAL_NAMES: dict[str, list[tuple[str, ...]]] = {
    "pairs": [("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps")],
    "labels": [("ref_logps",), ("reference_logps",)],
}
_TOKEN_NAMES = {"pairs": ("ref_chosen_token_logps", "ref_rejected_token_logps"), "labels": ("ref_token_logps",)}
_ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion",)}
_MAX_LOGP = 1e-4  # a probability of 1 may be rounded to a logarithm just above 0


def run(config: Config, columns: dict[str, str | None], dtype: str, progress: Progress) -> ImportResult:
    """Import log-probs; `columns` names each answer's column, or None for its usual one."""
    prepared, key = Prepared(config.prepared), require_key(config.score.sign_with, config.signers_file)
    sources = record_outcomes.reopen_sources(config, prepared)
    reader = _Reader(prepared, columns)
    with progress.count("import", prepared.manifest.records, "records") as counter:
        for batch in record_outcomes.read_batches(sources):
            reader.read(batch)
            counter.add(len(batch.lines))
    names = reader.check_columns()
    values = reader.merge_duplicates(MEAN_TOLERANCE[dtype])
    if not len(values):
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reader.refused.items())) or "none was found"
        raise DataError(f"No row has log-probs that can be used ({reasons}).")

    reference = identity.find_reference(config)
    root = open_root(config.cache)
    described = identify(reference, root)
    CacheWriter(Cache.preview(root, config.model, described, config.signers_file)).refuse_read_only()
    parity = _check_sample(config, reference, values, dtype, prepared.prompt_images(reference.processor), progress)
    # What the sources hold, wherever their files are.
    contents = [
        [{key: value for key, value in part.items() if key != "file"} for part in source.identity()]
        for source in sources
    ]
    numerics = {
        "engine": "imported",
        "dtype": dtype,
        "from": ", ".join(sorted({file.name for each in sources for file in each.files} or {e.name for e in sources})),
        "xxh3_128": artifact.checksum_bytes(artifact.canonical_json(contents)),
        "columns": ", ".join(names),
    }
    numerics_id = identity.numerics_id(numerics)
    cache = create_cache(root, config.model, described, config.signers_file)
    writer = CacheWriter(cache, key)
    for rows in _split_into_shards(values, numerics_id, config.score.tokens_per_shard):
        if not writer.has_chunk(rows["key"].to_pylist(), numerics_id):
            writer.commit(rows, numerics, numerics_id, parity)
    writer.merge_statements()
    return ImportResult(
        cache=cache.place,
        imported=len(values),
        with_tokens=sum(int(slot) in values.token_logps for slot in values.slots),
        left=len(pc.unique(sequence_table(prepared.table())["key"])) - len(values),
        numerics_id=numerics_id,
        numerics=numerics,
        parity=parity,
        use=f"--set score.accept_numerics=[{','.join([*config.score.accept_numerics, numerics_id])}]",
        refused=dict(reader.refused),
    )


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """One log-prob for each of several sequences, in the order of their keys."""

    keys: pa.Array
    slots: np.ndarray  # of `sequences`
    sums: np.ndarray
    token_logps: dict[int, np.ndarray]  # by slot, where the data has them
    sequences: Sequences

    def __len__(self) -> int:
        return len(self.slots)

    def sequence(self, i: int) -> TokenSequence:
        return self.sequences[int(self.slots[i])]


class _Refused(Exception):
    """Why a row's value is not imported."""


class _Reader:
    """Reads the records' log-probs, by the slots of the prepared sequences."""

    def __init__(self, prepared: Prepared, columns: dict[str, str | None]) -> None:
        self._kind, self._examples = prepared.kind, prepared.table()
        self._answers, self._outcomes = _ANSWERS[self._kind], Outcomes(prepared, self._examples)
        if unfit := [name for name in columns if columns[name] and name not in self._answers]:
            raise UsageError(f"--{unfit[0]} does not fit: {prepared.folder} holds {prepared.kind}.")
        self._chosen_names = [columns.get(answer) for answer in self._answers]
        self._data_columns: dict[str, None] = {}
        self._n_tokens = [self._examples[f"n_{answer}"].to_numpy() for answer in self._answers]
        self._sums = np.full((len(self._examples), 2), np.nan)
        self._token_logps: dict[int, np.ndarray] = {}
        self.refused: Counter[str] = Counter()

    def read(self, batch: record_outcomes.Batch) -> None:
        self._data_columns |= dict.fromkeys(batch.names)
        names = self._names()
        for record, outcome in zip(batch.dicts, self._outcomes.find(batch.lines), strict=True):
            if len(outcome.examples) != 1:
                self.refused["of several examples of one record" if outcome.examples else "of no example"] += 1
                continue
            for side, name in enumerate(names):
                try:
                    self._read_answer(record, outcome.examples[0], side, name)
                except _Refused as refused:
                    self.refused[str(refused)] += 1

    def _names(self) -> list[str]:
        known = _USUAL_NAMES[self._kind]
        usual = next((names for names in known if set(names) <= set(self._data_columns)), known[0])
        return [chosen or name for chosen, name in zip(self._chosen_names, usual, strict=True)]

    def _read_answer(self, record: dict[str, Any], row: int, side: int, name: str) -> None:
        total = _parse_logp(record.get(name))
        if (tokens := record.get(_TOKEN_NAMES[self._kind][side])) is not None:
            logps = _parse_token_logps(tokens, total, int(self._n_tokens[side][row]))
            # Other programs may add in float32. In the cache, a sum is always that of its list, added in float64.
            self._token_logps[2 * row + side], total = logps, float(logps.sum(dtype=np.float64))
        self._sums[row, side] = total

    def check_columns(self) -> list[str]:
        """Return the columns that were read, or fail if the data lacks one."""
        names = self._names()
        if missing := [name for name in names if name not in self._data_columns]:
            options = " and ".join(f"--{answer} COLUMN" for answer in self._answers)
            raise UsageError(
                f"The data has no column {' and no '.join(missing)}. It has: {', '.join(self._data_columns)}. Name the columns "
                f"of the reference's log-probs with {options}."
            )
        return names

    def merge_duplicates(self, tolerance: float) -> Values:
        """Return one value per sequence; refuse all values of a sequence if they differ by more than rounding."""
        slots = np.flatnonzero(~np.isnan(self._sums).ravel())
        sums = self._sums.ravel()[slots]
        columns = [self._examples[f"{answer}_key"] for answer in self._answers]
        keys = pa.concat_arrays([chunk for column in columns for chunk in column.chunks]).take(
            pa.array(slots % 2 * len(self._examples) + slots // 2)
        )
        index = KeyIndex(read_keys([pa.chunked_array([keys])]))
        largest, smallest = np.full(len(index), -np.inf), np.full(len(index), np.inf)
        np.maximum.at(largest, index.rank, sums)
        np.minimum.at(smallest, index.rank, sums)
        first = np.full(len(index), len(slots))
        np.minimum.at(first, index.rank, np.arange(len(slots)))
        n_tokens = np.array([self._n_tokens[slot % 2][slot // 2] for slot in slots[first]])
        agrees = largest - smallest <= tolerance * n_tokens
        if n_disputed := int((~agrees[index.rank]).sum()):
            self.refused["with another value for the same sequence"] += n_disputed
        kept = first[agrees]
        return Values(keys.take(pa.array(kept)), slots[kept], sums[kept], self._token_logps, Sequences(self._examples))


def _parse_logp(value: Any) -> float:
    if value is None or value == "":
        raise _Refused("without a value")
    try:
        number = float("no number" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise _Refused("with a value that is not a number") from None
    if not math.isfinite(number):
        raise _Refused("with a value that is not finite")
    if number > _MAX_LOGP:
        raise _Refused("with a positive value")
    return number


def _parse_token_logps(values: Any, total: float, n: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != n:
        raise _Refused("with another number of token values than the answer has tokens")
    logps = np.array([_parse_logp(value) for value in values], np.float32)
    if abs(float(logps.sum(dtype=np.float64)) - total) > 1e-3 * max(n, 1):
        raise _Refused("with token values that do not add up to the sum")
    return logps


# -- trust -----------------------------------------------------------------------------------------------------------


def _check_sample(
    config: Config,
    reference: identity.Reference,
    values: Values,
    dtype: str,
    images: PromptImages | None,
    progress: Progress,
) -> Parity | None:
    """Return how far a sample is from the plain float32 forward; fail where that is more than rounding."""
    n = min(config.score.parity_sample, len(values))
    if not n:
        return None
    # Keys are hashes: the smallest are a random sample.
    slots = [int(slot) for slot in values.slots[:n]]
    sample = Sample(
        dtype=dtype,
        sequences=[values.sequence(i) for i in range(n)],
        sums=[float(total) for total in values.sums[:n]],
        token_logps=[values.token_logps.get(slot) for slot in slots],
    )
    (means,) = compare_with_plain_forward(
        [sample],
        reference,
        images,
        origin="The data has",
        model=config.model,
        remedy="Do they come from another model, template or length? If they were computed in another dtype, name it "
        "(--dtype bfloat16).",
    )
    progress.say(f"import: within {means.max():.1e} nats per token of the plain float32 forward ({n} sequences)")
    p50, p99 = (float(np.quantile(means, q)) for q in (0.5, 0.99))
    return Parity(sequences=n, of="sums, per token", p50=p50, p99=p99, max=float(means.max()))


# -- into the cache --------------------------------------------------------------------------------------------------


def _split_into_shards(values: Values, numerics_id: str, tokens_per_shard: int) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    n_tokens = 0
    for i in range(len(values)):
        sequence = values.sequence(i)
        n_tokens += sequence.n_tokens
        rows.append(
            {
                "key": values.keys[i].as_py(),
                "n_prompt": len(sequence.prompt_ids),
                "n_completion": len(sequence.completion_ids),
                "logp_sum": float(values.sums[i]),
                "logps": values.token_logps.get(int(values.slots[i])),
                "numerics_id": numerics_id,
                "status": OK,
            }
        )
        if n_tokens >= tokens_per_shard or i + 1 == len(values):
            yield pa.Table.from_pylist(rows, schema=CACHE)
            rows, n_tokens = [], 0
