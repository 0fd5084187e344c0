"""Which model a log-prob belongs to, and how it was computed.

Two levels. `model_id`: the weights, bit by bit, the config that shapes the computation, an adapter, quantisation; it
must match.
`numerics_id`: engine, versions, dtype, kernel; a column of every cached row, never mixed unless the user says so.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import UsageError

# Say nothing about the computation, or are said elsewhere: dtype is part of the numerics, attention too.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# A folder with one of these has a tokenizer of its own.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Those that live in the layers of their model; others add to its input, or act from outside of it.
_ADAPTER_KINDS = ("LORA", "LOHA", "LOKR", "IA3")
_VOLATILE_IN_ADAPTERS = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "task_type",
}
# What is made of the weights, so that another recipe under the same name would be another reference.
_QUANTIZED = {"4bit": "bitsandbytes nf4", "8bit": "bitsandbytes int8, weights only"}
# Where the hub's client keeps a model: models--org--name/snapshots/commit.
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Reference:
    """What a frozen model is loaded from."""

    folder: Path  # of the model, or of the adapter's base model
    adapter: Path | None = None
    quantization: str | None = None  # 4bit or 8bit: done when it is loaded

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer it is used with: an adapter may bring one, with tokens or a template of its own."""
        brings = self.adapter and any(any(self.adapter.glob(pattern)) for pattern in _VOCABULARIES)
        return self.adapter if self.adapter and brings else self.folder

    @property
    def weight_files(self) -> list[Path]:
        own = [self.adapter / _ADAPTER_WEIGHTS] if self.adapter else []
        return [*sorted(self.folder.glob("*.safetensors")), *own]


# -- where it is -----------------------------------------------------------------------------------------------------


def find_reference(config: Config) -> Reference:
    """The reference that a config names: a model, or an adapter with its base; perhaps to be quantised."""
    folder, adapter = _folder_of(config.model, config.revision), None
    if is_adapter(folder):
        if config.adapter is not None:
            raise UsageError(f"model {config.model} is an adapter already; a reference has one. Leave adapter out.")
        folder, adapter = _base_of(folder), folder
    elif config.adapter is not None:
        adapter = _folder_of(config.adapter)
    _check_model_folder(folder)
    if adapter is not None:
        _check_adapter_folder(adapter)
    quantization = config.score.quantization
    if quantization and "quantization_config" in _read_json(folder / "config.json"):
        raise UsageError(
            f"{folder} is quantised already; score.quantization={quantization} is for weights that are not. Leave it out."
        )
    return Reference(folder, adapter, quantization)


def find_start(config: Config) -> Reference:
    """What the policy starts from: train.model as it is, or the reference with all that belongs to it."""
    if config.train.model is None:
        return find_reference(config)
    score = config.score.model_copy(update={"quantization": None})
    named = {"model": config.train.model, "revision": None, "adapter": None, "score": score}
    return find_reference(config.model_copy(update=named))


def find_adapter(folder: Path) -> Reference:
    """An adapter's folder, with the base that its config names."""
    _check_adapter_folder(folder)
    base = _base_of(folder)
    _check_model_folder(base)
    return Reference(base, folder)


def found_again_as(folder: Path) -> tuple[str, str | None]:
    """A name and a revision by which this model is found from anywhere: the hub's, or its whole path."""
    if snapshot := _SNAPSHOT.search(folder.as_posix()):
        return snapshot[1].replace("--", "/", 1), snapshot[2]
    return str(folder.resolve()), None


def _folder_of(name: str, revision: str | None = None) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision {revision} is a hub id's, and model {name} is a folder here. Leave revision out."
            )
        return folder
    if folder.exists():
        raise UsageError(f"model {name} is a file; expected a folder with config.json and *.safetensors.")
    if not _HUB_ID.match(name):
        raise UsageError(f"No model at {name}; expected a folder with config.json, or a hub id such as org/name.")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # The hub's client has many; all mean that there is no model.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"model {name}{at} is no folder here, and the hub gave none ({reason}). "
            "Check the name and the network, or name a local folder."
        ) from None


def _base_of(adapter: Path) -> Path:
    """The model that an adapter was trained on. What it names may be a folder beside it, too."""
    settings = _read_json(adapter / _ADAPTER_CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        raise UsageError(
            f"{adapter} is an adapter and does not say of which model (base_model_name_or_path). Name that one as model, "
            "and this folder as adapter."
        )
    for folder in (Path(name), adapter / name):
        if folder.is_dir():
            return folder
    try:
        return _folder_of(name, revision)
    except UsageError as error:
        raise UsageError(
            f"{adapter} is an adapter of {name}, which is not found. Name its base as model, and this folder as adapter. "
            f"({error})"
        ) from None


def is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER_CONFIG).exists()


def _check_model_folder(folder: Path) -> None:
    if is_adapter(folder):
        raise UsageError(
            f"{folder} is an adapter; a whole model is needed here. Merge it (prefcache merge) and name the result."
        )
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} is no model: it has no config.json. Expected a folder as save_pretrained writes it."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin"))
        found = "weights only as pickle, which is never read" if pickles else "no weights"
        raise UsageError(f"{folder} has {found}; expected *.safetensors, as save_pretrained writes them.")


def _check_adapter_folder(folder: Path) -> None:
    if not is_adapter(folder):
        raise UsageError(f"{folder} is no adapter: it has no {_ADAPTER_CONFIG}. Expected one as PEFT saves it.")
    if not (folder / _ADAPTER_WEIGHTS).exists():
        found = "weights only as pickle, which is never read" if any(folder.glob("*.bin")) else "no weights"
        raise UsageError(f"{folder} has {found}; expected {_ADAPTER_WEIGHTS}, as PEFT saves it.")
    settings = _read_json(folder / _ADAPTER_CONFIG)
    kind = settings.get("peft_type")
    if kind not in _ADAPTER_KINDS:
        raise UsageError(
            f"{folder} is a {kind} adapter; known are {', '.join(_ADAPTER_KINDS)}. Merge it into its base model and name "
            "the result."
        )
    if settings.get("alora_invocation_tokens"):
        raise UsageError(
            f"{folder} begins to act within a sequence (alora_invocation_tokens), which is not known here."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}, expected an object.")
    return content


# -- which it is -----------------------------------------------------------------------------------------------------


def model_identity(reference: Reference, memo: MutableMapping[str, str]) -> dict[str, Any]:
    """The reference's id and what it was made from. `memo` spares hashing unchanged weight files again.

    Every weight file of the folder counts, also one that Transformers would not load: a file too many costs a new
    scoring when it goes, a file too few would serve stale values.
    """
    weights = {file.name: _sha256(file, memo) for file in sorted(reference.folder.glob("*.safetensors"))}
    made: dict[str, Any] = {
        "weights": weights,
        "config": _without_volatile(_read_json(reference.folder / "config.json")),
    }
    # Only where there are any: the id of a plain model is older than these.
    if reference.adapter is not None:
        made["adapter"] = {
            "weights": _sha256(reference.adapter / _ADAPTER_WEIGHTS, memo),
            "config": _adapter_settings(_read_json(reference.adapter / _ADAPTER_CONFIG)),
        }
    if reference.quantization is not None:
        made["quantization"] = _QUANTIZED[reference.quantization]
    content = json.dumps(made, sort_keys=True).encode()
    return {"model_id": hashlib.sha256(content).hexdigest()[:32], **made}


def _adapter_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """PEFT keeps names of modules as sets, and so saves them in any order."""
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value
        for key, value in settings.items()
        if key not in _VOLATILE_IN_ADAPTERS
    }


def _without_volatile(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_volatile(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def _sha256(file: Path, memo: MutableMapping[str, str]) -> str:
    stat = file.stat()
    # The time of change as well, which nobody can set: weights edited in place, their other time put back, are seen.
    stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    if stamp not in memo:
        with open(file, "rb") as opened:
            memo[stamp] = hashlib.file_digest(opened, "sha256").hexdigest()
    return memo[stamp]


def longest_sequence(folder: Path) -> int:
    """The most tokens for which the model computes the same whatever else is in the batch."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    limits = [
        config[name] for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") if config.get(name)
    ]
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type") or rope.get("type")
        if kind == "dynamic":
            raise UsageError(
                f"{folder} has dynamic rope, whose values change with what was computed before. Use another model."
            )
        if kind == "longrope":
            # Beyond this length of the batch's longest row, all of its rows get other frequencies.
            limits.append(
                rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            )
    return min((int(limit) for limit in limits if limit), default=sys.maxsize)


def saved_dtype(folder: Path) -> str:
    """What the weights were saved in, as the config says."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(saved.get("dtype") or saved.get("torch_dtype") or "float32")


def attention_kernel(folder: Path, wanted: str) -> str:
    """The kernel that computes what the model defines. SDPA has neither caps nor sinks: Transformers leaves the first
    out without a word (Gemma 2) and refuses the second (GPT-OSS)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    special = config.get("attn_logit_softcapping") or config.get("model_type") in ("gpt_oss",)
    return "eager" if special and wanted == "sdpa" else wanted


def _rope_parameters(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rope settings of a config: one set for all layers, or one for each type of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def tokenizer_id(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in (path for pattern in _TOKENIZER_FILES for path in sorted(folder.glob(pattern))):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def numerics(engine: str, packages: Iterable[str], **facts: str) -> dict[str, str]:
    """How values are computed, as a readable record. Its hash is the numerics_id."""
    return {"engine": engine, **versions(packages), **facts}


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in packages}


def numerics_id(record: dict[str, str]) -> str:
    # The letter keeps YAML from reading an id of digits as a number.
    return "n" + hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:15]


def differences(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """`torch 2.13.0 -> 2.11.0, dtype ...`: what differs between two records, for a person."""
    keys = [key for key in sorted(mine.keys() | other.keys()) if mine.get(key) != other.get(key)]
    return ", ".join(f"{key} {other.get(key)} -> {mine.get(key)}" for key in keys) or "nothing"
