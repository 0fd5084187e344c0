"""The reference behind an OpenAI-compatible completions server that returns log-probs of prompts, such as vLLM's.

Token ids are sent, so the server tokenizes nothing. A server cannot prove which weights it serves, nor their dtype: only
the parity check of `score` against the reference's own files vouches for that, and numerics records what the server
reports about itself. Set score.dtype if it serves anything but bfloat16, whose tolerance is the widest.
"""

import http.client
import json
import math
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from prefcache.pipeline.config import Score, Server
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.progress import counting
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.engines import EngineSpec, Interpreter, refuse_images

# Busy, or broken in a way that may pass. Other codes stay the same however often one asks.
_TRANSIENT_CODES = {408, 425, 429, 500, 502, 503, 504}
_MAX_PAUSE = 60.0  # seconds, unless the server itself asks for more


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    client = Client(score.server)
    return {
        "engine": "server",
        "model": client.model(),
        "version": client.version(),
        "dtype": "bfloat16" if score.dtype == "auto" else score.dtype,
    }


class ServerEngine:
    def __init__(self, reference: Reference, score: Score, images: PromptImages | None = None) -> None:
        refuse_images("server", images)
        self._client = Client(score.server)
        self._model = self._client.model()
        self._concurrency = score.server.concurrency
        self._must_echo = False  # the server has no prompt_logprobs and is asked to echo the prompt
        self.facts: dict[str, Any] = {"model": self._model}

    def score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Send many requests at once; the first one that fails for good ends the others."""
        failures: list[BaseException] = []

        def score_unless_failed(sequence: TokenSequence) -> np.ndarray:
            if failures:
                return np.empty(0)  # never read
            try:
                logps = self._score(sequence)
                counter.add(1)
                return logps
            except BaseException as error:
                # Recorded in this thread, so that it starts no other request. The first failure is the cause: those of
                # the requests that it ends only follow from it.
                failures.append(error)
                self._client.stop()
                raise

        with (
            counting("the server", len(sequences), "sequences") as counter,
            ThreadPoolExecutor(min(self._concurrency, max(len(sequences), 1))) as pool,
        ):
            futures = [pool.submit(score_unless_failed, sequence) for sequence in sequences]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                if failures:
                    raise failures[0]
                return [future.result() for future in futures]
            except BaseException:
                self._client.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.stop()

    def _score(self, sequence: TokenSequence) -> np.ndarray:
        ids = [*sequence.prompt_ids.tolist(), *sequence.completion_ids.tolist()]
        if not self._must_echo:
            choice = self._complete(ids, {"prompt_logprobs": 0, "return_token_ids": True})
            if choice.get("prompt_logprobs") is not None:
                return parse_prompt_logps(choice, ids, len(sequence.prompt_ids))
            self._must_echo = True
        choice = self._complete(ids, {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True})
        return parse_echoed_logps(choice, ids, len(sequence.prompt_ids))

    def _complete(self, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        # vLLM does not reply without a token of its own, which is thrown away.
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0} | options
        reply = self._client.ask("completions", body)
        try:
            choice = reply["choices"][0]
            assert isinstance(choice, dict)
        except (KeyError, IndexError, TypeError, AssertionError):
            raise _unexpected(f"found {str(reply)[:200]}, expected `choices`") from None
        return choice


def parse_prompt_logps(choice: dict[str, Any], ids: list[int], n_prompt: int) -> np.ndarray:
    """Read `prompt_logprobs`: for each token a mapping of token ids to log-probs, for the first token nothing."""
    if choice.get("prompt_token_ids") not in (None, ids):
        raise _unexpected("its prompt_token_ids differ from those sent")
    entries = choice["prompt_logprobs"]
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise _unexpected(f"found {_length(entries)} prompt_logprobs for {len(ids)} tokens")
    logps = []
    for token, entry in zip(ids[n_prompt:], entries[n_prompt:], strict=True):
        if entry is None:
            logps.append(math.nan)
        elif isinstance(entry, dict) and isinstance(entry.get(str(token)), dict):
            logps.append(_parse_logp(entry[str(token)].get("logprob")))
        else:
            raise _unexpected(f"no log-prob of token {token} where it was sent; found {str(entry)[:200]}")
    return np.array(logps, dtype=np.float32)


def parse_echoed_logps(choice: dict[str, Any], ids: list[int], n_prompt: int) -> np.ndarray:
    """Read an echo: each token sent, and perhaps one more, with its log-prob."""
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    values = logprobs.get("token_logprobs")
    if not isinstance(values, list) or not len(ids) <= len(values) <= len(ids) + 1:
        raise _unexpected(
            f"found {_length(values)} log-probs for {len(ids)} tokens, with prompt_logprobs and with echo. The server must "
            "return log-probs of prompts, as `vllm serve` does"
        )
    for token, echoed in zip(ids, logprobs.get("tokens") or [], strict=False):
        if isinstance(echoed, str) and echoed.startswith("token_id:") and echoed != f"token_id:{token}":
            raise _unexpected(f"it returned {echoed} where token {token} was sent")
    return np.array([_parse_logp(value) for value in values[n_prompt : len(ids)]], dtype=np.float32)


def _parse_logp(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unexpected(f"a log-prob is {str(value)[:50]!r}")
    return float(value)


def _length(values: Any) -> str:
    return str(len(values)) if isinstance(values, list) else "no"


def _unexpected(detail: str) -> IntegrityError:
    return IntegrityError(f"score.server did not reply with log-probs of the tokens sent: {detail}.")


class Client:
    """HTTP requests to a server; transient failures are retried after longer and longer pauses."""

    def __init__(self, server: Server) -> None:
        if not server.url or urlsplit(server.url).scheme not in ("http", "https"):
            raise UsageError(
                f"score.server.url is {server.url}; expected the address of a completions server, such as "
                "http://localhost:8000/v1."
            )
        self._server, self._url = server, server.url.rstrip("/")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()

    def model(self) -> str:
        """Return score.server.model, or the name of the only model that is served."""
        if self._server.model:
            return self._server.model
        models = self.ask("models").get("data")
        names = (
            [str(model.get("id")) for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        )
        if len(names) != 1:
            raise UsageError(
                f"{self._url} serves {', '.join(names) or 'no model that it names'}; expected one. Name it in "
                "score.server.model."
            )
        return names[0]

    def version(self) -> str:
        """Return the version that the server reports; vLLM does, next to its API."""
        scheme, host, path, _, _ = urlsplit(self._url)
        url = urlunsplit((scheme, host, path.removesuffix("/v1") + "/version", "", ""))
        try:
            return str(json.loads(self._send_with_retries(url, None))["version"])
        except (urllib.error.HTTPError, ValueError, KeyError, TypeError):
            return "unknown"

    def stop(self) -> None:
        """Stop retrying."""
        self._stopped.set()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            text = self._send_with_retries(f"{self._url}/{path}", data)
        except urllib.error.HTTPError as error:
            hints = {
                401: f"Put the server's key into the environment variable {self._server.key_variable}.",
                404: "See score.server.url, which usually ends with /v1, and score.server.model.",
            }
            hint = hints.get(401 if error.code == 403 else error.code)
            hint = hint or "A sequence plus one token must fit the server's limit; see also score.server.model."
            raise UsageError(f"{self._url} refused with HTTP {error.code}: {_reason(error)}. {hint}") from None
        try:
            reply = json.loads(text)
        except ValueError:
            raise _unexpected(f"found {text[:100]!r}, expected JSON") from None
        if not isinstance(reply, dict):
            raise _unexpected(f"found {str(reply)[:100]}, expected a JSON object")
        return reply

    def _send_with_retries(self, url: str, data: bytes | None) -> bytes:
        """Return the reply; raise HTTPError where another try would not help."""
        for attempt in range(self._server.retries + 1):
            # Random, so that many requests do not all return at the same moment.
            pause = min(0.5 * 2.0**attempt, _MAX_PAUSE) * random.uniform(0.5, 1.0)
            try:
                return self._send(url, data)
            except urllib.error.HTTPError as error:
                if error.code not in _TRANSIENT_CODES:
                    raise
                trouble = f"HTTP {error.code}: {_reason(error)}"
                pause = _retry_after(error.headers.get("Retry-After"), pause)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                trouble = f"{type(reason).__name__}: {reason}"
            if attempt < self._server.retries and self._stopped.wait(pause):
                break
        raise UsageError(
            f"{self._url} did not reply in {attempt + 1} tries ({trouble}). Check that the server runs, raise "
            "score.server.timeout or score.server.retries, or lower score.server.concurrency. Finished shards are kept."
        )

    def _send(self, url: str, data: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._server.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, data, headers)
        with self._opener.open(request, timeout=self._server.timeout) as response:
            return bytes(response.read())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, which would carry the key to another host and turn a POST into a bare GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        body = ""
    return " ".join(body.split())[:300] or error.reason


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds that the server asks for, as a number or as a date."""
    try:
        if header is None:
            return default
        seconds = float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time()
    except ValueError:
        return default
    return min(max(seconds, 0.0), 3600.0)


SPEC = EngineSpec(
    numerics=numerics,
    load=ServerEngine,
    remedy="Check that it serves exactly these weights, and in which dtype (score.dtype), or try score.engine=transformers.",
    packages=(),  # a run with nothing to score asks the server nothing
    interpreter=lambda score: Interpreter("", f"the server at {score.server.url}"),
    is_remote=True,
)
