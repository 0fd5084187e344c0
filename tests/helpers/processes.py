"""A command in a process of its own, to be killed or limited, which is spared its imports.

A user's command takes seconds to import PyTorch, and most of a test that starts twenty would go there. Here one process imports
everything, and each command is a fork of it.
"""

import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PROCESSES = multiprocessing.get_context("forkserver")


def start_process(folder: Path, *arguments: Any, most_bytes: int | None = None) -> ForkServerProcess:
    """Run `prefcache ARGUMENTS` in that folder. `most_bytes`: no file may be larger, which fails a write as a full disk does."""
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
    process = _PROCESSES.Process(target=_run, args=(folder, list(map(str, arguments)), most_bytes))
    process.start()
    return process


def read_stderr(folder: Path, process: ForkServerProcess) -> str:
    """Return what the command has written to standard error."""
    file = folder / f"said-{process.pid}"
    return file.read_text() if file.exists() else ""


def _run(folder: Path, arguments: list[str], most_bytes: int | None) -> None:
    from prefcache.cli import main

    os.chdir(folder)
    sys.stderr = open(folder / f"said-{os.getpid()}", "w", buffering=1)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    main(arguments)


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
