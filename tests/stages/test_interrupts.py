"""Whenever SIGINT, SIGTERM or SIGHUP comes, the command ends with 130 and one sentence."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefcache.interrupts import SENTENCE
from tests.helpers.project import PREFCACHE, has_handlers, invoke, start, write_config, write_pairs
from tests.helpers.store_proxy import Fault, Request, Rule

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def interrupted(sent: signal.Signals, after: float, *command, **options) -> tuple[int, str]:
    """How a command ends that gets a signal so many seconds after its first lines."""
    child = start(*command, **PIPES, **options)
    while child.poll() is None and not has_handlers(child):
        time.sleep(0.001)
    time.sleep(after)
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    return child.returncode, said


def check(code: int, said: str) -> None:
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert code in (0, 130), said
    assert said.endswith(f"error: {SENTENCE}\n") == (code == 130), (code, said)


@pytest.mark.parametrize("sent", SIGNALS)
def test_at_any_moment_of_a_command_it_ends_with_130_or_had_ended(tmp_path, model, sent):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    config = write_config(tmp_path, model)
    dice, codes = random.Random(int(sent)), []
    for n in range(4):
        arguments = ("prepare", config, "--quiet") if n % 2 else ("losses",)
        moment = 0.0 if n == 0 else dice.uniform(0, 1.5 if n % 2 else 0.3)
        codes.append(interrupted(sent, moment, PREFCACHE, *arguments, cwd=tmp_path))
        check(*codes[-1])
    assert codes[0][0] == 130


HANGS = {
    "sql": lambda request: request.kind == "list",
    "score": lambda request: request.method == "PUT" and ".parquet" in request.path,
    "train": lambda request: request.kind == "get" and re.search(r"[0-9a-f]{32}\.json", request.path),
    "verify": lambda request: request.kind == "get" and ".parquet" in request.path,
}


@pytest.mark.slow  # five commands that load PyTorch; one request, and several at once, are asked below
@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("sql", signal.SIGINT),
        ("score", signal.SIGINT),
        ("score", signal.SIGTERM),
        ("train", signal.SIGTERM),
        ("verify", signal.SIGINT),
    ],
)
def test_a_store_that_does_not_answer_delays_no_command(prepared, s3, tmp_path, command, sent):
    config = ["config.yaml", "--set", f"cache={s3.url}"]
    if command != "score":
        invoke(tmp_path, "score", *config)
        shutil.rmtree(s3.mirror)
    arguments = {"sql": ["select * from reference", "runs/tiny"], "verify": [s3.url]}.get(command, config)
    is_asked = threading.Event()

    def hangs(request: Request) -> bool:
        if HANGS[command](request):
            is_asked.set()
        return is_asked.is_set()  # also whatever the command asks afterwards

    with s3.through_proxy([Rule(Fault.HANGING, when=hangs, seconds=60)]) as proxy:
        store = s3.environment_of(proxy.url, s3.mirror)
        child = start(PREFCACHE, command, *arguments, cwd=tmp_path, env={**os.environ, **store}, **PIPES)
        assert is_asked.wait(60), child.communicate()
        time.sleep(0.2)
        begun = time.monotonic()
        child.send_signal(sent)
        _, said = child.communicate(timeout=60)
    assert time.monotonic() - begun < 10, said  # of which PyTorch takes some to be unloaded where the machine is busy
    assert child.returncode == 130
    check(child.returncode, said)


READY = """
import atexit, threading, time
from prefcache import interrupts
interrupts.install()
def sleep():
    # In short steps: a signal just before a system call does not end that call early.
    for _ in range(600):
        time.sleep(0.1)
def wait():
    print(flush=True)
    sleep()
def wait_in_thread():
    time.sleep(0.5)  # until the main thread waits
    wait()
class Slow:
    def __del__(self):
        wait()
def command():
"""
COMMAND = """
try:
    with interrupts.raise_signals():
        command()
except KeyboardInterrupt:
    print("error:", interrupts.SENTENCE, file=__import__("sys").stderr)
    raise SystemExit(130)
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        # A destructor, where an exception would only be printed.
        (signal.SIGINT, "slow = Slow(); del slow; sleep()"),
        # A library that makes an error of its own of it.
        (signal.SIGHUP, "import odd"),
        # When the command is done.
        (signal.SIGTERM, "threading.Thread(target=wait_in_thread).start()"),
        # A thread that outlives the command.
        (signal.SIGTERM, "threading.Thread(target=wait_in_thread).start(); sleep()"),
        (signal.SIGINT, "atexit.register(wait)"),
    ],
    ids=["destructor", "another error", "threads at the end", "a thread that stays", "exit"],
)
def test_nothing_swallows_it(tmp_path, sent, code):
    odd = "import time\ntry:\n  print(flush=True); time.sleep(60)\nexcept BaseException: raise ImportError('odd')"
    (tmp_path / "odd.py").write_text(odd)
    script = f"{READY}    {code}\n{COMMAND}"
    child = start(sys.executable, "-c", script, env=environment(tmp_path), **PIPES)
    child.stdout.readline()
    child.send_signal(sent)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    check(child.returncode, said)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_store_that_does_not_answer_delays_it_little(tmp_path, names):
    with socket.create_server(("127.0.0.1", 0)) as server:  # its connections are made, and nobody reads them
        store = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "AWS_ACCESS_KEY_ID": "a"}
        code = "store = ObjectStore('s3://bucket/refs'); print(flush=True); list(store.parallel(store.get, NAMES))"
        script = f"{READY}    {code.replace('NAMES', repr(names))}\n{COMMAND}"
        script = f"from prefcache.pipeline.stored.object_store import ObjectStore\n{script}"
        secret = {"AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        child = start(sys.executable, "-c", script, env=environment(tmp_path) | store | secret, **PIPES)
        child.stdout.readline()
        server.accept()[0].recv(1)  # the request is under way
        begun = time.monotonic()
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 130 and time.monotonic() - begun < 3
    check(child.returncode, said)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_what_was_ignored_stays_ignored(tmp_path):
    # nohup ignores SIGHUP, and a background job of a script SIGINT.
    sends = "for n in (signal.SIGHUP, signal.SIGINT): os.kill(os.getpid(), n)"
    script = f"import os, signal\nfrom prefcache import interrupts\ninterrupts.install()\n{sends}\nprint('done')"
    ignored = subprocess.run(
        ["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", sys.executable, "-c", script],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (ignored.returncode, ignored.stdout, ignored.stderr) == (0, "done\n", "")
