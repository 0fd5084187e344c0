"""score on several machines that share nothing but an object store: by Ray, under torchrun's variables, and started by hand."""

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.project import PREFCACHE, Done, invoke
from tests.helpers.separate_machines import Machine, claimants, finish, make_machine, ray_cluster, tree_of, wait_until
from tests.helpers.store_proxy import Request, StoreProxy

N_PAIRS = 300
# A forward for each sequence, so that computing a chunk takes longer than claiming it, as with a real model.
SMALL_CHUNKS = {"tokens_per_shard": 400, "tokens_per_batch": 8}


@pytest.fixture
def url(prefcache: Callable[..., Done], n_prepared: Path, s3) -> str:
    """Prepared data in a store whose cache is empty, sent from where the data is."""
    return prefcache("upload", n_prepared, "--set", f"cache={s3.url}").stdout.splitlines()[-1]


@pytest.fixture
def undisturbed(prefcache: Callable[..., Done], n_prepared: Path, s3) -> dict[str, bytes]:
    """The shards and records that a single scorer puts into another store."""
    settings = [f"cache={s3.url}-alone", *(f"score.{name}={value}" for name, value in SMALL_CHUNKS.items())]
    prefcache("score", n_prepared, *(word for setting in settings for word in ("--set", setting)))
    return shards_and_records(s3, f"{s3.url}-alone")


def shards_and_records(s3, url: str) -> dict[str, bytes]:
    """Every byte of a cache, but for claims and the reference's name."""
    prefix = url.removeprefix(f"s3://{s3.name}/") + "/"
    pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=s3.name, Prefix=prefix)
    names = [each["Key"] for page in pages for each in page.get("Contents", [])]
    kept = [name for name in names if re.fullmatch(rf"{prefix}[\w-]+/[0-9a-f-]+\.(json|parquet)", name)]
    assert all("/claims/" in name or "prepared/" in name or "reference.json" in name for name in {*names} - {*kept})
    return {name.removeprefix(prefix): s3.client.get_object(Bucket=s3.name, Key=name)["Body"].read() for name in kept}


def n_chunks(cache: dict[str, bytes]) -> int:
    return sum(name.endswith(".parquet") for name in cache)


def add_machine(folder: Path, model: Path, store: dict[str, str], s3, url: str) -> Machine:
    """A machine that has fetched the prepared data."""
    machine = make_machine(folder, model, store)
    machine.write_config(s3.url, score=SMALL_CHUNKS)
    invoke(machine.work, "download", url, "--out", "runs/tiny")
    return machine


# -- Ray -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """For its sockets, which want a short path."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow  # Ray takes ten seconds to start, twice
def test_nodes_of_ray_share_a_store_while_an_actor_dies_and_a_node_loses_power(undisturbed, url, model, s3, tmp_path):
    def add(name: str, endpoint: str) -> Machine:
        return make_machine(tmp_path / name, model, s3.environment_of(endpoint, Path()))

    first = add_machine(tmp_path / "first", model, s3.environment, s3, url)
    with (
        s3.through_proxy(latency=0.05) as distance,  # so that a claim is seen while it is held
        ray_folder() as temporary,
        ray_cluster([add(name, distance.url) for name in ("a", "b")], temporary) as (address, (a, b)),
    ):
        settings = ["--set", f"score.ray.address={address}", "--set", "score.ray.actors=2", "--json"]
        scorer = first.start(PREFCACHE, "score", "config.yaml", *settings)
        wait_until(lambda: len(a.machine.shards()) > 3, scorer)
        wait_until(lambda: (dying := claimants(s3) & tree_of(a.process)) and kill(dying), scorer)
        wait_until(lambda: len(b.machine.shards()) > 3, scorer)
        wait_until(lambda: claimants(s3) & tree_of(b.process), scorer)
        b.kill()  # at a chunk that it has claimed
        assert n_chunks(shards_and_records(s3, s3.url)) < n_chunks(undisturbed)
        done = finish(scorer)
    assert json.loads(done.stdout)["scored"] == 2 * N_PAIRS
    assert done.stderr.count("an actor of Ray died at a chunk") == 2
    # Bit for bit, with the parity that each actor measured, and without a row that is stored twice.
    assert shards_and_records(s3, s3.url) == undisturbed
    computed = Counter(shard for node in (a, b) for shard in node.machine.shards())
    assert computed.keys() == {name.rpartition("/")[2] for name in undisturbed if name.endswith(".parquet")}
    assert (
        sum(computed.values()) - len(computed) <= 1
    )  # a chunk that was sent when its actor died, before it could say so


def kill(pids: set[int]) -> bool:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return True


# -- without Ray -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machines_of(n: int, s3, model: Path, folder: Path, url: str) -> Iterator[list[tuple[Machine, list[str]]]]:
    """Machines that begin to score at the same moment, each with the names of the shards that it has sent."""
    together = threading.Barrier(n)
    with contextlib.ExitStack() as proxies:
        machines = []
        for number in range(n):
            proxy, sent = proxies.enter_context(s3.through_proxy()), list[str]()
            store = s3.environment_of(proxy.url, Path())
            machines.append((add_machine(folder / f"machine-{number}", model, store, s3, url), sent))
            watch(proxy, sent, together)
        yield machines


def watch(proxy: StoreProxy, sent: list[str], together: threading.Barrier) -> None:
    has_begun = threading.Event()

    def note(request: Request) -> None:
        # What a scorer creates before it loads the model only shows that it may write.
        if re.search("/claims/(?!probe)", request.path) and request.method == "PUT" and not has_begun.is_set():
            has_begun.set()
            together.wait(timeout=100)
        if request.method == "PUT" and (match := re.search(r"/([0-9a-f-]+\.parquet)(\?|$)", request.path)):
            sent.append(match[1])

    proxy.on_request = note


@pytest.mark.parametrize("launch", ["two ranks", pytest.param("three by hand", marks=pytest.mark.slow)])
def test_scorers_on_machines_of_their_own_share_the_chunks(undisturbed, url, model, s3, tmp_path, launch):
    n = 2 if launch == "two ranks" else 3
    with machines_of(n, s3, model, tmp_path, url) as machines:
        scorers = []
        for rank, (machine, _) in enumerate(machines):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(n)} if launch == "two ranks" else {}
            scorers.append(machine.start(PREFCACHE, "score", "config.yaml", "--json", **variables))
        results = [json.loads(finish(scorer).stdout) for scorer in scorers]
        assert all(result["sequences"] == 2 * N_PAIRS and result["failed"] == 0 for result in results)
        assert shards_and_records(s3, s3.url) == undisturbed
        sent = Counter(shard for _, shards in machines for shard in shards)
        n_twice = sum(sent.values()) - len(sent)
        print(f"{len(sent)} chunks: {[len(shards) for _, shards in machines]} by machine, {n_twice} twice")
        assert len(sent) == n_chunks(undisturbed) and n_twice <= n
        assert all(len(shards) > 0 for _, shards in machines)  # none was idle
        assert n_twice or sum(result["scored"] for result in results) == 2 * N_PAIRS
        # Each knows that everything is scored.
        for machine, _ in machines:
            manifest = json.loads((machine.work / "runs/tiny/scored/manifest.json").read_text())
            assert len(manifest["shards"]) == n_chunks(undisturbed)
        if launch == "three by hand":
            again = machines[0][0].run("score", "config.yaml", "--json")
            assert json.loads(again.stdout)["scored"] == 0 and "nothing to do" in again.stderr


@pytest.mark.slow  # Ray takes ten seconds to start
def test_actors_on_the_machine_of_the_command_share_its_mirror(undisturbed, url, model, s3, tmp_path):
    machine = add_machine(tmp_path / "only", model, s3.environment, s3, url)
    with ray_folder() as temporary:
        done = machine.run("score", "config.yaml", "--set", "score.ray.actors=2", "--json", RAY_TMPDIR=str(temporary))
    assert json.loads(done.stdout)["scored"] == 2 * N_PAIRS
    assert shards_and_records(s3, s3.url) == undisturbed
    assert not [name for name in s3.objects() if "/claims/" in name]
