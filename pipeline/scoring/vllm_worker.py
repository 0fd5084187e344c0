"""vLLM in a process of its own, started by pipeline/scoring/engines/vllm.py with the Python that has vLLM.

It imports only the standard library, numpy, vllm and, for pictures, what vLLM brings. Requests and replies go over one socket, each a line of JSON
followed by bytes:

    {"ask": "open", ...}                          -> {"runner": ..., ...}
    {"ask": "score", "n_prompt", "n_tokens"} ids  -> {"n_logps", "asked_again"} ids as vLLM saw them, log-probs

With images, a request also has "pictures" (heights and widths, whose RGB bytes follow the ids), "images" (which of them each
prompt has), "spans" (where their tokens are) and "placeholder" (the ids that vLLM expands in their place).

    {"ask": "close"}

When the other side ends, for whatever reason, this process and everything that vLLM started are killed.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np


class Request(NamedTuple):
    """One sequence, and where its completion begins."""

    ids: np.ndarray
    n_prompt: int
    pictures: Sequence[np.ndarray] = ()  # of the prompt
    spans: Sequence[Sequence[int]] = ()  # begin and end of each one's tokens
    placeholder: Sequence[int] = ()

    def prompt(self) -> dict[str, Any]:
        """Return it as vLLM takes it."""
        if not self.pictures:
            return {"prompt_token_ids": self.ids.tolist()}
        from PIL import Image

        kept, at = list[int](), 0
        for begin, end in self.spans:
            kept += [*self.ids[at:begin].tolist(), *self.placeholder]
            at = end
        pictures = [Image.fromarray(each) for each in self.pictures]
        return {"prompt_token_ids": [*kept, *self.ids[at:].tolist()], "multi_modal_data": {"image": pictures}}


class Model:
    """A loaded model that returns log-probs of completions."""

    def __init__(
        self, options: dict[str, Any], suffix_call: bool, prefix_caching: bool, has_images: bool = False
    ) -> None:
        # vLLM takes many seconds to import; a process that is only closed need not wait for that.
        from vllm import LLM

        if has_images:
            _process_with_pillow()
        self._llm: Any = LLM(**options)
        self._suffix_call, self._prefix_caching = suffix_call, prefix_caching
        settings = self._llm.llm_engine.vllm_config
        self.facts = {
            "runner": "v2" if getattr(settings, "use_v2_model_runner", False) else "v1",
            "head_dtype": str(getattr(settings.model_config, "head_dtype", settings.model_config.dtype)).split(".")[-1],
            "kv_block": settings.cache_config.block_size,
        }

    def score(
        self, n_prompt: list[int], n_tokens: list[int], body: bytes, **images: Any
    ) -> tuple[dict[str, Any], bytes]:
        ids = np.split(np.frombuffer(body, np.int32, sum(n_tokens)), np.cumsum(n_tokens)[:-1])
        requests = [Request(*pair) for pair in zip(ids, n_prompt, strict=True)]
        if images:
            requests = list(_add_pictures(requests, body[4 * sum(n_tokens) :], **images))
        outputs = self._generate(requests, read_cache=self._prefix_caching)
        spoilt = [i for i, pair in enumerate(zip(requests, outputs, strict=True)) if self._is_spoilt(*pair)]
        if spoilt:
            for i, output in zip(spoilt, self._generate([requests[i] for i in spoilt], read_cache=False), strict=True):
                outputs[i] = output
        _refuse_other_ids(requests, outputs)
        completions = [self._completion(*pair) for pair in zip(requests, outputs, strict=True)]
        reply_ids = np.concatenate([ids for ids, _ in completions]).astype(np.int32)
        logps = np.concatenate([logps for _, logps in completions]).astype(np.float32)
        header = {"n_logps": [len(logps) for _, logps in completions], "asked_again": len(spoilt)}
        return header, reply_ids.tobytes() + logps.tobytes()

    def _generate(self, requests: list[Request], read_cache: bool) -> list[Any]:
        from vllm import SamplingParams

        # vLLM does not end a request before it has generated a token, so one is generated and thrown away.
        common = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, "skip_reading_prefix_cache": not read_cache}
        parameters = []
        for request in requests:
            if self._suffix_call:
                # Row i of the reply predicts token start + i + 1, so the row before the completion is its first.
                start = max(request.n_prompt - 1, 0)
                suffix = {"prompt_logprob_token_ids": request.ids[start + 1 :, None], "prompt_logprob_start": start}
                parameters.append(SamplingParams(**suffix, **common))
            else:
                parameters.append(SamplingParams(prompt_logprobs=0, flat_logprobs=True, **common))
        prompts = [request.prompt() for request in requests]
        return list(self._llm.generate(prompts, parameters, use_tqdm=False))

    def _is_spoilt(self, request: Request, output: Any) -> bool:
        """Return whether the cached prefix covers a row that predicts the completion, which was then never computed.

        vLLM replies with whatever was in memory: for the first token, with a prompt that fills its last KV block.
        """
        if not self._prefix_caching:
            return False
        return output.num_cached_tokens is None or output.num_cached_tokens >= request.n_prompt

    def _completion(self, request: Request, output: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the completion's ids as vLLM returned them, and their log-probs."""
        if self._suffix_call:
            ids = np.asarray(output.prompt_token_ids, dtype=np.int32)[request.n_prompt :]
            rows = output.prompt_token_id_logprobs
            logps = np.zeros(0, np.float32) if rows is None else np.asarray(rows, dtype=np.float32)[:, 0]
        else:
            flat = output.prompt_logprobs
            # A token's own entry comes first. The very first token has none.
            at = np.asarray(flat.start_indices)[max(request.n_prompt, 1) :]
            ids, logps = np.asarray(flat.token_ids, dtype=np.int32)[at], np.asarray(flat.logprobs)[at]
            ids = np.concatenate([request.ids[:1], ids]) if request.n_prompt == 0 else ids
        return ids, np.concatenate([[np.nan], logps]) if request.n_prompt == 0 else logps


def _process_with_pillow() -> None:
    """Make Transformers' processors resize with Pillow, as prefcache does. By default torchvision does it, a little differently."""
    from transformers import AutoImageProcessor

    load = AutoImageProcessor.from_pretrained
    AutoImageProcessor.from_pretrained = lambda *args, **options: load(*args, **options | {"backend": "pil"})


def _add_pictures(
    requests: list[Request],
    body: bytes,
    pictures: list[list[int]],
    images: list[list[int]],
    spans: list[list[list[int]]],
    placeholder: list[int],
) -> Iterator[Request]:
    ends = np.cumsum([3 * height * width for height, width in pictures])
    parts = np.split(np.frombuffer(body, np.uint8), ends[:-1])
    pixels = [part.reshape(*size, 3) for part, size in zip(parts, pictures, strict=True)]
    for request, numbers, places in zip(requests, images, spans, strict=True):
        yield request._replace(pictures=[pixels[n] for n in numbers], spans=places, placeholder=placeholder)


def _refuse_other_ids(requests: list[Request], outputs: list[Any]) -> None:
    """Fail if vLLM made other tokens of a prompt with pictures than those that were asked for."""
    for request, output in zip(requests, outputs, strict=True):
        if request.pictures and list(output.prompt_token_ids) != request.ids.tolist():
            raise ValueError(
                f"it makes {len(output.prompt_token_ids)} tokens of a prompt with {len(request.pictures)} pictures, and the model's "
                f"processor {len(request.ids)} or others"
            )


def receive(pipe: Connection, requests: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            requests.put(pipe.recv_bytes())
    except (EOFError, OSError):
        # The other side is gone. The process group is this process and whatever vLLM started.
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
        ask = header.pop("ask")
        if ask == "close":
            return
        reply: dict[str, Any]
        try:
            if ask == "open":
                model = Model(**header)
                reply, values = model.facts, b""
            else:
                assert ask == "score" and model is not None
                reply, values = model.score(**header, body=body)
        except Exception as error:
            traceback.print_exc()
            reply, values = {"error": f"{type(error).__name__}: {error}"}, b""
        pipe.send_bytes(json.dumps(reply).encode() + b"\n" + values)


if __name__ == "__main__":
    main()
