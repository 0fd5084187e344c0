"""A small cache with known values."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.pipeline import identity
from prefcache.pipeline.schema import CACHE, PREPARED, sequence_key
from prefcache.pipeline.spans import whole_span
from prefcache.pipeline.stored import cache as cache_module
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.memos import VerifiedMemo
from prefcache.pipeline.stored.prepared import Sequences, sequence_table
from prefcache.pipeline.stored.records import ShardRecord
from prefcache.pipeline.stored.scoring_plan import plan_scoring

MODEL = "a" * 32


REFERENCE = {"model_id": MODEL, "weights": {}, "config": {}}


# By the id that their numerics have: what the record of a shard says of both has to agree.
NUMERICS = {identity.numerics_id(each): each for each in ({"engine": "mine", "dtype": "float32"}, {"engine": "other"})}


MINE, OTHER = NUMERICS


BUDGET = 30


class Cache(cache_module.Cache):
    """A cache with its writer, asked about pairs, as the stages ask."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        writer = CacheWriter(self)
        self.commit, self.claim, self.has_chunk = writer.commit, writer.claim, writer.has_chunk
        self.discard_damaged = writer.discard_damaged

    def plan(self, table, accepted, budget):
        return plan_scoring(self, sequence_table(table), accepted, budget)

    def join(self, table, accepted):
        values = self.logps([table["chosen_key"], table["rejected_key"]], accepted)
        return dict(zip(("ref_chosen_logp", "ref_rejected_logp"), values, strict=True))


def prepared(pairs: list[tuple[list[int], list[int], list[int]]]) -> pa.Table:
    rows = [
        {
            "example_id": f"e{i}",
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "chosen_key": sequence_key(prompt, chosen),
            "rejected_key": sequence_key(prompt, rejected),
            "n_prompt": len(prompt),
            "n_chosen": len(chosen),
            "n_rejected": len(rejected),
            "n_chosen_counted": len(chosen),
            "n_rejected_counted": len(rejected),
            "chosen_spans": whole_span(len(chosen)),
            "rejected_spans": whole_span(len(rejected)),
        }
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=PREPARED["pairs"])


# 12 pairs, 24 different sequences of 3 to 14 tokens.
PAIRS = prepared([([i + 1] * (1 + i % 4), [50 + i] * (2 + i % 9), [90 + i] * (3 + i % 5)) for i in range(12)])


def logp(ids: list[int]) -> float:
    """What these tests take for the log-prob of an answer: minus an eighth of every token id. Exact in float32."""
    return -sum(ids) / 8


def expected(table: pa.Table, side: str) -> list[float]:
    return [logp(ids) for ids in table[f"{side}_ids"].to_pylist()]


def scored(
    table: pa.Table, slots: np.ndarray, numerics_id: str = MINE, shift: float = 0.0, fail: bool = False
) -> pa.Table:
    rows = []
    for slot in slots:
        sequence = Sequences(table)[slot]
        logps = -sequence.completion_ids.astype(np.float32) / 8
        rows.append(
            {
                "key": sequence.key(),
                "n_prompt": len(sequence.prompt_ids),
                "n_completion": len(logps),
                "logp_sum": None if fail else float(logps.sum(dtype=np.float64)) + shift,
                "logps": None if fail or shift else logps,  # they would not add up to a shifted sum
                "numerics_id": numerics_id,
                "status": "failed: a log-prob is not finite" if fail else "ok",
            }
        )
    return pa.Table.from_pylist(rows, schema=CACHE)


def create(tmp_path: Path) -> Cache:
    return Cache(create_cache(tmp_path / "cache", "org/tiny model", REFERENCE).folder, MODEL)


def reopen(cache: Cache) -> Cache:
    return Cache(cache.folder, MODEL)


def fill(cache: Cache, table: pa.Table, numerics_id: str = MINE, budget: int = BUDGET, **how) -> Cache:
    for slots in cache.plan(table, [numerics_id], budget).chunks:
        cache.commit(scored(table, slots, numerics_id, **how), NUMERICS[numerics_id], numerics_id, None)
    return reopen(cache)


def keys_of(table: pa.Table, plan) -> list[set[bytes]]:
    return [{Sequences(table)[slot].key() for slot in slots} for slots in plan.chunks]


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def rot(cache: cache_module.Cache, record: ShardRecord, column: str) -> None:
    """Flip a bit in the middle of a column; to the file system, and so to the memo, nothing has changed."""
    path = cache.folder / record.file
    stat, meta = path.stat(), pq.read_metadata(path).row_group(0)
    (chunk,) = (meta.column(i) for i in range(meta.num_columns) if meta.column(i).path_in_schema == column)
    begin = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    memo = cache.folder.parent / f".verified-{cache.folder.name}.json"
    known = {name: list(stamp) for name, stamp in VerifiedMemo.read(memo).known.items()}
    assert known[record.file][:4] == [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    # A disk that rots leaves the time of the last change alone; this test cannot.
    known[record.file][2] = path.stat().st_ctime_ns
    VerifiedMemo.make(known=known).commit(memo)
