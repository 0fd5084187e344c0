"""Machines that share nothing but an object store: each with its own home, working folder, mirror and copy of the model."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.helpers.project import PREFCACHE, Done, checked, default_signals

MODEL = "org/tiny"  # in the hub's cache of every machine
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Machine:
    """A folder that stands for a machine."""

    folder: Path
    environment: dict[str, str]  # of every process on it

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def mirror(self) -> Path:
        return self.folder / "mirror"

    def write_config(self, cache: str, data: Path | None = None, **sections: Any) -> Path:
        tree = {
            "model": MODEL,
            "out": "runs/tiny",
            "cache": cache,
            "prepare": {"data": str(data or "gone.jsonl"), "held_out": 0.2},
            "train": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "samples": 0},
        }
        path = self.work / "config.yaml"
        path.write_text(yaml.safe_dump(tree | sections))
        return path

    def start(self, *command: Any, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.work,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=default_signals,
        )

    def run(self, *arguments: Any, code: int = 0, **variables: str) -> Done:
        """The command prefcache on this machine."""
        return finish(self.start(PREFCACHE, *arguments, **variables), code)

    def shards(self) -> set[str]:
        """The whole shards in its mirror: those that were computed on it, as long as nothing needs whole shards of others."""
        return {path.name for path in self.mirror.glob("*/*/*.parquet")}


def finish(process: subprocess.Popen[str], code: int = 0) -> Done:
    out, said = process.communicate(timeout=240)
    assert "Traceback" not in said, said
    return checked(Done(process.returncode, out, said), code)


def make_machine(folder: Path, model: Path | None, store: Mapping[str, str]) -> Machine:
    """A machine with a copy of the model; `store` is what its environment says of the object store."""
    for each in ("work", "home", "hub"):
        (folder / each).mkdir(parents=True)
    if model is not None:
        add_model(folder / "hub", model)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **store,
        "PREFCACHE_MIRROR": str(folder / "mirror"),
    }
    return Machine(folder, environment)


def add_model(cache: Path, model: Path) -> None:
    """Put a model where the hub's client would have downloaded it."""
    place = cache / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(model, place / "snapshots" / _COMMIT)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(_COMMIT)


def wait_until(happened: Callable[[], object], *processes: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait while these processes run."""
    deadline = time.monotonic() + seconds
    while not happened():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def claimants(s3: Any) -> set[int]:
    """The processes that hold a claim on a chunk now."""
    found = set()
    for name in s3.objects():
        if "/claims/" in name:
            try:
                found.add(json.loads(s3.read(name))["pid"])
            except (s3.client.exceptions.NoSuchKey, ValueError, KeyError):
                continue  # given up since it was listed
    return found


def tree_of(process: subprocess.Popen[str]) -> set[int]:
    """A process and all that it started."""
    try:
        parent = psutil.Process(process.pid)
        return {process.pid, *(child.pid for child in parent.children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


@dataclass
class RayNode:
    """A machine that belongs to a cluster of Ray, with one core for an actor."""

    machine: Machine
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """Kill all of it at once, as when a machine loses power."""
        pids = tree_of(self.process)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def ray_cluster(machines: Sequence[Machine], temporary: Path) -> Iterator[tuple[str, list[RayNode]]]:
    """Start Ray on these machines, of which the first is the head; yield its address and the nodes.

    `temporary` has to be a short path, for Ray's sockets.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray, common = PREFCACHE.with_name("ray"), ["--block", "--num-cpus=1", f"--object-store-memory={80 << 20}"]
    nodes: list[RayNode] = []
    try:
        for machine in machines:
            role = [f"--address=127.0.0.1:{port}"]
            if not nodes:
                role = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}"]
            process = machine.start(ray, "start", *role, *common, PYTHONUNBUFFERED="1")
            nodes.append(RayNode(machine, process))
            assert any("Ray runtime started" in line for line in process.stdout), process.communicate()
        yield f"127.0.0.1:{port}", nodes
    finally:
        for node in nodes:
            node.kill()
