"""Which model a log-prob belongs to, and how it was computed.

Two levels. `model_id`: the weights, bit by bit, and the config that shapes the computation; it must match.
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
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Reference:
    """What a frozen model is loaded from."""

    folder: Path  # of the model, or of the adapter's base model
    adapter: Path | None = None
    quantization: str | None = None  # 4bit or 8bit: done when it is loaded


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself, or the hub's snapshot of it."""
    folder = Path(name)
    if folder.is_dir():
        _check_model_folder(folder)
        return folder
    if folder.exists():
        raise UsageError(f"model {name} is a file; expected a folder with config.json and *.safetensors.")
    if not _HUB_ID.match(name):
        raise UsageError(f"No model at {name}; expected a folder with config.json, or a hub id such as org/name.")
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"])
        )
    except Exception as error:  # The hub's client has many; all mean that there is no model.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model {name} is no folder here, and the hub gave none ({reason}). "
            "Check the name and the network, or name a local folder."
        ) from None
    _check_model_folder(folder)
    return folder


def _check_model_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder} is an adapter, not a whole model. Merge it into its base model and name the result."
        )
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} is no model: it has no config.json. Expected a folder as save_pretrained writes it."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin"))
        found = "weights only as pickle, which is never read" if pickles else "no weights"
        raise UsageError(f"{folder} has {found}; expected *.safetensors, as save_pretrained writes them.")


def model_identity(folder: Path, memo: MutableMapping[str, str]) -> dict[str, Any]:
    """The model's id and what it was made from. `memo` spares hashing unchanged weight files again."""
    weights = {file.name: _sha256(file, memo) for file in sorted(folder.glob("*.safetensors"))}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'} is not JSON: {error}.") from None
    shape = _without_volatile(config)
    content = json.dumps({"weights": weights, "config": shape}, sort_keys=True).encode()
    return {"model_id": hashlib.sha256(content).hexdigest()[:32], "weights": weights, "config": shape}


def _without_volatile(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_volatile(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def _sha256(file: Path, memo: MutableMapping[str, str]) -> str:
    stat = file.stat()
    stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
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
