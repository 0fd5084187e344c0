"""A user's query runs in a process that can be ended: by its time, by its memory, by Ctrl-C, by the end of ours."""

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import duckdb
import psutil
import pyarrow as pa
import pytest

from prefcache.pipeline import views
from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.views import query_worker
from prefcache.pipeline.views.query_worker import Bounds, Worker, call
from tests.helpers.experiments import PAIRS, sources
from tests.helpers.project import start


def bounds(seconds: float | None = 60) -> Bounds:
    return Bounds("The query", seconds, "Ask for less.", "Ask for fewer rows.")


class Database:
    def __init__(self, found: views.Sources) -> None:
        self._con = views.connect(found)

    def open(self, query: views.Query) -> None:
        query.find_stored_tables()

    def ask(self, query, parameters):
        return views.ask(self._con, query, (), parameters)


@pytest.fixture
def asked(tmp_path):
    """What answers a query about two pairs of one run."""
    found = sources(tmp_path, {"trained": 0.1})
    answering = Worker(lambda: Database(found))
    yield lambda query, seconds=60, parameters=None: answering.ask(query, parameters, bounds(seconds))
    answering.close()


def rows(asked, query: str, seconds: float = 60) -> list[tuple]:
    with asked(query, seconds) as answer:
        return list(answer.rows())


def children() -> list[psutil.Process]:
    """Those that were forked here, whatever other tests have started."""
    return [psutil.Process(each.pid) for each in multiprocessing.active_children()]


ENDLESS = [
    "with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t",
    "select max(a.i * b.i) from range(10000000) a(i), range(10000000) b(i)",
    # One function, between whose blocks DuckDB never comes.
    "select length(lpad('x', 2000000000, 'y'))",
    "select length(format('{:>2000000000}', 'x'))",
    "select levenshtein(repeat('ab', 200000), repeat('bc', 200000))",
]


@pytest.mark.parametrize("query", ENDLESS)
def test_a_query_ends_when_its_time_is_up_whatever_it_does(asked, query):
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"more than 0\.5 s and was ended"):
        rows(asked, query, 0.5)
    assert time.monotonic() - began < 10  # the half second, and what a busy machine takes to end it
    assert not children()


@pytest.mark.parametrize(
    "query",
    [
        "select count(*) from (select unnest(range(4000000000)) from range(1000000))",
        # DuckDB does not count it.
        "select length(repeat('x', 4000000000))",
    ],
)
def test_what_needs_more_memory_than_there_is_for_it_is_refused(asked, query):
    with pytest.raises(ResourceError, match="needs more than 3GB of memory"):
        rows(asked, query)
    assert rows(asked, "select count(*) from rewards") == [(2,)]


@contextlib.contextmanager
def most_memory_of_children() -> Iterator[list[int]]:
    """The bytes that a child of this process has at most in the block, looked at every few milliseconds."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    most[0] = max(most[0], child.memory_info().rss)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield most
    finally:
        done.set()
        watch.join()


def test_what_duckdb_does_not_count_is_bound_too(asked, monkeypatch):
    # 60 texts of 10 MB where 200 MB are allowed.
    monkeypatch.setattr(query_worker, "_MEMORY", 200_000_000)
    monkeypatch.setattr(query_worker, "_OVERHEAD", 0)
    with most_memory_of_children() as most, pytest.raises(ResourceError, match="of memory"):
        rows(asked, "select len(list_transform(range(60), lambda x: repeat(repeat('a', 1000000), 10)))")
    # What is allowed, and what the child shares with this process.
    assert 0 < most[0] < psutil.Process().memory_info().rss + 250_000_000


def test_a_row_too_large_to_be_handed_over_is_refused_and_many_are_not(asked, monkeypatch):
    monkeypatch.setattr(query_worker, "_MOST_AT_ONCE", 1_000_000)
    with pytest.raises(ResourceError, match="of memory"):
        rows(asked, "select repeat('x', 1000000)")
    # 80 times 40 kB are more than one message may have.
    with asked("select repeat('x', 40000) as x from range(80)") as answer:
        assert sum(len(text) for (text,) in answer.rows()) == 3_200_000
    with asked("select repeat('x', 40000) as x from range(80)") as answer:
        assert [len(batch) for batch in answer.batches(answer.arrow())] == [20, 20, 20, 20]


def test_rows_are_those_of_duckdb_whatever_their_type(asked):
    query = (
        "select 170141183460469231731687303715884105727::hugeint as h, 1.50::decimal(9, 2) as d, date '2024-02-29' as day, "
        "'a'::blob as b, [1, null] as l, {'x': {'y': 'z'}} as s, map {'k': 1} as m, 'b'::enum('a', 'b') as e, null as n, "
        "uuid '00000000-0000-0000-0000-000000000001' as u, interval 3 days as i"
    )
    assert rows(asked, query) == duckdb.connect().execute(query).fetchall()


def test_batches_are_those_of_duckdb_with_their_dictionaries(asked):
    query = "select i, ['a', 'b'][1 + i % 2]::enum('a', 'b') as e from range(200000) t(i) order by i"
    with asked(query) as answer:
        columns = answer.arrow()
        found = pa.Table.from_batches(answer.batches(columns), columns.schema)
    expected = duckdb.connect().sql(query).to_arrow_table()
    assert found.schema == expected.schema and found.to_pylist() == expected.to_pylist()
    assert answer.n_rows == 200_000


def test_a_long_answer_is_handed_over_as_it_is_computed(asked):
    # Were all of it computed first, this would take for ever.
    with asked("select i from range(1000000000000) t(i)") as answer:
        found = answer.rows()
        assert [next(found) for _ in range(3)] == [(0,), (1,), (2,)]
    assert not children()  # which would have computed on


def test_a_process_is_kept_between_queries_and_after_mistakes(asked):
    rows(asked, "select 1")
    (first,) = children()
    for wrong in ("select", "select nothing from rewards", "select cast('x' as int)", "drop view rewards"):
        with pytest.raises(UsageError):
            rows(asked, wrong)
    with pytest.raises(ResourceError):
        rows(asked, ENDLESS[0], 0.2)
    assert not first.is_running()
    assert rows(asked, "select count(*) from examples") == [(len(PAIRS),)]


def test_an_error_after_the_first_rows_is_the_users(asked):
    query = "select case when i = 99999 then cast('boom' || i as int) else i end from range(100000) t(i)"
    with pytest.raises(UsageError, match="boom99999"):
        rows(asked, query)


def test_an_empty_answer_says_which_condition_left_nothing(asked):
    with asked("select * from rewards where margin > $most", 60, {"most": 9}) as answer:
        assert list(answer.rows()) == []
    assert answer.explain_empty() == ["no rows. Of 2 before `where`:", "  0 left after (margin > $most)"]
    with asked("select * from rewards") as answer:
        list(answer.rows())
    assert answer.explain_empty() == []


def test_a_process_that_dies_is_told_as_a_lack_of_memory(asked):
    # So does the system where memory runs out, and a library where an allocation fails.
    with pytest.raises(ResourceError, match="3GB of memory"), asked("select count(*) from rewards") as answer:
        children()[0].send_signal(signal.SIGKILL)
        list(answer.rows())
    assert rows(asked, "select 1") == [(1,)]


def test_what_does_not_fit_into_memory_leaves_no_files(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spill"))
    (tmp_path / "spill").mkdir()
    with pytest.raises(ResourceError):
        rows(asked, "select count(distinct hash(i)) from range(100000000000) t(i)", 1)
    assert not list((tmp_path / "spill").iterdir())


def test_work_of_any_kind_can_be_done_so():
    assert call(lambda: [os.getppid()], bounds()) == [os.getpid()]
    with pytest.raises(UsageError, match="no"):
        call(lambda: (_ for _ in ()).throw(UsageError("no")), bounds())
    with pytest.raises(ResourceError, match=r"The query took more than 0\.2 s"):
        call(lambda: time.sleep(9), bounds(0.2))
    with pytest.raises(ResourceError, match="The query needs more than 3GB"):
        call(lambda: bytearray(4_000_000_000), bounds())
    # What cannot be handed over as it is, is handed over as text.
    with pytest.raises(RuntimeError, match="Odd: 2"):
        call(raise_odd, bounds())
    assert not children()


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(two)

    def __reduce__(self):
        raise pickle.PicklingError


def raise_odd() -> None:
    raise Odd(1, 2)


SCRIPT = """
import signal, sys, time
from prefcache.pipeline.views.query_worker import Bounds, call
def work():
    print("not to be seen", file=sys.stderr, flush=True)
    time.sleep(60)
signal.signal(signal.SIGHUP, signal.default_int_handler)
try:
    call(work, Bounds("It", None, "", ""))
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_it_ends_with_us_and_says_nothing(sent, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = start(
        sys.executable,
        "-c",
        SCRIPT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 30
    while not (found := psutil.Process(parent.pid).children()) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    # As a terminal does: to the whole group, which the other process is in.
    os.kill(parent.pid, sent) if sent == signal.SIGKILL else os.killpg(parent.pid, sent)
    out, err = parent.communicate(timeout=30)
    assert (out, err) == ("" if sent == signal.SIGKILL else "ended\n", "")
    psutil.wait_procs(found, timeout=10)
    assert not found[0].is_running() and not list(tmp_path.iterdir())


def test_a_servers_connection_ends_when_the_server_closes_it_though_a_query_began_meanwhile(asked):
    # A forked process inherits the connection; while it kept it open, a browser waited for the answer to its next request.
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        assert rows(asked, "select 1") == [(1,)]
        connection.close()
        client.settimeout(5)
        assert client.recv(1) == b""


def test_a_query_has_its_whole_time_however_long_ago_the_last_one_was(asked):
    assert rows(asked, "select 1", seconds=2) == [(1,)]
    (child,) = children()
    time.sleep(2.1)
    assert rows(asked, "select 2", seconds=2) == [(2,)]
    assert children() == [child]


def test_a_pipe_to_another_process_ends_when_it_is_closed_here(asked):
    # As in subprocess.Popen, which another thread may be in the middle of: it reads until the new process has begun.
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        assert rows(asked, "select 1") == [(1,)]
        os.close(writing)
        assert select.select([pipe], [], [], 5)[0] and pipe.read() == b""
