"""Run queries in a child process that can be killed: when their time is up, at Ctrl-C, or when they take too much memory.

DuckDB checks for interrupts between blocks of rows, and a single function may take minutes and gigabytes within a block. So a
query runs in a forked child, which inherits what it reads and streams the answer back. The child limits its own memory, never
writes to the terminal, and ends when its parent ends, in whatever way.
"""

import contextlib
import copy
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from prefcache.pipeline import process_pool
from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.progress import working
from prefcache.pipeline.views.database import MEMORY_LIMIT, BrokenDatabase
from prefcache.pipeline.views.query import Query, Result

T = TypeVar("T")
_MEMORY = int(MEMORY_LIMIT.removesuffix("GB")) * 10**9
_OVERHEAD = 1 << 28  # bytes for Python, Arrow and thread stacks
_MOST_AT_ONCE = 1 << 28  # bytes in one message, which bounds the parent's memory too
_ROWS_AT_ONCE = 256


class Database(Protocol):
    """What answers queries in the child."""

    def open(self, query: Query) -> None:
        """Verify and open what the query reads. Neither limit applies yet."""

    def ask(self, query: Query, parameters: Mapping[str, Any] | None) -> Result: ...


@dataclass(frozen=True)
class Bounds:
    """How long `what` may take, and what the errors advise when it takes longer or needs too much memory."""

    what: str
    seconds: float | None
    if_slow: str
    if_large: str

    def too_slow(self) -> ResourceError:
        return ResourceError(f"{self.what} took more than {self.seconds:g} s and was ended. {self.if_slow}")

    def too_large(self) -> ResourceError:
        return ResourceError(f"{self.what} needs more than {MEMORY_LIMIT} of memory. {self.if_large}")


class Worker:
    """Keep one child with an open database for several queries. After a child was killed, the next query starts another."""

    def __init__(self, database: Callable[[], Database]) -> None:
        self._database = database
        self._child: _Child | None = None

    @contextlib.contextmanager
    def ask(self, query: str | Query, parameters: Mapping[str, Any] | None, bounds: Bounds) -> Iterator["Answer"]:
        """Yield the answer to one query, to be read within the query's time."""
        query = Query(query) if isinstance(query, str) else query
        child = self._child = self._child or _Child(lambda pipe: _serve(self._database(), pipe))
        try:
            child.send((query, parameters))
            child.start_clock(None)  # that of the query before may have run out meanwhile
            with working("read what the query needs"):
                child.expect("opened", bounds)
            child.start_clock(bounds.seconds)
            with working("compute the answer"):
                answer = Answer(child, bounds)
            yield answer
        finally:
            # An answer that was not read to its end is still being computed.
            if not child.is_idle:
                self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


class Answer:
    """The answer to a query, streamed either by rows() or by arrow() and batches()."""

    def __init__(self, child: "_Child", bounds: Bounds) -> None:
        self._child, self._bounds = child, bounds
        self.columns: list[str] = child.expect("columns", bounds)
        self.n_rows = 0  # read so far
        self._form: str | None = None  # in which the answer was asked for: rows or batch
        self._hints: list[str] = []
        self._numbers: dict[str, Any] | None = None

    def rows(self) -> Iterator[tuple[Any, ...]]:
        self._start("rows")
        for block in self._blocks():
            self.n_rows += len(block)
            yield from block

    def arrow(self) -> "Columns":
        """Ask for the answer by columns, instead of rows()."""
        self._start("batch")
        return Columns(pa.ipc.read_schema(pa.py_buffer(self._child.expect("schema", self._bounds))))

    def batches(self, columns: "Columns") -> Iterator[pa.RecordBatch]:
        for stream in self._blocks():
            for batch in pa.ipc.open_stream(stream):
                self.n_rows += len(batch)
                yield batch

    def explain_empty(self) -> list[str]:
        """Say which condition left no row, once the whole answer has been read and was empty."""
        return self._hints

    def numbers(self) -> dict[str, Any]:
        """Return the query's numbers about all the data. What is left of the answer is read first."""
        if self._form is None:
            self._start("rows")
        if self._numbers is None:
            with working("compute the numbers about all the data"):
                for _ in self._blocks():
                    pass
        return self._numbers or {}

    def _start(self, form: str) -> None:
        self._form = form
        self._child.send(form)

    def _blocks(self) -> Iterator[Any]:
        while (received := self._child.receive(self._bounds))[0] == self._form:
            yield received[1]
        assert received[0] == "end", received[0]
        self._hints, self._numbers = received[1]


@dataclass(frozen=True)
class Columns:
    """What batches() yields."""

    schema: pa.Schema


def call(work: Callable[[], T], bounds: Bounds) -> T:
    """Return what `work` returns, computed in a child."""

    def serve(pipe: Connection) -> None:
        with _limited_memory():
            _send(pipe, "end", work())

    child = _Child(serve)
    try:
        child.start_clock(bounds.seconds)
        result: T = child.expect("end", bounds)
        return result
    finally:
        child.close()


class _Child:
    """A forked process and the pipe to it."""

    def __init__(self, serve: Callable[[Connection], None]) -> None:
        fork = multiprocessing.get_context("fork")  # shares what is open, and imports nothing anew
        self._pipe, theirs = fork.Pipe()
        with process_pool.uninterrupted():
            # DuckDB spills there, and the folder is removed with the child.
            folder = tempfile.mkdtemp(prefix="prefcache-")
            self._process = fork.Process(target=_main, args=(serve, theirs, folder), daemon=True)
            self._process.start()
            self.close = weakref.finalize(self, _end, self._process, self._pipe, folder)
        theirs.close()
        self._until: float | None = None
        self.is_idle = True  # waits for a request

    def start_clock(self, seconds: float | None) -> None:
        self._until = None if seconds is None else time.monotonic() + seconds

    def send(self, request: Any) -> None:
        self.is_idle = False
        with contextlib.suppress(OSError):  # the child is gone: receive() reports it
            self._pipe.send(request)

    def expect(self, kind: str, bounds: Bounds) -> Any:
        received = self.receive(bounds)
        assert received[0] == kind, (received[0], kind)
        return received[1]

    def receive(self, bounds: Bounds) -> tuple[str, Any]:
        """Return the next message, or raise the child's error."""
        left = None if self._until is None else max(self._until - time.monotonic(), 0)
        if left == 0 or not self._pipe.poll(left):
            raise bounds.too_slow()
        try:
            kind, content = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            # Some failed allocations abort the whole process, and the system kills one when memory runs out.
            raise bounds.too_large() from None
        self.is_idle = kind in ("end", "refused")
        if kind == "large":
            raise bounds.too_large()
        if kind in ("refused", "failed"):
            raise content
        return kind, content


def _end(process: Any, pipe: Connection, folder: str) -> None:
    process.kill()
    process.join()
    pipe.close()
    shutil.rmtree(folder, ignore_errors=True)


# -- in the child ----------------------------------------------------------------------------------------------------


def _main(serve: Callable[[Connection], None], pipe: Connection, folder: str) -> None:
    for each in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to both; the parent kills this process
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    _drop_connections(nothing, pipe)
    tempfile.tempdir = folder
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        serve(pipe)
    except EOFError:
        pass  # the parent has closed the pipe
    except MemoryError:
        _send(pipe, "large", None)
    except BaseException as error:
        _send(pipe, "failed", _portable(error))


def _drop_connections(nothing: int, pipe: Connection) -> None:
    """Drop the parent's sockets and its pipes to other processes, which a fork inherits.

    While they are open here, whoever is at the other end does not notice that the parent closed them: a browser waits for an answer,
    and a process that another thread is starting waits to be started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    kept = {pipe.fileno(), parent.sentinel}
    for fd in {int(path.name) for path in Path("/dev/fd").iterdir()} - kept:
        with contextlib.suppress(OSError):  # listing the folder opened one, which is closed by now
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                os.dup2(nothing, fd)  # and not close: an object that was inherited too may close this number later


def _serve(database: Database, pipe: Connection) -> None:
    while True:
        query, parameters = pipe.recv()
        try:
            database.open(query)
            _send(pipe, "opened", None)
            with _limited_memory():
                result = database.ask(query, parameters)
                _send(pipe, "columns", result.columns)
                if pipe.recv() == "rows":
                    for block in result.blocks(_ROWS_AT_ONCE):
                        _send_in_parts(pipe, "rows", block, lambda rows: rows)
                else:
                    reader = result.arrow()
                    _send(pipe, "schema", reader.schema.serialize().to_pybytes())
                    for batch in result.batches(reader):
                        _send_in_parts(pipe, "batch", batch, _to_stream)
                _send(pipe, "end", (result.explain_empty(), result.numbers()))
        except UsageError as error:
            if isinstance(error, BrokenDatabase):
                raise
            _send(pipe, "refused", error)


def _to_stream(batch: pa.RecordBatch) -> bytes:
    """Write a complete stream, because a lone batch would lack its dictionaries."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _send_in_parts(pipe: Connection, kind: str, rows: Any, encode: Callable[[Any], Any]) -> None:
    """Send rows in one message, or halve them until each message is small enough."""
    message = pickle.dumps((kind, encode(rows)), pickle.HIGHEST_PROTOCOL)
    if len(message) <= _MOST_AT_ONCE:
        pipe.send_bytes(message)
    elif len(rows) == 1:
        raise MemoryError
    else:
        half = len(rows) // 2
        _send_in_parts(pipe, kind, rows[:half], encode)
        _send_in_parts(pipe, kind, rows[half:], encode)


def _send(pipe: Connection, kind: str, content: Any) -> None:
    pipe.send((kind, content))


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a plain one with its text if it cannot be pickled."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # made again as unpickling would make it
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let the system enforce the limit: DuckDB does not count every byte. Mapped files are exempt."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status")
    match = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    most = (int(match[1]) * 1024 if match else 0) + _MEMORY + _OVERHEAD
    soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
