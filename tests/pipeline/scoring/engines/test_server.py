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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model

from pipeline.config import Score
from pipeline.errors import IntegrityError, UsageError
from pipeline.identity import Reference
from pipeline.progress import Progress
from pipeline.schema import Sequence
from pipeline.scoring.engines import server
from pipeline.scoring.engines.loading import plain_scores
from pipeline.scoring.scorer import Scorer

ROUNDING = 1e-4  # float32, of log-probs that reach -20

RANDOM = np.random.default_rng(0)


def ids(n: int) -> np.ndarray:
    return RANDOM.integers(3, 300, n).astype(np.int32)


def section(url: str | None, **settings: Any) -> Score:
    return Score(engine="server", server={"url": url, "retries": 2, "timeout": 20} | settings)


# -- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's kernels for CPUs take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = build_model(tmp_path_factory.mktemp("server") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, head_dim=32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command itself does not run in the CPU build, which has another package name.
    command = [
        vllm_python,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny", "--api-key", "secret"]
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


def test_log_probs_of_a_real_server_are_those_of_the_plain_forward(served, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    shared = ids(128)
    sequences = [
        Sequence(shared, ids(9)),
        Sequence(shared, ids(7)),
        Sequence(ids(1), ids(1)),
        Sequence(ids(20), ids(300)),
    ]
    plain = plain_scores(Reference(model), sequences)
    engine = server.load(Reference(model), section(served))
    assert engine.facts == {"model": "tiny"}
    asked_to_echo = server.load(Reference(model), section(served))
    asked_to_echo._echoes = True
    for found in (engine.score(sequences), asked_to_echo.score(sequences)):
        assert all(logps.dtype == np.float32 for logps in found)
        assert [len(logps) for logps in found] == [len(logps) for logps in plain]
        assert np.abs(np.concatenate(found) - np.concatenate(plain)).max() < ROUNDING
    record = server.numerics(Reference(model), section(served, model="tiny"))
    assert record["version"].startswith("0.") and record["dtype"] == "bfloat16"


def test_a_real_server_refuses_a_wrong_key_a_wrong_name_and_a_sequence_that_is_too_long(served, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UsageError, match=r"401.*OPENAI_API_KEY"):
        server.load(Reference(model), section(served))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(UsageError, match=r"404.*score\.server\.model"):
        server.load(Reference(model), section(served, model="other")).score([Sequence(ids(2), ids(2))])
    with pytest.raises(UsageError, match=r"400.*must fit"):
        server.load(Reference(model), section(served)).score([Sequence(ids(500), ids(13))])


# -- faults ----------------------------------------------------------------------------------------------------------


class Faulty:
    """A server that answers with what a test says, one answer after another; the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]] = [right]
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()


def right(asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """Every token's log-prob is minus its id."""
    entries = [None, *({str(token): {"logprob": -token}} for token in asked["prompt"][1:])]
    return 200, {"choices": [{"prompt_logprobs": entries, "prompt_token_ids": asked["prompt"]}]}, {}


def says(code: int, body: Any = "no", **headers: str) -> Callable[..., tuple[int, Any, dict[str, str]]]:
    return lambda asked: (code, body, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture
def faulty() -> Iterator[tuple[Faulty, str]]:
    state = Faulty()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.times.append(time.monotonic())
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
                answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            code, body, headers = answer(asked)
            with state.lock:
                state.under_way -= 1
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


ASKED = Sequence(np.array([5, 6], np.int32), np.array([7, 8], np.int32))
REFERENCE = Reference(Path("unread"))


def score(url: str, sequences: list[Sequence] | None = None, **settings: Any) -> list[list[float]]:
    engine = server.load(REFERENCE, section(url, model="m", **settings))
    return [logps.tolist() for logps in engine.score(sequences or [ASKED])]


def test_what_may_pass_is_tried_again(faulty):
    state, url = faulty
    state.answers = [says(500), says(429), right]
    assert score(url) == [[-7, -8]]
    pauses = np.diff(state.times)
    assert pauses[0] >= 0.25 and pauses[1] >= 0.5  # half of 0.5 and of 1.0 seconds, at least


def test_the_server_says_how_long_to_wait(faulty):
    state, url = faulty
    state.answers = [says(503, Retry_After="2"), right]
    assert score(url) == [[-7, -8]]
    assert np.diff(state.times)[0] >= 2


def test_a_slow_answer_and_half_an_answer_are_asked_for_again(faulty):
    state, url = faulty
    state.answers = [lambda asked: time.sleep(1.5) or right(asked), says(200, b"{", Content_Length="9"), right]
    assert score(url, timeout=1) == [[-7, -8]]
    assert len(state.times) == 3


def test_after_the_last_try_the_error_says_what_the_server_said(faulty):
    state, url = faulty
    state.answers = [says(500, {"error": "out of cheese"})]
    with pytest.raises(UsageError, match=r"3 tries \(HTTP 500.*out of cheese.*score\.server\.retries"):
        score(url)
    assert len(state.times) == 3


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9/v1 gave no answer in 1 tries \(ConnectionRefused"):
        score("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UsageError, match=r"score\.server\.url is None; expected"):
        score(None)


@pytest.mark.parametrize("code", [400, 401, 404, 422, 302])
def test_what_cannot_get_better_is_asked_once(faulty, code):
    state, url = faulty
    state.answers = [says(code, "never", Location="http://127.0.0.1:9/")]
    with pytest.raises(UsageError, match=f"refused with HTTP {code}.*never"):
        score(url)
    assert len(state.times) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "expected JSON"),
        ({"hello": 1}, "expected `choices`"),
        ({"choices": [{"prompt_logprobs": [None, {"6": {"logprob": -6}}]}]}, "2 prompt_logprobs for 4 tokens"),
        (
            {"choices": [{"prompt_logprobs": [None, *({"6": {"logprob": -6}} for _ in range(3))]}]},
            "no log-prob of token 7",
        ),
        ({"choices": [{"prompt_logprobs": [], "prompt_token_ids": [5, 6, 7, 9]}]}, "others than those sent"),
        ({"choices": [{"text": "hi", "logprobs": None}]}, "no log-probs for 4 tokens"),
        ({"choices": [{"logprobs": {"token_logprobs": [None, -6, -7]}}]}, "3 log-probs for 4 tokens"),
        (
            {"choices": [{"logprobs": {"token_logprobs": [None, -6, -7, -8], "tokens": ["token_id:4"] * 4}}]},
            "token_id:4 where token 5 was sent",
        ),
        ({"choices": [{"logprobs": {"token_logprobs": [None, -6, "x", -8]}}]}, "a log-prob is 'x'"),
    ],
)
def test_an_answer_to_something_else_is_refused(faulty, answer, message):
    state, url = faulty
    state.answers = [says(200, answer)]
    with pytest.raises(IntegrityError, match=message):
        score(url)


def test_values_that_are_not_finite_are_passed_on(faulty):
    state, url = faulty
    entries = [None, None, {"7": {"logprob": float("-inf")}}, {"8": {"logprob": float("nan")}}]
    state.answers = [says(200, {"choices": [{"prompt_logprobs": entries}]})]
    found = score(url)[0]
    assert found[0] == -np.inf and np.isnan(found[1])


def test_no_more_requests_are_under_way_than_allowed_and_answers_keep_their_order(faulty):
    state, url = faulty
    sequences = [Sequence(np.array([3]), np.array([4 + i])) for i in range(12)]
    state.answers = [lambda asked: time.sleep(0.3 - 0.02 * asked["prompt"][-1]) or right(asked)]
    assert score(url, sequences, concurrency=3) == [[-4 - i] for i in range(12)]
    assert state.most_under_way == 3


@pytest.mark.parametrize("first", [400, 503], ids=["at once", "while the first waits to ask again"])
def test_one_failure_ends_the_other_requests(faulty, first):
    state, url = faulty
    answers = {400: says(400), 503: says(503, Retry_After="600")}
    state.answers = [answers.pop(first), *answers.values()]
    began = time.monotonic()
    with pytest.raises(UsageError):
        score(url, [ASKED] * 50, concurrency=4)
    assert time.monotonic() - began < 5 and len(state.times) <= 5


def test_a_server_of_other_weights_is_told_what_a_server_can_be_told():
    scorer = Scorer(
        section("http://x/v1"), REFERENCE, {"engine": "server", "dtype": "float32"}, None, None, Progress(True)
    )
    engine = server.load(REFERENCE, section("http://x/v1", model="m"))
    with pytest.raises(IntegrityError, match=r"up to 1 nats.*serves these very weights") as raised:
        scorer._compared(engine, [np.array([-1.0, -2.0])], [np.array([-1.0, -3.0])])
    assert "score.rows" not in str(raised.value)
    with pytest.raises(IntegrityError, match=r"no finite log-prob of 1 of 1 sequences"):
        scorer._compared(engine, [np.array([-1.0, np.nan])], [np.array([-1.0, -3.0])])
    # A value where the reference has none.
    with pytest.raises(IntegrityError, match=r"up to inf nats"):
        scorer._compared(engine, [np.array([-1.0, -2.0])], [np.array([-1.0, np.nan])])
