"""Threads that do not keep a process alive: it exits even while one of them waits for an answer.

concurrent.futures joins its threads when a process ends, and a blocking call holds up Ctrl-C if the main thread makes it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar, TypeVarTuple

A = TypeVarTuple("A")
T = TypeVar("T")
U = TypeVar("U")

# For calls that are under way when an iteration ends early, by an error or Ctrl-C.
_SECONDS_TO_END = 0.8


def call_in_thread(function: Callable[[*A], T], *arguments: *A) -> Future[T]:
    """Call a function in a thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, function, *arguments), daemon=True).start()
    return future


def map_parallel(function: Callable[[T], U], items: Sequence[T], n_threads: int) -> Iterator[U]:
    """Yield the function's results in the order of the items, with up to `n_threads` calls at once."""
    futures: deque[Future[U]] = deque(Future() for _ in items)
    todo = deque(zip(items, futures, strict=True))

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                item, future = todo.popleft()
                _settle(future, function, item)

    workers = [call_in_thread(work) for _ in range(min(n_threads, len(items)))]
    try:
        while futures:
            yield futures.popleft().result()
    finally:
        todo.clear()
        wait(workers, _SECONDS_TO_END)


def _settle(future: Future[T], function: Callable[[*A], T], *arguments: *A) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
