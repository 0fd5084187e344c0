"""A model's folder: where it is, here or on the hub, which of its weight files load, and what its config limits."""

import ast
import importlib.util
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from prefcache.pipeline import model_config, stored_paths
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.safetensors_files import shorten_list
from prefcache.pipeline.tokenizer import needs_own_code

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = model_config.ADAPTER_FILE, "adapter_model.safetensors"
# Adapters that live in the layers of their model; others add to its input, or act from outside.
_ADAPTER_KINDS = ("LORA", "LOHA", "LOKR", "IA3")
_DTYPES = ("float32", "float16", "bfloat16")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# Where the hub's client keeps a model: models--org--name/snapshots/commit.
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")


def find_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that a config names, downloaded from the hub if it is a hub id; if not needed, without weights."""
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision {revision} is a hub id's, and model {name} is a local folder. Leave revision out."
            )
        return folder
    if folder.exists():
        raise UsageError(
            f"model {name} is a file; expected a folder with config.json and *.safetensors, or a file that ends in .gguf."
        )
    if name.startswith((".", "/", "~")):
        hint = " The shell's ~ is not expanded here: write the whole path." if name.startswith("~") else ""
        raise UsageError(f"No folder at {name}.{hint} Name one with config.json and *.safetensors.")
    if not _HUB_ID.match(name):
        raise UsageError(f"No model at {name}; expected a folder with config.json, or a hub id such as org/name.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # The hub's client raises many kinds; each means that there is no model to load.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"model {name}{at} is not a local folder and could not be downloaded from the hub ({reason}). "
            "Check the name and the network, or name a local folder."
        ) from None


def name_anywhere(folder: Path) -> tuple[str, str | None]:
    """A name and a revision by which this model is found from any folder: the hub's, or its absolute path."""
    if snapshot := _SNAPSHOT.search(folder.as_posix()):
        return snapshot[1].replace("--", "/", 1), snapshot[2]
    return str(folder.resolve()), None


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def find_base(adapter: Path, *, weights: bool = True) -> Path:
    """The model that an adapter was trained on: the path that it names, also relative to itself, or a hub id."""
    settings = model_config.read_adapter(adapter)
    name = settings.base_model_name_or_path
    if not name:
        raise UsageError(
            f"{adapter} is an adapter and does not say of which model (base_model_name_or_path). Name that one as model, "
            "and this folder as adapter."
        )
    for folder in (Path(name), adapter / name):
        if folder.is_dir():
            return folder
    try:
        return find_folder(name, settings.revision, weights=weights)
    except UsageError as error:
        raise UsageError(
            f"{adapter} is an adapter of {name}, which is not found. Name its base as model, and this folder as adapter. "
            f"({error})"
        ) from None


# -- what is refused before anything loads ---------------------------------------------------------------------------


def check_model(folder: Path, *, has_weights: bool = True) -> None:
    if is_adapter(folder):
        raise UsageError(
            f"{folder} is an adapter; a whole model is needed here. Merge it (prefcache merge) and name the result."
        )
    if not (folder / model_config.FILE).exists():
        raise UsageError(f"{folder} has no config.json. Expected a model's folder, as save_pretrained writes it.")
    config = model_config.read_object(folder / model_config.FILE)
    # Transformers would run code from the folder only where it has no class of its own.
    if config.get("auto_map") and str(config.get("model_type")) not in causal_model_types():
        raise needs_own_code(folder)
    # Those of a model on the hub may be left there, but weights of another kind are of no use.
    has_others = any(path.suffix in (".bin", ".gguf") for path in folder.iterdir())
    if (has_weights or has_others) and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has {_describe_lack(folder)}; expected *.safetensors, as save_pretrained writes them."
        )
    model_config.read(folder)  # refuses a malformed one before Transformers stumbles over it


@lru_cache
def causal_model_types() -> frozenset[str]:
    """Return the model types for which Transformers has a causal language model."""
    # Read from the source: importing the table imports PyTorch, which takes seconds.
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).with_name("models") / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_bytes()).body if source.exists() else ():
        match node:
            case ast.Assign([ast.Name("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")], ast.Call(args=[ast.List() as entries])):
                return frozenset(dict(ast.literal_eval(entries)))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_adapter(folder: Path, *, has_weights: bool = True) -> None:
    if not is_adapter(folder):
        raise UsageError(f"{folder} has no {ADAPTER_CONFIG}. Expected an adapter's folder, as PEFT saves it.")
    if has_weights and not (folder / ADAPTER_WEIGHTS).exists():
        raise UsageError(f"{folder} has {_describe_lack(folder)}; expected {ADAPTER_WEIGHTS}, as PEFT saves it.")
    settings = model_config.read_adapter(folder)
    if settings.peft_type not in _ADAPTER_KINDS:
        raise UsageError(
            f"{folder} is a {settings.peft_type} adapter; supported are {', '.join(_ADAPTER_KINDS)}. Merge it into its base "
            "model and name the result."
        )
    if settings.megatron_config:
        raise UsageError(
            f"{folder} names a Python module that PEFT would import (megatron_core), which prefcache never does. Merge it "
            "into its base model and name the result."
        )
    if settings.alora_invocation_tokens:
        raise UsageError(f"{folder} starts to act within a sequence (alora_invocation_tokens), which is not supported.")


def _describe_lack(folder: Path) -> str:
    if gguf := sorted(folder.glob("*.gguf")):
        return f"weights only as GGUF (name the file itself, as in model: {gguf[0]})"
    return "weights only as pickle, which is never read" if any(folder.glob("*.bin")) else "no weights"


# -- weight files ----------------------------------------------------------------------------------------------------


class WeightFiles(NamedTuple):
    files: list[Path]
    promised: set[str]  # names of tensors that an index says are there


def select_weights(folder: Path) -> WeightFiles:
    """The files that Transformers loads a model from, chosen as its _get_resolved_checkpoint_files chooses them."""
    config = model_config.read_object(folder / model_config.FILE)
    name = config.get("transformers_weights") or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    nested = config.get("text_config")
    if isinstance(nested, dict) and "transformers_weights" in config | nested:
        raise UsageError(
            f"{folder}: config.json has transformers_weights and several parts, and it is unclear which it means. Name the "
            f"file {WEIGHTS} and leave that key out."
        )
    if stored_paths.is_bare(name) and (folder / name).is_file():
        if name.endswith(".safetensors"):
            return WeightFiles([folder / name], set())
        if name.endswith(".safetensors.index.json"):
            return read_index(folder / name)
    present = shorten_list([file.name for file in folder.glob("*.safetensors")])
    raise UsageError(
        f"{folder} has {present or 'no weights'}; expected {WEIGHTS}, or {INDEX} and the files it names, as save_pretrained "
        "writes them."
    )


def read_index(index: Path) -> WeightFiles:
    weight_map = model_config.read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(stored_paths.is_bare, weight_map.values())):
        raise UsageError(
            f"{index} has no weight_map of tensors to names of files in its folder. Save or fetch the model again."
        )
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{index} names {file.name}, which does not exist. Save or fetch the model again.")
    return WeightFiles(files, set(weight_map))


# -- what its config limits ------------------------------------------------------------------------------------------


def longest_sequence(folder: Path) -> int:
    """The most tokens for which the model computes the same whatever else is in the batch."""
    config = model_config.read(folder).text_model
    limits = config.lengths
    for rope in config.ropes:
        if rope.kind == "dynamic":
            raise UsageError(
                f"{folder} has dynamic rope, whose values change with what was computed before. Use another model."
            )
        if rope.kind == "longrope":
            # If the batch's longest row exceeds this length, all of its rows get other frequencies.
            length = rope.original_max_position_embeddings or config.original_max_position_embeddings
            limits += [length] if length else []
    return min(limits, default=sys.maxsize)


def saved_dtype(folder: Path) -> str:
    """The dtype in which the weights were saved, by the config."""
    saved = model_config.read(folder).saved_dtype
    if saved not in _DTYPES:
        raise UsageError(
            f"{folder / model_config.FILE} says that the weights are in {saved!r}; supported are {', '.join(_DTYPES)}. Name "
            "one of these as dtype (score.dtype, or --dtype of merge)."
        )
    return saved


def attention_kernel(folder: Path, wanted: str) -> str:
    """The kernel that computes what the model defines.

    SDPA has neither soft caps nor sinks: Transformers silently ignores the first (Gemma 2) and refuses the second (GPT-OSS).
    """
    config = model_config.read(folder).text_model
    is_special = config.attn_logit_softcapping or config.model_type in ("gpt_oss",)
    return "eager" if is_special and wanted == "sdpa" else wanted
