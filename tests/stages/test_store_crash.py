"""Scorers that fill one object store are killed at any moment, on a network with faults: no row is lost and none is doubled."""

import contextlib
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored.cache_maintenance import gc
from tests.helpers.caches import MINE, NUMERICS, expected, logp, scored
from tests.helpers.machines import open_cache
from tests.helpers.project import invoke
from tests.helpers.store_proxy import StoreProxy, faults_in
from tests.helpers.store_scorers import Job, pairs, read_computed, read_log, start_reader, start_scorer
from tests.helpers.stores import Bucket, use_environment

N_MACHINES = 4


def content_of(s3: Bucket, url: str) -> dict[str, bytes]:
    """The shards and records of a cache in a store, byte for byte."""
    prefix = url.removeprefix(f"s3://{s3.name}/") + "/"
    pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=s3.name, Prefix=prefix)
    names = [each["Key"] for page in pages for each in page.get("Contents", [])]
    shards = [name for name in names if re.fullmatch(rf"{prefix}[\w.-]+/[0-9a-f-]+\.(json|parquet)", name)]
    others = {name.removeprefix(prefix) for name in names} - {name.removeprefix(prefix) for name in shards}
    assert all("/claims/" in name or name.endswith("/reference.json") for name in others), others
    return {name.removeprefix(prefix): s3.client.get_object(Bucket=s3.name, Key=name)["Body"].read() for name in shards}


class Machines:
    """Machines with a scorer on each, of which one is killed and replaced now and then."""

    def __init__(self, s3: Bucket, proxy: StoreProxy, folder: Path, n_pairs: int, chunk_seconds: float) -> None:
        self.s3, self.random = s3, random.Random(n_pairs)
        self.n_killed = self.n_killed_at_work = 0
        self.jobs = []
        for n in range(N_MACHINES):
            machine = folder / f"machine-{n}"
            machine.mkdir()
            environment = s3.environment_of(proxy.url, machine / "mirror")
            self.jobs.append(Job(s3.url, n_pairs, 60, chunk_seconds, machine, environment))
        self.scorers: list[ForkServerProcess] = [start_scorer(job) for job in self.jobs]

    def kill_all(self) -> None:
        """Kill each scorer at a random moment, in most rounds after its first claim, and start another in its place."""
        if self.random.random() < 0.8:
            self._wait_for_claims()
        moments = [self.random.uniform(0, 0.2) for _ in self.scorers]
        begun = time.monotonic()
        for n in sorted(range(N_MACHINES), key=moments.__getitem__):
            time.sleep(max(0.0, begun + moments[n] - time.monotonic()))
            self.scorers[n].kill()
            self.scorers[n].join()
            assert self.scorers[n].exitcode == -9, "it was finished: more pairs are needed"
        claimants = self._claimants()
        self.n_killed += N_MACHINES
        self.n_killed_at_work += sum(scorer.pid in claimants for scorer in self.scorers)
        for n, job in enumerate(self.jobs):
            if self.random.random() < 0.2:  # the next one begins on a machine without a mirror
                shutil.rmtree(job.machine / "mirror", ignore_errors=True)
            self.scorers[n] = start_scorer(job)

    def _wait_for_claims(self) -> None:
        """Wait until most are at work. All would take long, for those that began first take the chunks."""
        until, pids = time.monotonic() + 4, {scorer.pid for scorer in self.scorers}
        while len(pids & self._claimants()) < 3 and time.monotonic() < until:
            time.sleep(0.02)

    def _claimants(self) -> set[int]:
        """The processes that have claimed a chunk, dead or alive."""
        pids = set()
        for name in self.s3.objects():
            if "/claims/" in name and "probe" not in name:
                with contextlib.suppress(self.s3.client.exceptions.NoSuchKey):
                    pids.add(json.loads(self.s3.read(name))["pid"])
        return pids

    def wait(self) -> None:
        for scorer in self.scorers:
            scorer.join(timeout=120)
        assert [scorer.exitcode for scorer in self.scorers] == [0] * N_MACHINES

    def computed(self) -> Counter[str]:
        return Counter(chunk for job in self.jobs for chunk in read_computed(job.machine))


@pytest.mark.parametrize(
    ("n_kills", "n_pairs", "chunk_seconds"),
    [(20, 640, 0.1), pytest.param(200, 3200, 0.25, marks=pytest.mark.slow)],
    ids=["20", "200"],
)
def test_scorers_killed_over_a_store_lose_and_double_nothing(
    s3, tmp_path, monkeypatch, n_kills, n_pairs, chunk_seconds
):
    table = pairs(n_pairs)
    with s3.through_proxy(faults_in(0.05), seed=1) as proxy:
        machines = Machines(s3, proxy, tmp_path, n_pairs, chunk_seconds)
        while machines.n_killed < n_kills:
            machines.kill_all()
        n_before_the_end = len(content_of(s3, s3.url))
        machines.wait()
        share = proxy.injected.total() / proxy.requests.total()

    # A single scorer that nothing disturbs, into another store.
    (tmp_path / "alone").mkdir()
    alone = Job(
        f"{s3.url}-alone", n_pairs, 60, 0, tmp_path / "alone", s3.environment_of(s3.server.url, tmp_path / "alone")
    )
    undisturbed = start_scorer(alone)
    undisturbed.join(timeout=300)
    content = content_of(s3, alone.url)
    assert content_of(s3, s3.url) == content and n_before_the_end < len(content)

    n_chunks = len(read_computed(alone.machine))
    computed = machines.computed()
    n_twice = computed.total() - len(computed)
    print(
        f"{n_kills} scorers killed, {machines.n_killed_at_work} at a chunk, {proxy.requests.total()} requests of which {share:.1%} failed: {n_chunks} chunks, "
        f"{computed.total()} computed, {n_twice} of them again ({n_twice / n_chunks:.1%})"
    )
    assert len(computed) == n_chunks and 0.03 < share < 0.07
    # A killed scorer loses at most the chunk that it computed and those that it had not sent.
    assert n_twice <= 3 * n_kills and machines.n_killed_at_work > n_kills / 3

    # Each row is there once, with its value.
    shards = [pq.read_table(pa.BufferReader(data)) for name, data in content.items() if name.endswith(".parquet")]
    rows = pa.concat_tables(shards)
    values = dict(zip(rows["key"].to_pylist(), rows["logp_sum"].to_pylist(), strict=True))
    right = {
        sequence_key(row["prompt_ids"], row[f"{side}_ids"]): logp(row[f"{side}_ids"])
        for row in table.to_pylist()
        for side in ("chosen", "rejected")
    }
    assert values == right and len(rows) == len(values) == 2 * n_pairs
    use_environment(s3.environment_of(s3.server.url, tmp_path / "reader"), monkeypatch)
    joined = open_cache(s3.url).join(table, [MINE])
    assert joined["ref_chosen_logp"].tolist() == expected(table, "chosen")


def test_a_process_that_reads_while_gc_merges_and_deletes_sees_every_row(s3, tmp_path, monkeypatch):
    table = pairs(120)
    use_environment(s3.environment_of(s3.server.url, tmp_path / "writer"), monkeypatch)
    writer = open_cache(s3.url)
    for slots in writer.plan(table, [MINE], 60).chunks:
        writer.commit(scored(table, slots), NUMERICS[MINE], MINE, None)
    n_shards = len(content_of(s3, s3.url)) // 2
    readers = []
    for n in range(2):
        (tmp_path / f"reader-{n}").mkdir()
        environment = s3.environment_of(s3.server.url, tmp_path / f"reader-{n}/mirror")
        readers.append(start_reader(Job(s3.url, 120, 60, 0, tmp_path / f"reader-{n}", environment)))
    has_read = lambda times: all(len(read_log(tmp_path / f"reader-{n}")) >= times for n in range(2))  # noqa: E731
    wait_until(lambda: has_read(2), readers)
    # Each time shards are merged by twos or threes, and those they replace are deleted at once, not after a day.
    for n, target in enumerate([6_000, 12_000, 24_000, 1 << 30]):
        gc(writer.folder, target, old_seconds=-1)
        wait_until(lambda n=n: has_read(4 + 2 * n), readers)
    gc(writer.folder, 1 << 30, old_seconds=-1)
    (tmp_path / "stop").touch()
    for reader in readers:
        reader.join(timeout=60)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert n_shards > 20 and sum(name.endswith(".parquet") for name in s3.objects()) == 1
    assert {line for n in range(2) for line in read_log(tmp_path / f"reader-{n}")} == {"240 right"}


def wait_until(condition: Callable[[], bool], readers: list[ForkServerProcess]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until and all(reader.is_alive() for reader in readers)
        time.sleep(0.05)


def test_a_second_machine_scores_nothing(prefcache, prepared, s3, tmp_path, monkeypatch):
    first = json.loads(prefcache("score", prepared, "--set", f"cache={s3.url}", "--json").stdout)
    assert first["scored"] == 120 and first["tokens"] > 0
    content = content_of(s3, s3.url)

    second = shutil.copytree(
        tmp_path, tmp_path.parent / f"{tmp_path.name}-second", ignore=shutil.ignore_patterns("mirror", "scored")
    )
    monkeypatch.setenv("PREFCACHE_MIRROR", str(second / "mirror"))
    done = json.loads(invoke(second, "score", "config.yaml", "--set", f"cache={s3.url}", "--json").stdout)
    assert (done["sequences"], done["scored"], done["tokens"]) == (120, 0, 0)
    assert content_of(s3, s3.url) == content
