"""Load a model's weights, for scoring and training alike: complete, quantized, with an adapter in their layers.

Shapes: O outputs and I inputs of a layer.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import logging

from prefcache.pipeline.errors import PrefcacheError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model.lm_head import set_head_dtype
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.model.tower import Part, part_class
from prefcache.pipeline.model_files import ADAPTER_WEIGHTS, select_weights
from prefcache.pipeline.progress import working
from prefcache.pipeline.safetensors_files import shorten_list, tensor_dtypes
from prefcache.pipeline.tokenizer import refuse_own_code

logging.disable_progress_bar()  # ours counts sequences and steps

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors files


def load_base(reference: Reference, dtype: str, kernel: str, device: torch.device | str, part: Part = "whole") -> Any:
    """Load the model without its adapter, with quantized weights if the reference asks for them.

    Of a model that sees images, the language model or the tower can be loaded alone (tower.py).
    """
    reference.refuse_unconverted()
    options: dict[str, Any] = {"attn_implementation": kernel, "use_safetensors": True, "device_map": {"": device}}
    try:
        with working(f"load {reference.folder}"):
            if reference.quantization is None:
                model = _from_pretrained(reference.folder, part, dtype=getattr(torch, dtype), **options)
            else:
                model = _load_quantized(reference.folder, part, reference.quantization, getattr(torch, dtype), options)
    except Exception as error:  # Transformers raises many kinds for a broken folder.
        if is_out_of_memory(error) or isinstance(error, PrefcacheError):
            raise
        refuse_own_code(error, reference.folder)
        quantized = f" in {reference.quantization} (score.quantization)" if reference.quantization else ""
        raise UsageError(
            f"{reference.folder} does not load as a causal language model{quantized} ({_describe(error)})."
        ) from None
    # In eval mode RWKV halves the weights of later layers in place and hidden states with them, against overflow in float16.
    # Trained weights would be saved halved, and halved again when loaded. Without it the model computes what it does in
    # training mode, which differs only by the epsilon of the norms.
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = lambda: None
    return model


def _from_pretrained(folder: Path, part: Part = "whole", **options: Any) -> Any:
    """Load the model, or a part of it, if the folder has exactly the tensors that it needs, in its shapes."""
    model_class = _model_class(folder)
    is_part = part != "whole" and issubclass(model_class, PreTrainedModel)
    model, info = (part_class(model_class, part) if is_part else model_class).from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    if is_part:
        model.__class__ = model_class
    name = type(model).__name__
    if missing := set(info["missing_keys"]):
        raise UsageError(
            f"{folder} lacks tensors of {name}: {shorten_list(missing)}. Random values would take their place. Save or fetch "
            "the model again."
        )
    if info["mismatched_keys"]:
        shapes = [f"{key} {list(theirs)} (expected {list(ours)})" for key, theirs, ours in info["mismatched_keys"]]
        raise UsageError(
            f"{folder} has tensors of other shapes than {name} in its config.json: {shorten_list(shapes)}. Put config and "
            "weights of one model together."
        )
    # A model that was saved quantized may hold tensors that Transformers does not use, such as scales of activations.
    unexpected = set() if getattr(model, "is_quantized", False) else set(info["unexpected_keys"])
    if unexpected:
        raise UsageError(
            f"{folder} has tensors that {name} does not have: {shorten_list(unexpected)}. They would be left out. See whether "
            "config.json is that of these weights, or save the model without them."
        )
    if info["error_msgs"]:
        raise UsageError(f"{folder} does not load whole: {' '.join(map(str, info['error_msgs']))[:300]}")
    return model


def _model_class(folder: Path) -> Any:
    """The class that loads the whole model: with its tower, if it sees images."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return _get_model_class(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)


def make_language_model(config: Any, **options: Any) -> Any:
    """Make the model of a config with random weights; of one that sees images, without its tower."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    model_class = _get_model_class(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    model = part_class(model_class, "language")._from_config(config, **options)
    model.__class__ = model_class
    return model


def read_tower(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of the model's tower as they are stored, by their names in the model."""
    dtypes = {dtype for file in select_weights(folder).files for dtype in tensor_dtypes(file)} & _DTYPES.keys()
    # If there are several, the one that holds the values of all.
    dtype = _DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
    model = _from_pretrained(folder, "tower", dtype=dtype, use_safetensors=True, device_map={"": "cpu"})
    return dict(model.state_dict())


def check_tensors(reference: Reference) -> str | None:
    """Refuse a folder that lacks tensors, as loading does, without reading weights; or return why this is unknown."""
    try:
        _from_pretrained(reference.folder, use_safetensors=True, device_map={"": "meta"})
    except UsageError:
        raise
    except Exception as error:  # It may be quantized in a way, or of a kind, that only the other engine knows.
        refuse_own_code(error, reference.folder)
        return f"whether {reference.folder} has all tensors of its model was not checked ({_describe(error)})"
    return None


def fix_generation_config(config: Any) -> None:
    """Repair a config with a temperature but without do_sample, which some models ship with and then refuse to save."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# -- quantized weights -----------------------------------------------------------------------------------------------


def _load_quantized(folder: Path, part: Part, quantization: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise UsageError(
            f"score.quantization={quantization} needs bitsandbytes. Install it (pip install 'prefcache[quantized]'), or "
            "leave score.quantization out."
        ) from None
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Quantized from float32 whatever the dtype, so that all dtypes compute with the very same quantized weights.
    model = _from_pretrained(folder, part, dtype=torch.float32, quantization_config=config, **options)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_multiply_8bit_weights, module)
    return model


def _multiply_8bit_weights(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Dequantize an 8-bit layer's weights and multiply.

    The layer's own forward also quantizes its input, except for columns with a large value anywhere: a token's log-prob would
    depend on later tokens and on the rest of the row.
    """
    scale_O = layer.weight.SCB / 127
    weight_OI = (layer.weight.float() * scale_O.unsqueeze(1)).to(hidden.dtype)
    return F.linear(hidden, weight_OI, None if layer.bias is None else layer.bias.to(hidden.dtype))


# -- adapters --------------------------------------------------------------------------------------------------------


def load_frozen_adapter(base: Any, adapter: Path, device: str) -> Any:
    """Put an adapter into the base's layers, as a trainer computes it.

    It is not merged. In bfloat16 the sum of both would be rounded, and most of a small adapter with it; quantized weights cannot
    take one; and with tied embeddings, merging into the input or output embeddings would change the other.
    """
    model = load_adapter(base, adapter, device).get_base_model()
    fold_head_adapter(model)
    return model


def load_adapter(base: Any, adapter: Path, device: torch.device | str, *, trainable: bool = False) -> Any:
    """Return PEFT's model, which shares its layers with the base."""
    # Takes seconds to import, and few models need it.
    from peft import PeftModel, set_peft_model_state_dict

    try:
        with working(f"load {adapter}"), ignore_pattern_warnings():
            # PEFT only warns about weights that the adapter's config asks for and its file lacks.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(
                base, str(adapter), torch_device=str(device), is_trainable=trainable, trust_remote_code=False
            )
        # PEFT ignores tensors that have no place in the model, and reports them only when they are loaded again.
        unexpected = set_peft_model_state_dict(model, load_file(adapter / ADAPTER_WEIGHTS)).unexpected_keys
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, PrefcacheError):
            raise
        raise UsageError(
            f"{adapter} does not load as an adapter of {base.name_or_path} ({_describe(error)}). Name the model that it was "
            "trained on."
        ) from None
    if unexpected:
        raise UsageError(
            f"{adapter} has tensors for which its adapter_config.json has no place in the model: "
            f"{shorten_list(unexpected)}. Name the model that it was trained on, and the config that was saved "
            "with it."
        )
    return model


@contextlib.contextmanager
def ignore_pattern_warnings() -> Iterator[None]:
    """Ignore PEFT's warnings that patterns fit no module.

    Ranks that it sets itself, for the experts of all-linear, fit parameters. A tower that is excluded may not be loaded.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You have passed exclude_modules=")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def has_adapted_head(model: Any) -> bool:
    head = model.get_output_embeddings()
    return hasattr(head, "unload_and_optionally_merge_module") or hasattr(head, "base_layer")


def fold_head_adapter(model: Any) -> None:
    """Merge an adapter of the head into a float32 copy of it, because the head is computed from its weight alone."""
    if not has_adapted_head(model):
        return
    head = copy.deepcopy(model.get_output_embeddings()).float()
    if hasattr(head, "unload_and_optionally_merge_module"):
        head = head.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        head.merge()
        head = head.get_base_layer()
    model.set_output_embeddings(head)
    set_head_dtype(model, "float32", frozen=True)
