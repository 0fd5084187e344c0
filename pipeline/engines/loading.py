"""A frozen model from its files, and the plain forward that every engine is compared with.

Shapes: O and I, what a layer gives and takes.
"""

import copy
import os
import warnings
from collections.abc import Sequence as SequenceOf
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from pipeline.errors import ResourceError, UsageError
from pipeline.identity import Reference, attention_kernel
from pipeline.logprobs import plain_logps, use_float32_head
from pipeline.schema import Sequence

logging.disable_progress_bar()


def load_frozen(reference: Reference, dtype: str, attention: str, device: str) -> Any:
    """The reference in memory: without gradients, in eval mode. It is a Transformers model, also with an adapter."""
    kernel = attention_kernel(reference.folder, attention)
    if device == "cuda":
        # Of several processes on a machine each has a GPU of its own; a batch system may show each but one.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        device = f"cuda:{torch.cuda.current_device()}"
    try:
        loaded = _whole(reference, dtype, kernel, device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        quantized = f" in {reference.quantization} (score.quantization)" if reference.quantization else ""
        raise UsageError(
            f"{reference.folder} does not load as a causal language model{quantized} ({_reason(error)})."
        ) from None
    if reference.adapter is not None:
        loaded = _with_adapter(loaded, reference.adapter, device)
    return loaded.eval().requires_grad_(False)


def _whole(reference: Reference, dtype: str, kernel: str, device: str) -> Any:
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


def _with_adapter(base: Any, adapter: Path, device: str) -> Any:
    """The base with the adapter in its layers, as a trainer computes it.

    It is not merged: in bfloat16 the sum of both would be rounded, and most of a small adapter with it; quantised weights
    take none; and where input and output embeddings are tied, merging into one would change the other.
    """
    # Takes seconds to import, and few references need it.
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns of weights that the adapter's config asks for and its file lacks.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(adapter), torch_device=device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"{adapter} does not load as an adapter of {base.name_or_path} ({_reason(error)}). Name the model that it was "
            "trained on."
        ) from None
    loaded = adapted.get_base_model()
    _plain_head(loaded)
    return loaded


def _plain_head(loaded: Any) -> None:
    """The head is computed in float32 from its weight alone, so what the adapter does to it goes into a copy of that."""
    head = loaded.get_output_embeddings()
    merge = getattr(head, "unload_and_optionally_merge_module", None)
    if merge is None and not hasattr(head, "base_layer"):
        return
    head = copy.deepcopy(head).float()
    if merge is not None:
        head = head.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        head.merge()
        head = head.get_base_layer()
    loaded.set_output_embeddings(head)
    use_float32_head(loaded, frozen=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# -- the plain forward -----------------------------------------------------------------------------------------------


def plain_scores(reference: Reference, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
    """Log-probs by the plain one-by-one float32 forward of Transformers, of the same quantised weights if they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        plain = load_frozen(reference, "float32", "sdpa", device)
        with torch.inference_mode():
            return [plain_logps(plain, sequence).cpu().numpy() for sequence in sequences]
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"{reference.folder} does not fit in memory in float32, in which a sample is checked. Set "
            "score.parity_sample=0 to score without that check."
        ) from None
