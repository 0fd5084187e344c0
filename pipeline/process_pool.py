"""Work done by several processes at once, in whatever order, one after another where one process is enough."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from pipeline.errors import ResourceError, UsageError

T = TypeVar("T")
_AHEAD = 2  # tasks per worker that wait for it: enough to keep it busy, few enough to keep memory flat


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    start: Callable[[], Callable[..., T]], tasks: Iterable[tuple[Any, ...]], n_workers: int, alone: Callable[..., T]
) -> Iterator[T]:
    """The results of `tasks`, as they come. A worker calls `start()` once, and what it returns for every task. A single
    task, or a single worker, is done here by `alone`."""
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if n_workers == 1 or len(first) < 2:
        yield from (alone(*task) for task in tasks)
        return
    with _processes(start, n_workers) as submit:
        waiting: set[Future[T]] = set()
        for task in tasks:
            waiting.add(submit(_work, *task))
            if len(waiting) >= n_workers * _AHEAD:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


@contextlib.contextmanager
def _processes(start: Callable[[], Callable[..., Any]], n_workers: int) -> Iterator[Callable[..., Any]]:
    before = set(multiprocessing.active_children())
    started: set[Any] = set()
    # Not fork: this process has threads.
    executor = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _begin, (start,))
    try:
        yield partial(_submit, executor, started)
        executor.shutdown()
    except BrokenProcessPool:
        executor.shutdown()  # its thread reaps the workers: until then, how they ended may be unknown here
        if any(process.exitcode == -signal.SIGVTALRM for process in started - before):
            raise ResourceError(
                "A worker process was ended by its timer: a chat template kept it busy in one operation that cannot be "
                "interrupted. Name another one: prepare.chat_template: FILE.jinja."
            ) from None
        raise ResourceError(
            "A worker process was killed, as the system does when memory runs out. What was finished is kept: run the "
            "same command again with fewer of them (prepare.workers)."
        ) from None
    finally:
        # After an error or an interrupt nobody waits for the tasks under way.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        executor.shutdown(wait=False, cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, started: set[Any], function: Callable[..., T], *task: Any) -> Future[T]:
    with _uninterrupted():  # for this may start a worker
        future = executor.submit(function, *task)
    started.update(multiprocessing.active_children())
    return future


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Interrupts wait. A worker that starts meanwhile inherits the block, so that Ctrl-C does not meet it before it has
    learnt to ignore it."""
    came: list[tuple[int, Any]] = []
    # Handlers too: a thread of some library may take the signal that this one blocks.
    handlers = {n: signal.signal(n, lambda *what: came.append(what)) for n in (signal.SIGINT, signal.SIGTERM)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number, frame in came[:1]:
            if callable(handler := handlers[signal.Signals(number)]):
                handler(number, frame)


_do: Callable[..., Any]


def _begin(start: Callable[[], Callable[..., Any]]) -> None:
    global _do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _do = start()


def _work(*task: Any) -> Any:
    return _do(*task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def share() -> tuple[int, int]:
    """Which of how many machines this is, as torchrun and batch systems say it."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise UsageError(
            f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} are set; expected numbers with "
            "RANK from 0 to WORLD_SIZE - 1. Unset both to work on one machine."
        )
    return rank, world
