"""The reference behind an OpenAI-compatible completions server that returns log-probs of prompts, such as vLLM's.

Token ids are sent, so the server tokenizes nothing. A server cannot prove which weights it serves, nor in which dtype:
the parity check of `score` against the reference's own files vouches for that, and numerics records what the server
says of itself. Say score.dtype where it serves another than bfloat16, whose tolerance is the widest.
"""

import http.client
import json
import math
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from pipeline.config import Score, Server
from pipeline.errors import IntegrityError, PrefcacheError, UsageError
from pipeline.identity import Reference
from pipeline.schema import Sequence

# Busy, or broken in a way that may pass. Anything else stays as it is however often it is asked.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 60.0  # seconds, unless the server itself asks for more


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    client = Client(score.server)
    return {
        "engine": "server",
        "model": client.model(),
        "version": client.version(),
        "dtype": "bfloat16" if score.dtype == "auto" else score.dtype,
    }


def load(reference: Reference, score: Score) -> "ServerEngine":
    return ServerEngine(score.server)


class ServerEngine:
    def __init__(self, server: Server) -> None:
        self._client = Client(server)
        self._model = self._client.model()
        self._concurrency = server.concurrency
        self._echoes = False  # the server has no prompt_logprobs, and is asked to echo the prompt
        self.facts: dict[str, Any] = {"model": self._model}

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """Many requests at once; the first that fails for good ends the others."""
        failed: list[BaseException] = []

        def score_one(sequence: Sequence) -> np.ndarray:
            if failed:
                return np.empty(0)  # which nobody reads
            try:
                return self._score_one(sequence)
            except BaseException as error:
                # Here, so that this thread begins no other; and the first of them, for those it ends fail of it.
                failed.append(error)
                self._client.stop()
                raise

        with ThreadPoolExecutor(min(self._concurrency, max(len(sequences), 1))) as pool:
            futures = [pool.submit(score_one, sequence) for sequence in sequences]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                if failed:
                    raise failed[0]
                return [future.result() for future in futures]
            except BaseException:
                self._client.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.stop()

    def _score_one(self, sequence: Sequence) -> np.ndarray:
        ids = [*sequence.prompt_ids.tolist(), *sequence.completion_ids.tolist()]
        if not self._echoes:
            choice = self._complete(ids, {"prompt_logprobs": 0, "return_token_ids": True})
            if choice.get("prompt_logprobs") is not None:
                return prompt_logps(choice, ids, len(sequence.prompt_ids))
            self._echoes = True
        choice = self._complete(ids, {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True})
        return echoed_logps(choice, ids, len(sequence.prompt_ids))

    def _complete(self, ids: list[int], how: dict[str, Any]) -> dict[str, Any]:
        # vLLM does not answer without a token of its own, which is thrown away.
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0} | how
        answer = self._client.ask("completions", body)
        try:
            choice = answer["choices"][0]
            assert isinstance(choice, dict)
        except (KeyError, IndexError, TypeError, AssertionError):
            raise _unlike(f"found {str(answer)[:200]}, expected `choices`") from None
        return choice


def prompt_logps(choice: dict[str, Any], ids: list[int], n_prompt: int) -> np.ndarray:
    """From `prompt_logprobs`: one mapping of token ids to log-probs for each token, none for the first."""
    if choice.get("prompt_token_ids") not in (None, ids):
        raise _unlike("its prompt_token_ids are others than those sent")
    entries = choice["prompt_logprobs"]
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise _unlike(f"found {_length(entries)} prompt_logprobs for {len(ids)} tokens")
    logps = []
    for token, entry in zip(ids[n_prompt:], entries[n_prompt:], strict=True):
        if entry is None:
            logps.append(math.nan)
        elif isinstance(entry, dict) and isinstance(entry.get(str(token)), dict):
            logps.append(_number(entry[str(token)].get("logprob")))
        else:
            raise _unlike(f"no log-prob of token {token} where it was sent; found {str(entry)[:200]}")
    return np.array(logps, dtype=np.float32)


def echoed_logps(choice: dict[str, Any], ids: list[int], n_prompt: int) -> np.ndarray:
    """From an echo: the tokens sent, and perhaps one more, each with its log-prob."""
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    values = logprobs.get("token_logprobs")
    if not isinstance(values, list) or not len(ids) <= len(values) <= len(ids) + 1:
        raise _unlike(
            f"found {_length(values)} log-probs for {len(ids)} tokens, with prompt_logprobs and with echo. The server must "
            "return log-probs of prompts, as `vllm serve` does"
        )
    for token, said in zip(ids, logprobs.get("tokens") or [], strict=False):
        if isinstance(said, str) and said.startswith("token_id:") and said != f"token_id:{token}":
            raise _unlike(f"it gave {said} where token {token} was sent")
    return np.array([_number(value) for value in values[n_prompt : len(ids)]], dtype=np.float32)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unlike(f"a log-prob is {str(value)[:50]!r}")
    return float(value)


def _length(values: Any) -> str:
    return str(len(values)) if isinstance(values, list) else "no"


def _unlike(found: str) -> IntegrityError:
    return IntegrityError(f"score.server answered with something else than log-probs of the tokens sent: {found}.")


class Client:
    """Asks a server, patiently: what may pass is tried again after longer and longer pauses."""

    def __init__(self, server: Server) -> None:
        if not server.url or urlsplit(server.url).scheme not in ("http", "https"):
            raise UsageError(
                f"score.server.url is {server.url}; expected where a completions server answers, such as "
                "http://localhost:8000/v1."
            )
        self._server, self._url = server, server.url.rstrip("/")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()

    def model(self) -> str:
        """The name that the config says, or the only one that is served."""
        if self._server.model:
            return self._server.model
        listed = self.ask("models").get("data")
        names = [str(each.get("id")) for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        if len(names) != 1:
            raise UsageError(
                f"{self._url} serves {', '.join(names) or 'no model that it names'}; expected one. Say which with "
                "score.server.model."
            )
        return names[0]

    def version(self) -> str:
        """What the server says of its version; vLLM does, beside its API."""
        scheme, host, path, _, _ = urlsplit(self._url)
        beside = urlunsplit((scheme, host, path.removesuffix("/v1") + "/version", "", ""))
        try:
            return str(json.loads(self._patiently(beside, None))["version"])
        except (urllib.error.HTTPError, ValueError, KeyError, TypeError):
            return "unknown"

    def stop(self) -> None:
        """No further tries."""
        self._stopped.set()

    def ask(self, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            return _parsed(self._patiently(f"{self._url}/{what}", data))
        except urllib.error.HTTPError as error:
            raise self._refused(error.code, _said(error)) from None

    def _patiently(self, url: str, data: bytes | None) -> bytes:
        """The answer; HTTPError where asking again would not help."""
        for attempt in range(self._server.retries + 1):
            try:
                return self._send(url, data)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING:
                    raise
                trouble, wait = f"HTTP {error.code}: {_said(error)}", _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                trouble, wait = f"{type(reason).__name__}: {reason}", None
            if attempt < self._server.retries and self._stopped.wait(_pause(attempt) if wait is None else wait):
                break
        raise UsageError(
            f"{self._url} gave no answer in {attempt + 1} tries ({trouble}). See whether the server runs, or raise "
            "score.server.timeout or score.server.retries, or lower score.server.concurrency. What is finished is kept."
        )

    def _send(self, url: str, data: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._server.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, data, headers)
        with self._opener.open(request, timeout=self._server.timeout) as answer:
            return bytes(answer.read())

    def _refused(self, code: int, said: str) -> PrefcacheError:
        if code in (401, 403):
            hint = f"Put the server's key into the environment variable {self._server.key_variable}."
        elif code == 404:
            hint = "See score.server.url, which usually ends with /v1, and score.server.model."
        else:
            hint = "A sequence and one token more must fit the server's longest; see also score.server.model."
        return UsageError(f"{self._url} refused with HTTP {code}: {said}. {hint}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn what is sent into a bare GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        raise _unlike(f"found {body[:100]!r}, expected JSON") from None
    if not isinstance(answer, dict):
        raise _unlike(f"found {str(answer)[:100]}, expected a JSON object")
    return answer


def _said(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        body = ""
    return " ".join(body.split())[:300] or error.reason


def _pause(attempt: int) -> float:
    # Not all at the same moment again.
    return min(0.5 * 2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _retry_after(said: str | None) -> float | None:
    """Seconds that the server asks for, said as such or as a date."""
    if said is None:
        return None
    try:
        seconds = float(said) if said.strip().isdigit() else parsedate_to_datetime(said).timestamp() - time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), 3600.0)
