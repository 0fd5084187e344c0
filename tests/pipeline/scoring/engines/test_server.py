"""A real vLLM server for the values, and a small server of our own for the faults that a real one has by chance."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import score_plainly
from prefcache.pipeline.scoring.engines import server

ROUNDING = 1e-4  # float32, of log-probs that reach -20

RANDOM = np.random.default_rng(0)


def ids(n: int) -> np.ndarray:
    return RANDOM.integers(3, 300, n).astype(np.int32)


def section(url: str | None, **settings: Any) -> Score:
    return Score(engine="server", server={"url": url, "retries": 2, "timeout": 20} | settings)


# -- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(vllm_model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command itself does not run in the CPU build, which has another package name.
    options = {"model": vllm_model, "host": "127.0.0.1", "port": port, "dtype": "float32", "served-model-name": "tiny"}
    command = [vllm_python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--api-key", "secret"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    log = tmp_path_factory.mktemp("served") / "log"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + 300
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.mark.slow  # vLLM takes a minute or two to start
def test_log_probs_of_a_real_server_are_those_of_the_plain_forward(served, vllm_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    shared = ids(128)
    sequences = [
        TokenSequence(shared, ids(9)),
        TokenSequence(shared, ids(7)),
        TokenSequence(ids(1), ids(1)),
        TokenSequence(ids(20), ids(300)),
    ]
    plain = score_plainly(Reference(vllm_model), sequences)
    engine = server.ServerEngine(Reference(vllm_model), section(served))
    assert engine.facts == {"model": "tiny"}
    echoing = server.ServerEngine(Reference(vllm_model), section(served))
    echoing._must_echo = True
    for found in (engine.score(sequences), echoing.score(sequences)):
        assert all(logps.dtype == np.float32 for logps in found)
        assert [len(logps) for logps in found] == [len(logps) for logps in plain]
        assert np.abs(np.concatenate(found) - np.concatenate(plain)).max() < ROUNDING
    record = server.numerics(Reference(vllm_model), section(served, model="tiny"))
    assert record["version"].startswith("0.") and record["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_real_server_refuses_a_wrong_key_a_wrong_name_and_a_sequence_that_is_too_long(
    served, vllm_model, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UsageError, match=r"401.*OPENAI_API_KEY"):
        server.ServerEngine(Reference(vllm_model), section(served))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(UsageError, match=r"404.*score\.server\.model"):
        server.ServerEngine(Reference(vllm_model), section(served, model="other")).score(
            [TokenSequence(ids(2), ids(2))]
        )
    with pytest.raises(UsageError, match=r"400.*must fit"):
        server.ServerEngine(Reference(vllm_model), section(served)).score([TokenSequence(ids(500), ids(13))])


# -- faults ----------------------------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]


class Faulty:
    """A server that replies as a test says, one answer after another; the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [right]
        self.times: list[float] = []
        self.pending = self.most_pending = 0
        self.lock = threading.Lock()

    def reply(self, request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        with self.lock:
            self.times.append(time.monotonic())
            self.pending += 1
            self.most_pending = max(self.most_pending, self.pending)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        try:
            return answer(request)
        finally:
            with self.lock:
                self.pending -= 1


def right(request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """Every token's log-prob is minus its id."""
    entries = [None, *({str(token): {"logprob": -token}} for token in request["prompt"][1:])]
    return 200, {"choices": [{"prompt_logprobs": entries, "prompt_token_ids": request["prompt"]}]}, {}


def says(code: int, body: Any = "no", **headers: str) -> Answer:
    return lambda request: (code, body, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture
def faulty() -> Iterator[tuple[Faulty, str]]:
    state = Faulty()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            code, body, headers = state.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            with contextlib.suppress(OSError):
                self.send_response(code)
                for name, value in ({"Content-Length": str(len(sent))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state, f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


SEQUENCE = TokenSequence(np.array([5, 6], np.int32), np.array([7, 8], np.int32))


def score(url: str | None, sequences: Sequence[TokenSequence] = (SEQUENCE,), **settings: Any) -> list[list[float]]:
    engine = server.ServerEngine(Reference(Path("unread")), section(url, model="m", **settings))
    return [logps.tolist() for logps in engine.score(sequences)]


@pytest.mark.parametrize(
    ("answers", "pauses"),
    [
        ([says(500), says(429), right], [0.25, 0.5]),  # half of 0.5 and of 1.0 seconds, at least
        ([says(503, Retry_After="2"), right], [2]),
        # A slow reply, and half a reply.
        ([lambda request: time.sleep(1.5) or right(request), says(200, b"{", Content_Length="9"), right], [1, 0.5]),
    ],
)
def test_transient_failures_are_retried_after_a_pause(faulty, answers, pauses):
    state, url = faulty
    state.answers = answers
    assert score(url, timeout=1) == [[-7, -8]]
    assert (np.diff(state.times) >= pauses).all()


def test_after_the_last_try_the_error_quotes_the_server(faulty):
    state, url = faulty
    state.answers = [says(500, {"error": "out of cheese"})]
    with pytest.raises(UsageError, match=r"3 tries \(HTTP 500.*out of cheese.*score\.server\.retries"):
        score(url)
    assert len(state.times) == 3


def test_a_missing_server_is_named():
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9/v1 did not reply in 1 tries \(ConnectionRefused"):
        score("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UsageError, match=r"score\.server\.url is None; expected"):
        score(None)


@pytest.mark.parametrize("code", [400, 401, 404, 422, 302])
def test_permanent_failures_are_not_retried(faulty, code):
    state, url = faulty
    state.answers = [says(code, "never", Location="http://127.0.0.1:9/")]
    with pytest.raises(UsageError, match=f"refused with HTTP {code}.*never"):
        score(url)
    assert len(state.times) == 1


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [fields]}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"<html>", "expected JSON"),
        ({"hello": 1}, "expected `choices`"),
        (choice(prompt_logprobs=[None, {"6": {"logprob": -6}}]), "2 prompt_logprobs for 4 tokens"),
        (choice(prompt_logprobs=[None, *[{"6": {"logprob": -6}}] * 3]), "no log-prob of token 7"),
        (choice(prompt_logprobs=[], prompt_token_ids=[5, 6, 7, 9]), "differ from those sent"),
        (choice(text="hi", logprobs=None), "no log-probs for 4 tokens"),
        (choice(logprobs={"token_logprobs": [None, -6, -7]}), "3 log-probs for 4 tokens"),
        (
            choice(logprobs={"token_logprobs": [None, -6, -7, -8], "tokens": ["token_id:4"] * 4}),
            "token_id:4 where token 5 was sent",
        ),
        (choice(logprobs={"token_logprobs": [None, -6, "x", -8]}), "a log-prob is 'x'"),
    ],
)
def test_a_reply_about_other_tokens_is_refused(faulty, reply, message):
    state, url = faulty
    state.answers = [says(200, reply)]
    with pytest.raises(IntegrityError, match=message):
        score(url)


def test_log_probs_that_are_not_finite_are_passed_on(faulty):
    state, url = faulty
    entries = [None, None, {"7": {"logprob": float("-inf")}}, {"8": {"logprob": float("nan")}}]
    state.answers = [says(200, choice(prompt_logprobs=entries))]
    logps = score(url)[0]
    assert logps[0] == -np.inf and np.isnan(logps[1])


def test_concurrency_is_limited_and_replies_keep_their_order(faulty):
    state, url = faulty
    sequences = [TokenSequence(np.array([3]), np.array([4 + i])) for i in range(12)]
    state.answers = [lambda request: time.sleep(0.3 - 0.02 * request["prompt"][-1]) or right(request)]
    assert score(url, sequences, concurrency=3) == [[-4 - i] for i in range(12)]
    assert state.most_pending == 3


@pytest.mark.parametrize("first", [400, 503], ids=["at once", "while the first one waits to retry"])
def test_one_failure_ends_the_other_requests(faulty, first):
    state, url = faulty
    answers = {400: says(400), 503: says(503, Retry_After="600")}
    state.answers = [answers.pop(first), *answers.values()]
    began = time.monotonic()
    with pytest.raises(UsageError):
        score(url, [SEQUENCE] * 50, concurrency=4)
    assert time.monotonic() - began < 5 and len(state.times) <= 5
