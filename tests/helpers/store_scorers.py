"""Scorers of one object store, each on a machine of its own: the real loop of a scorer around a scripted engine."""

import multiprocessing
import os
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

_PROCESSES = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    """What a scorer does, and where."""

    url: str
    n_pairs: int
    tokens_per_shard: int
    chunk_seconds: float  # how long the engine takes for a chunk
    machine: Path  # a folder with its mirror and computed.txt
    environment: dict[str, str]


def pairs(n: int) -> pa.Table:
    """Pairs of 8 to 20 tokens whose prompts all differ."""
    from tests.helpers.caches import prepared

    return prepared([([i // 100 + 1, i % 100 + 1, 3], [50 + i % 40] * (2 + i % 7), [90 + i % 9] * 5) for i in range(n)])


def start_scorer(job: Job) -> ForkServerProcess:
    _PROCESSES.set_forkserver_preload([__name__, "prefcache.pipeline.scoring.scorer", "tests.helpers.machines"])
    process = _PROCESSES.Process(target=score, args=(job,))
    process.start()
    return process


def start_reader(job: Job) -> ForkServerProcess:
    process = _PROCESSES.Process(target=read, args=(job,))
    process.start()
    return process


def read(job: Job) -> None:
    """Read all values again and again, by a cache that was just opened and by one that was opened earlier, until told to stop."""
    from tests.helpers.caches import MINE, expected
    from tests.helpers.machines import open_cache

    os.environ |= job.environment
    table = pairs(job.n_pairs)
    right = [*expected(table, "chosen"), *expected(table, "rejected")]
    cache = open_cache(job.url)
    while not (job.machine.parent / "stop").exists():
        for each in (cache, open_cache(job.url)):
            joined = each.join(table, [MINE])
            found = [*joined["ref_chosen_logp"].tolist(), *joined["ref_rejected_logp"].tolist()]
            n_right = sum(value == other for value, other in zip(found, right, strict=True))
            with open(job.machine / "log.txt", "a") as log:
                log.write(f"{n_right} right\n")
        cache = each


def read_log(machine: Path) -> list[str]:
    """What a reader has said."""
    file = machine / "log.txt"
    return file.read_text().splitlines() if file.exists() else []


def score(job: Job) -> None:
    """Score what the store lacks, as on a machine whose processes the others cannot look for."""
    from prefcache.pipeline.config import Score
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.scoring.scorer import Scorer
    from prefcache.pipeline.stored import object_store, store_writer
    from prefcache.pipeline.stored.prepared import Sequences
    from tests.helpers.caches import MINE, NUMERICS, scored
    from tests.helpers.machines import open_cache

    os.environ |= job.environment
    name = job.machine.name
    socket.gethostname = lambda: name
    store_writer._find_boot = lambda: name
    # A test's chunks take milliseconds, and its machines seconds to be given up.
    store_writer._BEAT_SECONDS, store_writer._STALE_SECONDS, store_writer._POLL_SECONDS = 0.3, 2.0, 0.1
    object_store._FIRST_PAUSE = 0.02
    table = pairs(job.n_pairs)

    class Scripted(Scorer):
        def _compute_rows(self, keys: list[bytes], chunk: list[Any]) -> pa.Table:
            slots = [slot_of[key] for key in keys]
            time.sleep(job.chunk_seconds)
            with open(job.machine / "computed.txt", "a") as computed:
                computed.write(f"{keys[0].hex()}\n")
            return scored(table, slots)

        def _refuse_changed_weights(self) -> None:
            pass  # there are none

    sequences = Sequences(table)
    slot_of = {sequences[slot].key(): slot for slot in range(2 * len(table))}
    cache = open_cache(job.url)
    plan = cache.plan(table, [MINE], job.tokens_per_shard)
    scorer = Scripted(Score(), None, NUMERICS[MINE], cache, sequences, Progress(silent=True))
    for _ in scorer.run(plan, 0, 1):
        pass


def read_computed(machine: Path) -> list[str]:
    """The chunks that were computed on a machine, by their first key."""
    file = machine / "computed.txt"
    return file.read_text().split() if file.exists() else []
