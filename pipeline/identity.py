"""Which model a log-prob belongs to, and how it was computed.

`model_id` identifies the model: tensors bit by bit, the config keys that shape the computation, adapter, quantization.
It must match.
`numerics_id` identifies how values were computed: engine, versions, dtype, kernel. Every cached row has one; rows with
different ones are mixed only if the user accepts them.
Ids of earlier versions are in older_ids.py, the files of a model in model_files.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefcache.pipeline import gguf_files, model_config, model_files
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from prefcache.pipeline.safetensors_files import Digests, Tensor, shorten_list, stamp_file
from prefcache.pipeline.tokenizer import PROCESSOR_CONFIGS

# Keys of a config that do not shape the computation, or are recorded elsewhere: dtype and attention are numerics.
# Transformers chooses the class by model_type, and never by auto_map here. vLLM chooses by architectures; whatever class
# that is, its values are compared with those of Transformers.
VOLATILE_IN_OLDER_IDS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
}
_VOLATILE = VOLATILE_IN_OLDER_IDS | {"architectures", "auto_map", "transformers_weights"}
# Where generation begins and ends. Not pad_token_id, by which RoBERTa's relatives and XGLM count positions, and whose embedding
# is not trained.
_ENDS = {"bos_token_id", "eos_token_id"}
# Their forwards read eos_token_id (tests/pipeline/test_identity.py looks through all causal language models).
_READ_ENDS = {"qwen4_exp", "qwen4_exp_text"}
OLDER_TOKENIZER_FILES = [
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
]
# New ones come last, so that a folder without them keeps its id. tokenizer.*.json: one for each version of Transformers.
_TOKENIZER_FILES = [
    *OLDER_TOKENIZER_FILES,
    *[
        "*tokenizer.*.json",
        "*.model",
        "tokenizer.model.*",
        "*.spm",
        "*.codes",
        "*.bpe",
        "*.tokenizer",
        "*vocab*.json",
        "*vocab*.txt",
        "word_*.json",
        "byte_maps.json",
        "dict.txt",
        "emoji.json",
        "normalizer.json",
    ],
]
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Notes of the place it was loaded from, and how batches are padded and cut, which is never done here.
_VOLATILE_IN_TOKENIZERS = {
    "device_map",
    "files_loaded",
    "is_local",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "padding_side",
    "processor_class",
    "slow_tokenizer_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "transformers_version",
    "truncation_side",
    "truncation_strategy",
}
_TOKENIZER_SOFTWARE = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral_common")
# A folder with one of these has a tokenizer of its own.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
VOLATILE_IN_ADAPTERS = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "task_type",
}
# PEFT takes the first of their patterns that fits a layer.
ORDERED_PATTERNS = ("alpha_pattern", "rank_pattern")
# PEFT makes sets of these, and so saves them in any order.
_SETS = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")
# The recipe by which weights are quantized: another one under the same name would be another reference.
QUANTIZED = {"4bit": "bitsandbytes nf4", "8bit": "bitsandbytes int8, weights only"}


@dataclass(frozen=True)
class Reference:
    """What a frozen model is loaded from."""

    folder: Path  # of the model, or of the adapter's base model
    adapter: Path | None = None
    quantization: str | None = None  # 4bit or 8bit: done when it is loaded
    unconverted: Path | None = None  # the GGUF file that still holds the weights: `folder` is temporary and has none

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer it is used with: an adapter may bring one, with tokens or a template of its own."""
        brings = self.adapter and any(any(self.adapter.glob(pattern)) for pattern in _VOCABULARIES)
        return self.adapter if self.adapter and brings else self.folder

    @property
    def processor(self) -> Path:
        """The folder whose image processor it is used with."""
        brings = self.adapter and any((self.adapter / name).exists() for name in PROCESSOR_CONFIGS)
        return self.adapter if self.adapter and brings else self.folder

    @property
    def weight_files(self) -> list[Path]:
        """The files that load."""
        own = [self.adapter / ADAPTER_WEIGHTS] if self.adapter else []
        return [*model_files.select_weights(self.folder).files, *own]

    @property
    def unselected_files(self) -> list[Path]:
        """Files that Transformers does not load, but a loader of every file (or of every file in the index) would."""
        index = self.folder / model_files.INDEX
        every = model_files.read_index(index).files if index.is_file() else sorted(self.folder.glob("*.safetensors"))
        return [file for file in every if file not in model_files.select_weights(self.folder).files]

    def refuse_unconverted(self) -> None:
        """Refuse a GGUF file that has not been converted, where its weights are needed."""
        if self.unconverted is not None:
            raise UsageError(
                f"{self.unconverted} has not been converted yet, and its weights are needed here. Convert it first "
                "(prefcache prepare CONFIG)."
            )

    def stamps(self) -> list[str]:
        """A text for each file that the model_id depends on, which changes whenever the file does."""
        configs = [self.folder / model_config.FILE, self.folder / model_files.INDEX]
        if self.adapter:
            configs.append(self.adapter / ADAPTER_CONFIG)
        return [stamp_file(file) for file in [*self.weight_files, *configs] if file.exists()]


def find_reference(config: Config, *, weights: bool = True) -> Reference:
    """The reference that a config names: a model, or an adapter with its base; perhaps to be quantized.

    Without `weights`, none need be there and none are downloaded: tokenizer and shape are known, and it does not load.
    """
    unconverted = adapter = None
    if gguf_files.is_gguf(config.model):
        folder, unconverted = _find_gguf(config)
    else:
        folder = model_files.find_folder(config.model, config.revision, weights=weights)
    if model_files.is_adapter(folder):
        if config.adapter is not None:
            raise UsageError(
                f"model {config.model} is an adapter already, and a reference has at most one. Leave adapter out."
            )
        folder, adapter = model_files.find_base(folder, weights=weights), folder
    elif config.adapter is not None:
        adapter = model_files.find_folder(config.adapter, weights=weights)
    model_files.check_model(folder, has_weights=weights and unconverted is None)
    if adapter is not None:
        model_files.check_adapter(adapter, has_weights=weights)
    quantization = config.score.quantization
    if quantization and model_config.read(folder).quantization_config is not None:
        raise UsageError(
            f"{folder} is quantized already; score.quantization={quantization} is for weights that are not. Leave it out."
        )
    return Reference(folder, adapter, quantization, unconverted)


def _find_gguf(config: Config) -> tuple[Path, Path | None]:
    """The folder that a GGUF file was converted into; before that, one without weights, and the file that has them."""
    file = Path(config.model)
    if config.revision is not None:
        raise UsageError(
            f"revision {config.revision} is a hub id's, and model {file} is a local file. Leave revision out."
        )
    if found := gguf_files.find_converted(file, config.cache_folder):
        return found[0], None
    return gguf_files.describe(file), file


def find_start(config: Config, *, weights: bool = True) -> Reference:
    """What the policy starts from: train.model as it is, or the reference with its adapter and quantization."""
    if config.train.model is None:
        return find_reference(config, weights=weights)
    score = config.score.model_copy(update={"quantization": None})
    start = {"model": config.train.model, "revision": None, "adapter": None, "score": score}
    return find_reference(config.model_copy(update=start), weights=weights)


def find_adapter(folder: Path) -> Reference:
    """An adapter's folder, with the base that its config names."""
    model_files.check_adapter(folder)
    base = model_files.find_base(folder)
    model_files.check_model(base)
    return Reference(base, folder)


# -- model_id --------------------------------------------------------------------------------------------------------


def model_identity(reference: Reference, digests: Digests | None = None) -> dict[str, Any]:
    """Return the reference's id and what it was made from. `digests` spares hashing unchanged files again.

    It does not depend on how tensors are spread over files, nor on files next to them that do not load.
    """
    reference.refuse_unconverted()
    digests = digests or Digests()
    content: dict[str, Any] = {
        "tensors": _summarize(_read_tensors(reference.folder, digests)),
        "config": canonical_config(model_config.read_object(reference.folder / model_config.FILE)),
    }
    if reference.adapter is not None:
        settings = without_keys(model_config.read_object(reference.adapter / ADAPTER_CONFIG), VOLATILE_IN_ADAPTERS)
        for key in _SETS:
            if isinstance(settings.get(key), list):
                settings[key] = sorted(settings[key], key=str)
        for key in ORDERED_PATTERNS:
            if isinstance(settings.get(key), dict):
                settings[key] = list(map(list, settings[key].items()))
        tensors = _summarize(digests.read(reference.adapter / ADAPTER_WEIGHTS))
        content["adapter"] = {"tensors": tensors, "config": settings}
    if reference.quantization is not None:
        content["quantization"] = QUANTIZED[reference.quantization]
    return {"model_id": hash_json(content), **content}


# Tensors of the language model and of its head, by their names in the files of models that see images.
_LANGUAGE = re.compile(
    r"(model\.)?(language_model|text_model)\..*|(language_model\.)?lm_head\..*|model\.(embed_tokens|layers|norm)\..*"
)


def tower_identity(reference: Reference, digests: Digests | None = None) -> dict[str, Any]:
    """Return the id of a model's vision tower, with its projector, and what it was made from.

    It does not depend on the weights of the language model. A tensor of an unknown name counts as the tower's.
    """
    digests = digests or Digests()
    tensors = {name: each for name, each in _read_tensors(reference.folder, digests).items() if _is_tower_tensor(name)}
    config = canonical_config(model_config.read_object(reference.folder / model_config.FILE))
    content: dict[str, Any] = {"tensors": _summarize(tensors), "config": without_keys(config, {"text_config"})}
    if reference.adapter is not None and (adapted := tower_adapter(reference, digests)):
        settings = without_keys(model_config.read_object(reference.adapter / ADAPTER_CONFIG), VOLATILE_IN_ADAPTERS)
        content["adapter"] = {"tensors": _summarize(adapted), "config": settings}
    if reference.quantization is not None:
        content["quantization"] = QUANTIZED[reference.quantization]
    return {"tower_id": hash_json(content), **content}


def tower_adapter(reference: Reference, digests: Digests | None = None) -> dict[str, Tensor]:
    """The tensors of the reference's adapter that adapt the tower."""
    if reference.adapter is None:
        return {}
    tensors = (digests or Digests()).read(reference.adapter / ADAPTER_WEIGHTS)
    return {name: each for name, each in tensors.items() if _is_tower_tensor(name.removeprefix("base_model.model."))}


def _is_tower_tensor(name: str) -> bool:
    return _LANGUAGE.fullmatch(name) is None


def _read_tensors(folder: Path, digests: Digests) -> dict[str, Tensor]:
    """The tensors of all files. Transformers loads everything in a selected file, whatever the index says of it."""
    selected = model_files.select_weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in selected.files:
        for name, tensor in digests.read(file).items():
            if tensors.setdefault(name, tensor) != tensor:
                # Transformers takes the last of them, other loaders may not.
                raise UsageError(
                    f"{folder} has two different tensors {name}, in files that both load. Save the model again, or leave "
                    "one of the files out of the index."
                )
    if missing := selected.promised - tensors.keys():
        raise UsageError(
            f"{folder} lacks tensors that its index names: {shorten_list(missing)}. Save or fetch the model again."
        )
    return tensors


def _summarize(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Their number, and a hash over all of them that does not depend on their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, *tensors[name]]).encode() + b"\n")
    return {"count": len(tensors), "sha256": digest.hexdigest()}


def canonical_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what cannot change a log-prob."""
    types = {str(each.get("model_type")) for each in (config, config.get("text_config")) if isinstance(each, dict)}
    return dict(without_nested_keys(config, _VOLATILE if types & _READ_ENDS else _VOLATILE | _ENDS))


def without_nested_keys(content: Any, keys: set[str]) -> Any:
    if isinstance(content, dict):
        return {key: without_nested_keys(value, keys) for key, value in content.items() if key not in keys}
    return content


def without_keys(content: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


# -- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_id(folder: Path) -> str:
    """Hash the files that a tokenizer is loaded from, without notes of their origin or of how batches are padded."""
    digest = hashlib.sha256()
    for path in _match_files(folder, _TOKENIZER_FILES):
        data = path.read_bytes()
        if path.name == _TOKENIZER_CONFIG:
            settings = without_keys(model_config.read_object(path), _VOLATILE_IN_TOKENIZERS)
            data = json.dumps(settings, sort_keys=True).encode()
        digest.update(os.fsencode(f"{path.relative_to(folder)}\0{len(data)}\0"))
        digest.update(data)
    return digest.hexdigest()[:32]


def tokenizer_stamp(folder: Path) -> str:
    """A text that changes with whatever a tokenizer is loaded from: its files, the config's hints, and the software."""
    config = folder / model_config.FILE
    parts = [
        hash_bytes(folder, _TOKENIZER_FILES),
        hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.exists() else "",
    ]
    for name in _TOKENIZER_SOFTWARE:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def find_processor(folder: Path) -> Path:
    """Find the folder with the settings of a model's image processor; an adapter that brings none has its base's."""
    if not model_files.is_adapter(folder) or any((folder / name).exists() for name in PROCESSOR_CONFIGS):
        return folder
    return model_files.find_base(folder, weights=False)


def hash_bytes(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in _match_files(folder, patterns):
        digest.update(os.fsencode(f"{path.relative_to(folder)}\0{path.stat().st_size}\0"))
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _match_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that match, each once, in the order of the patterns."""
    matches = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return list(dict.fromkeys(matches))


# -- numerics --------------------------------------------------------------------------------------------------------


def numerics(engine: str, packages: Iterable[str], **facts: str) -> dict[str, str]:
    """How values are computed, as a readable record. Its hash is the numerics_id."""
    return {"engine": engine, **versions(packages), **facts}


def tower_numerics(reference: Reference, device: str, dtype: str, attention: str) -> dict[str, str]:
    """How a vision tower computes features."""
    optional = [*(["peft"] if tower_adapter(reference) else []), *(["bitsandbytes"] if reference.quantization else [])]
    packages = ["torch", "transformers", *optional]
    return numerics("tower", packages, device=device, dtype=dtype, attention=attention)


def versions(packages: Iterable[str]) -> dict[str, str]:
    try:
        return {name: version(name).partition("+")[0] for name in packages}
    except PackageNotFoundError as error:
        raise UsageError(
            f"This needs the package {error.name}, which is not installed (pip install {error.name})."
        ) from None


def coarsest_dtype(record: Mapping[str, str]) -> str:
    """The coarser dtype of the weights and of the head's operands; empty if the record has an unknown one, or none."""
    dtypes = [record.get("dtype", ""), record.get("head_dtype", "float32")]
    coarsest_first = ("bfloat16", "float16", "float32")
    if not set(dtypes).issubset(coarsest_first):
        return ""
    return min(dtypes, key=coarsest_first.index)


def numerics_id(record: dict[str, str]) -> str:
    # The letter keeps YAML from reading an id of digits as a number.
    return "n" + hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:15]


def differences(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """Describe how two records differ: `torch 2.13.0 -> 2.11.0, dtype ...`."""
    keys = [key for key in sorted(mine.keys() | other.keys()) if mine.get(key) != other.get(key)]
    return ", ".join(f"{key} {other.get(key)} -> {mine.get(key)}" for key in keys) or "nothing"
