"""The process that runs models: it keeps two of them, and when it is ended the next request starts another."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.ui.token_process import TokenProcess

IDS = [5, 6, 7, 8]


@pytest.fixture
def process() -> Iterator[TokenProcess]:
    process = TokenProcess()
    yield process
    process.close()


@pytest.fixture
def runs(tmp_path, model) -> list[Path]:
    for name in "abc":
        shutil.copytree(model, tmp_path / name / "model")
    return [tmp_path / name for name in "abc"]


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if any("token_process" in part for part in each.cmdline())]


def compute(process: TokenProcess, run: Path, seconds: float = 120) -> dict[str, list[float]]:
    return process.compute_logps(run, [1, 2], (), {"chosen": IDS}, seconds)


def test_two_models_are_kept_those_used_last(process, runs):
    a, b, c = runs
    first = compute(process, a)
    assert len(first["chosen"]) == len(IDS) and max(first["chosen"]) < 0
    compute(process, b)
    assert compute(process, a) == first and process.models == [b, a]
    compute(process, c)
    assert process.models == [a, c]


def test_a_process_that_was_killed_is_an_error_once(process, runs):
    compute(process, runs[0])
    (child,) = children()
    os.kill(child.pid, signal.SIGSTOP)
    threading.Timer(1, child.kill).start()  # as the system does when memory runs out
    with pytest.raises(ResourceError, match="memory runs out"):
        compute(process, runs[0])
    assert process.models == [] and compute(process, runs[0])


def test_what_takes_too_long_is_ended(process, runs):
    began = time.monotonic()
    with pytest.raises(ResourceError, match="took more than"):
        compute(process, runs[0], seconds=0.1)
    assert time.monotonic() - began < 5 and not children()
    assert compute(process, runs[0])


def test_a_run_without_a_model_is_an_error_and_the_process_stays(process, runs, tmp_path):
    compute(process, runs[0])
    with pytest.raises(UsageError, match="has no model"):
        compute(process, tmp_path / "nothing")
    assert process.models == [runs[0]] and compute(process, runs[0])


def test_a_model_that_was_trained_again_is_loaded_again(process, runs, other_model):
    before = compute(process, runs[0])
    shutil.rmtree(runs[0] / "model")
    shutil.copytree(other_model, runs[0] / "model")
    assert compute(process, runs[0]) != before
