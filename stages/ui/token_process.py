"""Decode tokens and run trained models in a process of their own, so that the server loads neither tokenizers nor PyTorch.

Requests and answers are lines of JSON. The process keeps the models that it loaded last, ends with the server in whatever way
that ends, and is killed when an answer takes too long.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefcache import example_tokens
from prefcache.pipeline.errors import PrefcacheError, ResourceError, UsageError

MOST_MODELS = 2  # in memory at once
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from prefcache.ui import token_process
token_process.serve(sys.stdin, sys.stdout)
"""
_ERRORS = {error.kind: error for error in (UsageError, ResourceError)}


class TokenProcess:
    """A process that answers one request at a time. It starts with the first one, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.models: list[Path] = []  # the runs whose models it holds

    def open(self, experiment: Path) -> None:
        """Start to load an experiment's tokenizer, and do not wait for it."""
        with self._lock:
            self._process = self._process or _start()
            _send(self._process, {"do": "open", "experiment": str(experiment)})

    def decode(
        self, experiment: Path, answers: Mapping[str, Sequence[int]], seconds: float
    ) -> dict[str, list[str]] | None:
        """Return the text of each token of these answers; None if this machine lacks their tokenizer."""
        request = {"do": "decode", "experiment": str(experiment), "answers": _to_lists(answers)}
        texts: dict[str, list[str]] | None = self._ask(request, seconds)["texts"]
        return texts

    def compute_logps(
        self,
        run: Path,
        prompt: Sequence[int],
        images: Sequence[bytes],
        answers: Mapping[str, Sequence[int]],
        seconds: float,
    ) -> dict[str, list[float]]:
        """Return the log-prob that a run's model gives each token of these answers to a prompt, loading the model if need be."""
        request = {"do": "compute", "run": str(run), "prompt": list(map(int, prompt)), "answers": _to_lists(answers)}
        request["images"] = [image.hex() for image in images]
        answer = self._ask(request, seconds)
        self.models = [Path(each) for each in answer["models"]]
        logps: dict[str, list[float]] = answer["logps"]
        return logps

    def close(self) -> None:
        process, self._process, self.models = self._process, None, []
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        with self._lock:
            process = self._process = self._process or _start()
            try:
                answer = _exchange(process, request, time.monotonic() + seconds)
            except TimeoutError:
                self.close()
                raise ResourceError(f"It took more than {seconds:g} s and was ended.") from None
            except (OSError, EOFError):
                self.close()
                raise ResourceError(
                    "The process that computes it was ended, as the system does when memory runs out."
                ) from None
            except BaseException:
                self.close()  # its answer would be taken for that to the next request
                raise
        if error := answer.get("error"):
            raise _ERRORS.get(answer["kind"], PrefcacheError)(error)
        return answer


def _to_lists(answers: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(map(int, ids)) for name, ids in answers.items()}


def _start() -> subprocess.Popen[bytes]:
    # -P: the working folder may hold anything, such as a json.py.
    command = [sys.executable, "-P", "-c", _START, json.dumps([each for each in sys.path if isinstance(each, str)])]
    # A model that trained here is here: nothing is fetched.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **offline}
    )


def _exchange(process: "subprocess.Popen[bytes]", request: dict[str, Any], until: float) -> dict[str, Any]:
    """Send a request and read the answer, a line, by its time."""
    _send(process, request)
    assert process.stdout is not None
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(until - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        part = os.read(process.stdout.fileno(), 1 << 20)
        if not part:
            raise EOFError
        parts.append(part)
    answer: dict[str, Any] = json.loads(b"".join(parts))
    return answer


def _send(process: "subprocess.Popen[bytes]", request: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()


# -- in the process --------------------------------------------------------------------------------------------------


def serve(requests: Any, answers: Any) -> None:
    """Answer requests until the server closes the pipe."""
    # What libraries print must not get between the answers.
    pipe, sys.stdout = os.fdopen(os.dup(answers.fileno()), "w"), open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()
    worker = _Worker()
    while True:
        request = json.loads(lines.get())
        answer = worker.answer(request)
        if request["do"] != "open":
            print(json.dumps(answer), file=pipe, flush=True)


def _read(requests: Any, lines: "queue.SimpleQueue[str]") -> None:
    for line in requests:
        lines.put(line)
    os._exit(0)  # even while a model computes: nobody waits for it


class _Worker:
    """What the process keeps between requests."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, tuple[list[str], Any]] = OrderedDict()  # by run, with the stamps of its files
        self._encoders: dict[str, Any] = {}
        self._do: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "open": lambda request: self._decode(request | {"answers": {}}),
            "decode": self._decode,
            "compute": self._compute,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._do[request["do"]](request)
        except PrefcacheError as error:
            return {"error": str(error), "kind": error.kind}
        except ModuleNotFoundError as error:
            return {"error": f"{error.name} is not installed, and the model needs it.", "kind": "usage"}
        except Exception as error:
            return _describe(error)

    def _decode(self, request: dict[str, Any]) -> dict[str, Any]:
        folder = request["experiment"]
        if folder not in self._encoders:
            tokenizer = example_tokens.find_tokenizer(Path(folder))
            if tokenizer is None:
                return {"texts": None}  # and look again next time
            self._encoders[folder] = example_tokens.load_encoder(tokenizer)
        encoder = self._encoders[folder]
        return {"texts": {name: encoder.token_texts(ids) for name, ids in request["answers"].items()}}

    def _compute(self, request: dict[str, Any]) -> dict[str, Any]:
        model = self._load(request["run"])
        image_ids = list(map(bytes.fromhex, request["images"]))
        images = example_tokens.open_images(Path(request["run"]), image_ids)
        logps = example_tokens.compute_logps(model, request["prompt"], request["answers"], image_ids, images)
        return {"logps": {name: each.tolist() for name, each in logps.items()}, "models": list(self._models)}

    def _load(self, run: str) -> Any:
        if not (Path(run) / example_tokens.MODEL).is_dir():
            raise UsageError(f"{run} has no model: the run is not finished, or the model was removed.")
        stamps = example_tokens.find_policy(Path(run)).stamps()
        if run not in self._models or self._models[run][0] != stamps:
            self._models.pop(run, None)
            while len(self._models) >= MOST_MODELS:
                self._models.popitem(last=False)
            self._models[run] = stamps, example_tokens.load_policy(Path(run))
        self._models.move_to_end(run)
        return self._models[run][1]


def _describe(error: Exception) -> dict[str, Any]:
    from prefcache.pipeline.model.oom import is_out_of_memory

    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return {"error": "The model does not fit into this machine's memory.", "kind": "resource"}
    return {"error": f"{type(error).__name__}: {error}", "kind": ""}
