"""A model's weights in memory, as scoring and training both load them: whole, quantised, with an adapter in their layers.

Shapes: O and I, what a layer gives and takes.
"""

import copy
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.errors import UsageError
from pipeline.identity import Reference
from pipeline.model import products
from pipeline.model.logprobs import use_float32_head


def whole(reference: Reference, dtype: str, kernel: str, device: torch.device | str) -> Any:
    """The model without its adapter; its weights are quantised if the reference says so."""
    products.use_onednn()
    try:
        return _loaded(reference, dtype, kernel, device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # Transformers raises many kinds for a folder that is not right.
        quantized = f" in {reference.quantization} (score.quantization)" if reference.quantization else ""
        raise UsageError(
            f"{reference.folder} does not load as a causal language model{quantized} ({_reason(error)})."
        ) from None


def _loaded(reference: Reference, dtype: str, kernel: str, device: torch.device | str) -> Any:
    options: dict[str, Any] = {"attn_implementation": kernel, "use_safetensors": True, "device_map": {"": device}}
    if reference.quantization is None:
        return AutoModelForCausalLM.from_pretrained(reference.folder, dtype=getattr(torch, dtype), **options)
    _refuse_without_bitsandbytes(reference.quantization)
    # Quantised from float32 whatever the dtype, so that all dtypes compute with the very same quantised weights.
    settings = _quantization(reference.quantization, getattr(torch, dtype))
    loaded = AutoModelForCausalLM.from_pretrained(
        reference.folder, dtype=torch.float32, quantization_config=settings, **options
    )
    for parameter in loaded.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    for module in loaded.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_weights_only, module)
    return loaded


def mend_generation_config(config: Any) -> None:
    """Some models are published with a temperature but without do_sample, and then refuse to be saved."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


# -- quantised weights -----------------------------------------------------------------------------------------------


def _refuse_without_bitsandbytes(quantization: str) -> None:
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise UsageError(
            f"score.quantization={quantization} needs bitsandbytes. Install it (pip install 'prefcache[quantized]'), or "
            "leave score.quantization out."
        ) from None


def _quantization(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _weights_only(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What an 8-bit layer computes here. Its own forward quantises the input as well, apart from columns that are large
    anywhere in it: a token's log-prob would depend on later tokens and on what else is in the row."""
    scale_O = layer.weight.SCB / 127
    weight_OI = (layer.weight.float() * scale_O.unsqueeze(1)).to(hidden.dtype)
    return F.linear(hidden, weight_OI, None if layer.bias is None else layer.bias.to(hidden.dtype))


# -- adapters --------------------------------------------------------------------------------------------------------


def with_frozen_adapter(base: Any, adapter: Path, device: str) -> Any:
    """The base with the adapter in its layers, as a trainer computes it.

    It is not merged: in bfloat16 the sum of both would be rounded, and most of a small adapter with it; quantised weights
    take none; and where input and output embeddings are tied, merging into one would change the other.
    """
    loaded = with_adapter(base, adapter, device).get_base_model()
    plain_head(loaded)
    return loaded


def with_adapter(base: Any, adapter: Path, device: torch.device | str, *, trainable: bool = False) -> Any:
    """PEFT's model: it and the model in it share layers."""
    # Takes seconds to import, and few models need it.
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns of weights that the adapter's config asks for and its file lacks.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(base, str(adapter), torch_device=str(device), is_trainable=trainable)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"{adapter} does not load as an adapter of {base.name_or_path} ({_reason(error)}). Name the model that it was "
            "trained on."
        ) from None


def has_adapted_head(loaded: Any) -> bool:
    head = loaded.get_output_embeddings()
    return hasattr(head, "unload_and_optionally_merge_module") or hasattr(head, "base_layer")


def plain_head(loaded: Any) -> None:
    """The head is computed in float32 from its weight alone, so what the adapter does to it goes into a copy of that."""
    if not has_adapted_head(loaded):
        return
    head = copy.deepcopy(loaded.get_output_embeddings()).float()
    if hasattr(head, "unload_and_optionally_merge_module"):
        head = head.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        head.merge()
        head = head.get_base_layer()
    loaded.set_output_embeddings(head)
    use_float32_head(loaded, frozen=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
