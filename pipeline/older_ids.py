"""Ids as earlier versions computed them: from whole weight files, and from every byte of a tokenizer's files.

Caches, preparations and runs made under such an id stay usable if the id determines what is loaded.
"""

from pathlib import Path
from typing import Any

from prefcache.pipeline import identity, model_config, model_files
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.safetensors_files import Digests, tensor_names


def older_identity(reference: Reference, digests: Digests) -> dict[str, Any] | None:
    """Return the earlier version's id; None where that id does not tell what loads.

    It hashed every weight file of the folder and not the index, so it tells only where the index had no choice; and it
    sorted the patterns of an adapter, so it tells only where there was at most one of a kind.
    """
    if model_files.select_weights(reference.folder).promised:
        names = [name for file in reference.folder.glob("*.safetensors") for name in tensor_names(file)]
        if len(set(names)) != len(names):
            return None
    if reference.adapter is not None:
        settings = model_config.read_object(reference.adapter / model_files.ADAPTER_CONFIG)
        patterns = [settings.get(key) for key in identity.ORDERED_PATTERNS]
        if any(len(each) > 1 for each in patterns if isinstance(each, dict)):
            return None
    content = older_facts(reference)
    content["weights"] = {name: digests.hash_whole(reference.folder / name) for name in content["weights"]}
    if reference.adapter is not None:
        content["adapter"]["weights"] = digests.hash_whole(reference.adapter / model_files.ADAPTER_WEIGHTS)
    return {"model_id": identity.hash_json(content), **content}


def older_facts(reference: Reference) -> dict[str, Any]:
    """What such an id was made from, without the hashes."""
    config = model_config.read_object(reference.folder / model_config.FILE)
    content: dict[str, Any] = {
        "weights": {file.name: None for file in sorted(reference.folder.glob("*.safetensors"))},
        "config": identity.without_nested_keys(config, identity.VOLATILE_IN_OLDER_IDS),
    }
    if reference.adapter is not None:
        settings = model_config.read_object(reference.adapter / model_files.ADAPTER_CONFIG)
        settings = identity.without_keys(settings, identity.VOLATILE_IN_ADAPTERS)
        for key, value in settings.items():
            if isinstance(value, list) and all(isinstance(each, str) for each in value):
                settings[key] = sorted(value)
        content["adapter"] = {"weights": None, "config": settings}
    if reference.quantization is not None:
        content["quantization"] = identity.QUANTIZED[reference.quantization]
    return content


def older_tokenizer_id(folder: Path) -> str:
    return identity.hash_bytes(folder, identity.OLDER_TOKENIZER_FILES)
