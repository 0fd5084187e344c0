"""A command in a process of its own, to be killed or limited, which is spared its imports.

A user's command takes seconds to import PyTorch, and most of a test that starts twenty would go there. Here one process imports
everything, and each command is a fork of it.
"""

import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.helpers.project import Done, checked

_PROCESSES = multiprocessing.get_context("forkserver")


def start_process(
    folder: Path, *arguments: Any, most_bytes: int | None = None, environment: dict[str, str] | None = None
) -> ForkServerProcess:
    """Run `prefcache ARGUMENTS` in that folder. `most_bytes`: no file may be larger, which fails a write as a full disk does."""
    return _start(folder, [list(map(str, arguments))], most_bytes, environment or {})


def launch(folder: Path, *commands: Iterable[Any], seconds: float = 300) -> Done:
    """Run commands one after another, each in two processes at once, as torchrun starts them; return what both printed.

    torchrun itself starts those of tests/pipeline/training/test_distributed.py and of the guide.
    """
    lines = [list(map(str, command)) for command in commands]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [_start(folder, lines, None, shared | {"RANK": f"{n}", "LOCAL_RANK": f"{n}"}) for n in range(2)]
    until = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, until - time.monotonic()))
    for process in ranks:
        process.kill()
    printed, said = ("".join(_read(folder, name, process) for process in ranks) for name in ("printed", "said"))
    return checked(Done(max(abs(process.exitcode or 0) for process in ranks), printed, said), 0)


def _start(
    folder: Path, commands: list[list[str]], most_bytes: int | None, environment: dict[str, str]
) -> ForkServerProcess:
    _PROCESSES.set_forkserver_preload(
        [
            "prefcache.cli",
            "prefcache.commands.prepare",
            "prefcache.commands.score",
            "prefcache.commands.train",
            "prefcache.pipeline.training.train_loop",
            __name__,
        ]
    )
    process = _PROCESSES.Process(target=_run, args=(folder, commands, most_bytes, environment))
    process.start()
    return process


def read_stdout(folder: Path, process: ForkServerProcess) -> str:
    """Return what the command has printed."""
    return _read(folder, "printed", process)


def read_stderr(folder: Path, process: ForkServerProcess) -> str:
    """Return what the command has written to standard error."""
    return _read(folder, "said", process)


def _read(folder: Path, name: str, process: ForkServerProcess) -> str:
    file = folder / f"{name}-{process.pid}"
    return file.read_text() if file.exists() else ""


def _run(folder: Path, commands: list[list[str]], most_bytes: int | None, environment: dict[str, str]) -> None:
    from prefcache.cli import main

    os.chdir(folder)
    os.environ.update(environment)
    sys.stdout, sys.stderr = (open(folder / f"{name}-{os.getpid()}", "w", buffering=1) for name in ("printed", "said"))
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    for command in commands[:-1]:
        main(command, standalone_mode=False)
    main(commands[-1])


def is_gone(group: int, seconds: float = 20) -> bool:
    """Whether no process of the group is left, within a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
