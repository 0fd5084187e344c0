"""What of a model is trained, all of it or an adapter, and what its layers keep for the backward pass.

Whatever is trained, `model` is the Transformers model that computes; an adapter lives in its layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from pipeline import identity
from pipeline.config import Lora, Train
from pipeline.errors import UsageError
from pipeline.identity import Reference
from pipeline.model import weights

# Keys of train.lora by PEFT's names.
_PEFT = {
    "r": "r",
    "alpha": "lora_alpha",
    "target_modules": "target_modules",
    "dora": "use_dora",
    "rslora": "use_rslora",
}


@dataclass(frozen=True)
class Trainable:
    model: Any
    adapter: Any | None  # PEFT's model, where an adapter is trained
    notes: list[str]  # for a person

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """What is to be saved: all of the model, or the adapter."""
        if self.adapter is None:
            return dict(self.model.state_dict(keep_vars=True))
        return {name: each for name, each in self.adapter.state_dict(keep_vars=True).items() if each.requires_grad}

    def save(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """As PEFT or Transformers saves it. `state`: what `state()` gives, where that had to be gathered."""
        if self.adapter is None:
            self.model.save_pretrained(folder, state_dict=state)
        else:
            # No embeddings of the base beside it: nothing here changes them, and asking whether would ask the hub.
            self.adapter.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def each_tensor(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a safetensors file, one after another. A file that is mapped as a whole would count as a second model in memory."""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    for name in names:
        with safe_open(file, "pt") as opened:
            yield name, opened.get_tensor(name)


def put(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Other values in a parameter's place; of an adapter, perhaps of another rank."""
    if parameter.shape != value.shape:
        parameter.data = parameter.data.new_empty(value.shape)
    parameter.data.copy_(value)


def load(start: Reference, train: Train, kernel: str, device: torch.device) -> Trainable:
    """In eval mode there is no dropout, which would make policy and reference differ at the start; gradients still flow."""
    if start.quantization and device.type == "cpu":
        raise UsageError(
            f"score.quantization={start.quantization}: an adapter is trained on quantised weights on a GPU only. Leave it out, "
            "or train where there is a GPU."
        )
    lora = train.lora
    model = weights.whole(start, lora.base_dtype if lora else "float32", kernel, device)
    if lora is None and getattr(model, "is_quantized", False):
        raise UsageError(
            f"{start.folder} has quantised weights, which cannot be trained; an adapter on them can (train.lora={{}})."
        )
    weights.mend_generation_config(model.generation_config)
    adapter = None if lora is None else _with_adapter(model, start, lora, train.seed, device)
    model.eval()
    notes = [] if adapter is None else [_share_of(adapter)]
    if train.gradient_checkpointing and (reason := recompute_layers(model)):
        notes.append(f"layers are not recomputed in the backward pass (train.gradient_checkpointing): {reason}")
    return Trainable(model, adapter, notes)


def _share_of(adapter: Any) -> str:
    trained, everything = adapter.get_nb_trainable_parameters()  # which knows how many a quantised weight stands for
    return f"an adapter of {trained:,} parameters is trained; the other {everything - trained:,} stay as they are"


# -- adapters --------------------------------------------------------------------------------------------------------


def _with_adapter(model: Any, start: Reference, lora: Lora, seed: int, device: torch.device) -> Any:
    if start.adapter is None:
        adapted = _new_adapter(model, lora, seed)
    else:
        adapted = weights.with_adapter(model, start.adapter, device, trainable=True)
        _refuse_another_shape(start.adapter, adapted.active_peft_config, lora)
    if weights.has_adapted_head(model):
        raise UsageError(
            f"{start.adapter} adapts the head, which is computed from its own weight alone while training. Merge it "
            f"(prefcache merge {start.adapter} --output FOLDER), and start from FOLDER."
        )
    name, revision = identity.found_again_as(start.folder)
    adapted.active_peft_config.base_model_name_or_path = name
    adapted.active_peft_config.revision = revision
    return adapted


def _new_adapter(model: Any, lora: Lora, seed: int) -> Any:
    # Takes seconds to import.
    from peft import LoraConfig, get_peft_model

    _check_layers(model, lora.target_modules)
    every = lora.target_modules == ("all-linear",)
    settings = {theirs: getattr(lora, ours) for ours, theirs in _PEFT.items()}
    settings["target_modules"] = "all-linear" if every else list(lora.target_modules)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))


def _check_layers(model: Any, wanted: tuple[str, ...]) -> None:
    """PEFT refuses names only where none of them is a layer's."""
    if wanted == ("all-linear",):
        return
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    known = sorted({name.rpartition(".")[2] for name, each in layers.items() if each is not head})
    for name in wanted:
        found = [each for layer, each in layers.items() if f".{layer}".endswith(f".{name}")]
        if not found:
            raise UsageError(
                f"train.lora.target_modules: the model has no linear layer {name!r}. It has {', '.join(known)}; "
                "all-linear takes all of them."
            )
        if any(each is head for each in found):
            raise UsageError(
                f"train.lora.target_modules: {name} is the head, which is computed in float32 from its own weight alone and "
                f"takes no adapter. Name others: {', '.join(known)}."
            )


def _refuse_another_shape(folder: Path, config: Any, lora: Lora) -> None:
    """An adapter that exists is trained as it is; what the config says otherwise would be passed over."""
    for ours, theirs in _PEFT.items():
        said, found = getattr(lora, ours), getattr(config, theirs, None)
        if said == Lora.model_fields[ours].default:
            continue
        if ours == "target_modules":
            said, found = ", ".join(sorted(said)), ", ".join(sorted(found or ()))
        if said != found:
            raise UsageError(
                f"train.lora.{ours}={said}: the policy starts from {folder}, which has {found}, and trains that adapter "
                "further. Leave the setting out, or merge the adapter (prefcache merge) and start from the result."
            )


# -- the backward pass -----------------------------------------------------------------------------------------------


def recompute_layers(model: Any) -> str | None:
    """Keep only the input of each layer for the backward pass, which computes the layer once more; or say why not.

    The layers are those that Transformers would recompute. It does so in training mode only, where dropout is active and
    policy and reference would differ; so their forwards are wrapped here.
    """
    found = layers(model)
    if not found or not model.supports_gradient_checkpointing:
        return f"Transformers recomputes no layer of {type(model).__name__}"
    for layer in found:
        layer.forward = _recomputed(layer.forward)
    return None


def layers(model: Any) -> list[torch.nn.Module]:
    """What a model is a stack of."""
    return [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*inputs: Any, **further: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **further)
        # In eval mode nothing is drawn at random, so no state of a generator has to be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **further)

    return recomputed
