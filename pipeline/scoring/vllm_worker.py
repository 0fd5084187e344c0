"""vLLM in a process of its own: what pipeline/scoring/engines/vllm.py starts, in the environment that vLLM lives in.

Only the standard library, numpy and vllm are imported. Start it with `python -P`: this folder has files named like
packages. Requests come and answers go over one socket, each a line of JSON and then bytes:

    {"ask": "open", ...}                          -> {"runner": ..., ...}
    {"ask": "score", "n_prompt", "n_tokens"} ids  -> {"n_logps", "asked_again"} ids as vLLM saw them, log-probs
    {"ask": "close"}

When the other side is gone, however it went, this process and all that vLLM has started are killed.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np


class Asked(NamedTuple):
    """One sequence, as ids, and where its completion begins."""

    ids: np.ndarray
    n_prompt: int


class Model:
    """A loaded model that gives log-probs of completions."""

    def __init__(self, options: dict[str, Any], suffix_call: bool, prefix_caching: bool) -> None:
        # vLLM takes many seconds to import; a process that only ends need not wait for it.
        from vllm import LLM

        self._llm: Any = LLM(**options)
        self._suffix_call, self._prefix_caching = suffix_call, prefix_caching
        settings = self._llm.llm_engine.vllm_config
        self.facts = {
            "runner": "v2" if getattr(settings, "use_v2_model_runner", False) else "v1",
            "head_dtype": str(getattr(settings.model_config, "head_dtype", settings.model_config.dtype)).split(".")[-1],
            "kv_block": settings.cache_config.block_size,
        }

    def score(self, n_prompt: list[int], n_tokens: list[int], body: bytes) -> tuple[dict[str, Any], bytes]:
        ids = np.split(np.frombuffer(body, dtype=np.int32), np.cumsum(n_tokens)[:-1])
        asked = [Asked(*each) for each in zip(ids, n_prompt, strict=True)]
        outputs = self._generate(asked, read_cache=self._prefix_caching)
        again = [i for i, (one, output) in enumerate(zip(asked, outputs, strict=True)) if self._spoilt(one, output)]
        if again:
            afresh = self._generate([asked[i] for i in again], read_cache=False)
            for i, output in zip(again, afresh, strict=True):
                outputs[i] = output
        answers = [self._answer(one, output) for one, output in zip(asked, outputs, strict=True)]
        seen = np.concatenate([ids for ids, _ in answers]).astype(np.int32)
        logps = np.concatenate([logps for _, logps in answers]).astype(np.float32)
        header = {"n_logps": [len(logps) for _, logps in answers], "asked_again": len(again)}
        return header, seen.tobytes() + logps.tobytes()

    def _generate(self, asked: Iterable[Asked], read_cache: bool) -> list[Any]:
        asked = list(asked)
        prompts = [{"prompt_token_ids": one.ids.tolist()} for one in asked]
        parameters = [self._parameters(one, read_cache) for one in asked]
        return list(self._llm.generate(prompts, parameters, use_tqdm=False))

    def _parameters(self, one: Asked, read_cache: bool) -> Any:
        from vllm import SamplingParams

        # vLLM does not end a request before it has generated a token, so one is generated and thrown away.
        common = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, "skip_reading_prefix_cache": not read_cache}
        if not self._suffix_call:
            return SamplingParams(prompt_logprobs=0, flat_logprobs=True, **common)
        # Row i of the answer predicts token start + i + 1, so the row before the completion is its first.
        start = max(one.n_prompt - 1, 0)
        return SamplingParams(prompt_logprob_token_ids=one.ids[start + 1 :, None], prompt_logprob_start=start, **common)

    def _spoilt(self, one: Asked, output: Any) -> bool:
        """Whether a cached prefix reaches so far that a row that predicts the completion was never computed.

        vLLM then answers with whatever was in memory: with a prompt that fills its last KV block, for the first token.
        """
        if not self._prefix_caching:
            return False
        return output.num_cached_tokens is None or output.num_cached_tokens >= one.n_prompt

    def _answer(self, one: Asked, output: Any) -> tuple[np.ndarray, np.ndarray]:
        """The completion's ids as vLLM gives them back, and their log-probs."""
        if self._suffix_call:
            ids = np.asarray(output.prompt_token_ids, dtype=np.int32)[one.n_prompt :]
            rows = output.prompt_token_id_logprobs
            logps = np.zeros(0, np.float32) if rows is None else np.asarray(rows, dtype=np.float32)[:, 0]
        else:
            flat = output.prompt_logprobs
            # A token's own entry comes first. The very first token has none.
            at = np.asarray(flat.start_indices)[max(one.n_prompt, 1) :]
            ids, logps = np.asarray(flat.token_ids, dtype=np.int32)[at], np.asarray(flat.logprobs)[at]
            ids = np.concatenate([one.ids[:1], ids]) if one.n_prompt == 0 else ids
        return ids, np.concatenate([[np.nan], logps]) if one.n_prompt == 0 else logps


def answer(model: Model | None, header: dict[str, Any], body: bytes) -> tuple[Model, dict[str, Any], bytes]:
    ask = header.pop("ask")
    if ask == "open":
        model = Model(**header)
        return model, model.facts, b""
    assert ask == "score" and model is not None
    return model, *model.score(**header, body=body)


def receive(pipe: Connection, requests: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            requests.put(pipe.recv_bytes())
    except (EOFError, OSError):
        # Nobody is left to compute for. The group is this process and what vLLM has started.
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    os.set_inheritable(pipe.fileno(), False)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(pipe, requests), daemon=True).start()
    model: Model | None = None
    while True:
        line, _, body = requests.get().partition(b"\n")
        header = json.loads(line)
        if header["ask"] == "close":
            return
        try:
            model, reply, values = answer(model, header, body)
        except Exception as error:
            traceback.print_exc()
            reply, values = {"error": f"{type(error).__name__}: {error}"}, b""
        pipe.send_bytes(json.dumps(reply).encode() + b"\n" + values)


if __name__ == "__main__":
    main()
