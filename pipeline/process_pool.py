"""Work spread over several processes, with results in any order; done in this process where one is enough."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from prefcache.pipeline.errors import ResourceError, UsageError

T = TypeVar("T")
_AHEAD = 2  # tasks per worker that wait for it: enough to keep it busy, few enough to keep memory flat


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    start: Callable[[], Callable[..., T]], tasks: Iterable[tuple[Any, ...]], n_workers: int, alone: Callable[..., T]
) -> Iterator[T]:
    """Yield the results of `tasks` as they come.

    Each worker calls `start()` once, and the function that it returns for every task. A single task, or the tasks of a
    single worker, are done in this process by `alone`.
    """
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
    with uninterrupted(), _hide_script():  # starts the process that tracks shared resources
        # Not fork, since this process has threads.
        executor = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _begin, (start,))
    try:
        yield partial(_submit, executor, started)
        executor.shutdown()
    except BrokenProcessPool:
        executor.shutdown()  # its thread reaps the workers; before that, their exit codes may be unknown here
        if any(process.exitcode == -signal.SIGVTALRM for process in started - before):
            raise ResourceError(
                "A worker process was ended by its timer: a chat template kept it busy in one operation that cannot be "
                "interrupted. Name another one: prepare.chat_template: FILE.jinja."
            ) from None
        raise ResourceError(
            "A worker process was killed, as the system does when memory runs out. Finished work is kept: run the same "
            "command again with fewer workers (prepare.workers)."
        ) from None
    finally:
        # After an error or an interrupt, do not wait for the running tasks.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        executor.shutdown(wait=False, cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, started: set[Any], function: Callable[..., T], *task: Any) -> Future[T]:
    with uninterrupted(), _hide_script():  # may start a worker
        future = executor.submit(function, *task)
    started.update(multiprocessing.active_children())
    return future


_hiding = threading.Lock()


@contextlib.contextmanager
def _hide_script() -> Iterator[None]:
    """Hide from workers which script or module is running.

    A spawned process first imports that script again, under another name, for functions that it may be sent from there. Workers are
    sent the package's own functions only; and a script that calls prefcache.prepare at its top level, without
    `if __name__ == "__main__"`, would start over in every worker.
    """
    main = sys.modules["__main__"]
    with _hiding:
        hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
        for name in hidden:
            delattr(main, name)
        # multiprocessing reads it without asking whether it is there.
        main.__spec__ = None
        try:
            yield
        finally:
            del main.__spec__
            vars(main).update(hidden)


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay interrupts.

    A process started meanwhile inherits the block, so that neither Ctrl-C nor a closing terminal ends it before it ignores
    them.
    """
    pending: list[tuple[int, Any]] = []
    handlers: dict[signal.Signals, Any] = {}
    # Replace handlers too: a library's thread may receive the signal that this one blocks. Only the main thread has any.
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, lambda *what: pending.append(what)) for n in _INTERRUPTS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number, frame in pending[:1]:
            if callable(handler := handlers[signal.Signals(number)]):
                handler(number, frame)


_do: Callable[..., Any]


def _begin(start: Callable[[], Callable[..., Any]]) -> None:
    global _do
    for each in (signal.SIGINT, signal.SIGHUP):  # the parent is told, and ends its workers
        signal.signal(each, signal.SIG_IGN)
    # There is a process for every core. fastokens reads the second at its first very long text.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _do = start()


def _work(*task: Any) -> Any:
    return _do(*task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def rank_and_world() -> tuple[int, int]:
    """Return rank and world size, as torchrun and batch systems set them."""
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


def job() -> str | None:
    """A word that the processes of one launch share; None for a single process.

    Launches that set only RANK and WORLD_SIZE, as by hand or from a job array, differ by WORLD_SIZE alone.
    """
    _, world = rank_and_world()
    if world == 1:
        return None
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return "/".join([str(world), *(os.environ.get(name, "") for name in names)])
