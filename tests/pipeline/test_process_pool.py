"""Every task is done once, by as many processes as asked for; what goes wrong in one of them reaches the caller."""

import multiprocessing
import os
import signal
import time
from itertools import count

import pytest

from prefcache.pipeline import process_pool
from prefcache.pipeline.errors import DataError, ResourceError

ME = os.getpid()


def start():
    """A worker that says who it is, and how many tasks it had before."""
    numbers = count()
    return lambda n: (n * n, os.getpid(), next(numbers))


def start_slow():
    return lambda n: time.sleep(0.01)


def start_failing():
    return fail_at_3


def fail_at_3(n):
    if n == 3:
        raise DataError("task 3 is bad. Mend it.")
    return n


def start_killed():
    return lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 3 else n


def start_environment():
    return lambda name: (os.environ.get(name), signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


def tasks(n: int):
    return ((i,) for i in range(n))


def no_worker_is_left() -> bool:
    until = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_every_task_is_done_once(n_workers):
    done = list(process_pool.run(start, tasks(50), n_workers, start()))
    assert sorted(square for square, _, _ in done) == [n * n for n in range(50)]
    processes = {process for _, process, _ in done}
    assert processes == {ME} if n_workers == 1 else ME not in processes and 1 <= len(processes) <= n_workers
    # `start` was called once in each: its tasks are numbered through.
    for process in processes:
        assert sorted(n for _, p, n in done if p == process) == list(range(sum(p == process for _, p, _ in done)))
    assert no_worker_is_left()


@pytest.mark.parametrize("n", [0, 1])
def test_a_single_task_needs_no_other_process(n):
    assert list(process_pool.run(start, tasks(n), 3, start())) == [(0, ME, 0)][:n]


def test_tasks_are_taken_as_they_can_be_worked_on():
    taken = []
    results = process_pool.run(start_slow, ((taken.append(i) or i,) for i in range(1000)), 2, start_slow())
    for n_back in range(1, 6):
        next(results)
        # Never more than two for each of the two workers are in work, waiting or just back.
        assert len(taken) <= n_back + 2 * 2 * 2
    results.close()
    assert len(taken) < 20 and no_worker_is_left()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_of_a_worker_is_the_callers(n_workers):
    with pytest.raises(DataError, match=r"^task 3 is bad\. Mend it\.$") as caught:
        list(process_pool.run(start_failing, tasks(100), n_workers, fail_at_3))
    assert caught.value.exit_code == 3 and no_worker_is_left()


def test_an_error_of_the_tasks_themselves_ends_the_workers():
    def broken():
        yield from tasks(5)
        raise DataError("the source broke off")

    with pytest.raises(DataError, match="broke off"):
        list(process_pool.run(start, broken(), 2, start()))
    assert no_worker_is_left()


def start_busy():
    return busy


def busy(n):
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
    return sum(range(10**11))


@pytest.mark.parametrize(
    ("begin", "sentence"),
    [
        (start_busy, r"cannot be interrupted.*prepare\.chat_template"),
        (start_killed, r"was killed.*fewer workers \(prepare\.workers\)"),
    ],
    ids=["by its timer", "by the system"],
)
def test_a_worker_that_is_killed_is_reported_with_the_remedy(begin, sentence):
    with pytest.raises(ResourceError, match=sentence):
        list(process_pool.run(begin, tasks(100), 2, start()))
    assert no_worker_is_left()


def test_workers_leave_interrupts_to_the_parent_and_keep_to_one_thread():
    names = [("TOKENIZERS_PARALLELISM",), ("RAYON_NUM_THREADS",)] * 2
    done = list(process_pool.run(start_environment, names, 2, start()))
    assert sorted(done) == [("1", True)] * 2 + [("false", True)] * 2


def test_cores_are_those_that_this_process_may_use():
    assert process_pool.cores() == len(os.sched_getaffinity(0))
