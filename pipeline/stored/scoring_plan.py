"""What a scorer has to compute: the sequences that the cache lacks, in chunks that every scorer names alike."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import shards
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys

_PROBE = 1024


@dataclass(frozen=True)
class Plan:
    """The missing sequences, in chunks, and how many are in the cache already."""

    chunks: list[np.ndarray]  # slots of each chunk, that of the longest sequence first; see prepared.Sequences
    probe: np.ndarray  # slots of a sample of all sequences, the same whatever is missing: extremes, then random ones
    n_sequences: int
    n_hits: int
    n_failed: int  # of the hits: tried before, no value
    n_tokens: int  # to score
    n_completion_tokens: int
    other_numerics: dict[str, int]  # numerics_id -> missing sequences that it has scored

    @property
    def n_missing(self) -> int:
        return self.n_sequences - self.n_hits


def plan_scoring(cache: Cache, sequences: pa.Table, accepted: Sequence[str], tokens_per_shard: int) -> Plan:
    """Find which of `sequences` (key, slot, prompt, n, n_completion) have no row under the accepted numerics.

    Chunks are cut from all distinct sequences and only then thinned to the missing ones, so that a scorer that resumes,
    or works next to another, names the same chunks. A shard that turns out to be damaged counts as missing.
    """
    index = KeyIndex(read_keys([sequences["key"]]))
    is_hit, has_value, others = cache.find_rows(index, accepted)
    n, n_completion = (np.empty(len(index), np.int64) for _ in range(2))
    slot = np.full(len(index), np.iinfo(np.int64).max)
    np.minimum.at(slot, index.rank, sequences["slot"].to_numpy())
    n[index.rank], n_completion[index.rank] = sequences["n"].to_numpy(), sequences["n_completion"].to_numpy()
    prompt = np.empty(len(index), np.uint64)
    prompt[index.rank] = sequences["prompt"].to_numpy()
    is_missing = ~is_hit
    # Keys are hashes, so the smallest are a random sample.
    extremes = slot[[n.argmax(), n.argmin()]] if len(n) else slot
    return Plan(
        chunks=_cut_chunks(n, prompt, slot, is_missing, tokens_per_shard) if is_missing.any() else [],
        probe=np.concatenate([extremes, slot[:_PROBE]]),
        n_sequences=len(index),
        n_hits=int(is_hit.sum()),
        n_failed=int((is_hit & ~has_value).sum()),
        n_tokens=int(n[is_missing].sum()),
        n_completion_tokens=int(n_completion[is_missing].sum()),
        other_numerics=others,
    )


def _cut_chunks(
    n: np.ndarray, prompt: np.ndarray, slot: np.ndarray, is_missing: np.ndarray, tokens_per_shard: int
) -> list[np.ndarray]:
    """The slots of each chunk: sequences of a prompt together, that of the longest first, ties by key; cut by tokens, then
    thinned to the missing ones."""
    _, group = np.unique(prompt, return_inverse=True)
    longest = np.zeros(group.max() + 1, np.int64)
    np.maximum.at(longest, group, n)
    order = np.lexsort((-n, prompt, -longest[group]))
    chunk = (np.cumsum(n[order]) - n[order]) // tokens_per_shard
    keep = is_missing[order]
    cuts = np.flatnonzero(np.diff(chunk[keep])) + 1
    return np.split(slot[order[keep]], cuts)


def count_sums_only(cache: Cache, sequences: pa.Table, accepted: Sequence[str]) -> int:
    """Count the sequences that have a row without a log-prob per token."""
    index = KeyIndex(read_keys([sequences["key"]]))
    is_sum_only = np.zeros(len(index), bool)
    for record in [each for each in cache.records if each.numerics_id in accepted]:
        # Damage and merging are noticed when values are read.
        with contextlib.suppress(IntegrityError, FileNotFoundError):
            if shards.lacks_lists(cache.folder, record):
                rows = cache.read(record, ["key", "logps", "status"])
                lacks = shards.usable_rows(rows) & ~rows["logps"].is_valid().to_numpy()
                is_sum_only[index.find(read_keys([rows["key"]]).take(lacks))[1]] = True
    return int(is_sum_only.sum())
