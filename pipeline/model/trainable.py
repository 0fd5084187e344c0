"""The trainable part of a model, which is all of it or an adapter, and gradient checkpointing.

In both cases `model` is the Transformers model that computes; an adapter lives in its layers.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from prefcache.pipeline import model_config, model_files
from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import weights
from prefcache.pipeline.model.offload import OffloadedInputs
from prefcache.pipeline.model.tower import Part, tower_names, tower_pattern

# Keys of train.lora and their names in PEFT.
_PEFT_NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "dora": "use_dora",
    "rslora": "use_rslora",
}


@dataclass(frozen=True)
class Trainable:
    model: Any
    adapter: Any | None  # PEFT's model, if an adapter is trained
    notes: list[str]  # to print
    tower: Path | None = None  # the folder of the model whose tower was left out

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors to save: the whole model's, or the adapter's."""
        if self.adapter is None:
            return dict(self.model.state_dict(keep_vars=True))
        return {name: p for name, p in self.adapter.state_dict(keep_vars=True).items() if p.requires_grad}

    def save(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Save as PEFT or Transformers does. `state` is that of `state()`, if it had to be gathered."""
        if self.adapter is None:
            state = self.model.state_dict() if state is None else state
            left_out = weights.read_tower(self.tower) if self.tower else {}
            self.model.save_pretrained(folder, state_dict=state | left_out)
        else:
            # Without the base's embeddings: nothing here changes them, and checking that would ask the hub.
            self.adapter.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a safetensors file one by one. Mapping the whole file would count as a second model in memory."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise IntegrityError(
            f"{file} cannot be read as safetensors ({error}). Delete {file.parent}, and the run resumes from the previous checkpoint."
        ) from error
    for name in names:
        with safe_open(file, "pt") as opened:
            yield name, opened.get_tensor(name)


def assign(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replace a parameter's values in place. Those of an adapter may have another rank."""
    if parameter.shape != value.shape:
        parameter.data = parameter.data.new_empty(value.shape)
    parameter.data.copy_(value)


def load(start: Reference, train: Train, kernel: str, device: torch.device, *, trains_tower: bool = False) -> Trainable:
    """Load the policy in eval mode: dropout would make policy and reference differ at the start. Gradients still flow.

    A vision tower that is not trained is not loaded.
    """
    if start.quantization and device.type == "cpu":
        raise UsageError(
            f"score.quantization={start.quantization}: an adapter is trained on quantized weights on a GPU only. Leave it out, "
            "or train where there is a GPU."
        )
    lora = train.lora
    part: Part = "whole" if trains_tower else "language"
    model = weights.load_base(start, lora.base_dtype if lora else train.weights, kernel, device, part)
    if lora is None and getattr(model, "is_quantized", False):
        raise UsageError(
            f"{start.folder} has quantized weights, which cannot be trained; an adapter on them can (train.lora={{}})."
        )
    if model.config.model_type == "reformer":
        # Its reversible layers have no backward pass in eval mode.
        raise UsageError(
            f"{start.folder} is a Reformer, which Transformers trains with dropout only. Use another model."
        )
    weights.fix_generation_config(model.generation_config)
    adapter, notes = None, list[str]()
    saved = model_config.read(start.folder).saved_dtype
    if train.weights == "bfloat16" and saved != "bfloat16":
        notes.append(f"weights that were saved in {saved} are rounded to bfloat16 (train.weights)")
    if lora is not None:
        adapter = _add_adapter(model, start, lora, train.seed, device)
        n_trained, n = adapter.get_nb_trainable_parameters()  # counts what quantized weights stand for
        notes.append(f"an adapter of {n_trained:,} parameters is trained; the other {n - n_trained:,} stay as they are")
        notes += _describe_experts(model, train)
    model.eval()
    inputs = OffloadedInputs() if "activations" in train.offload else None
    if train.gradient_checkpointing and (reason := recompute_layers(model, inputs)):
        notes.append(f"layers are not recomputed in the backward pass (train.gradient_checkpointing): {reason}")
    left_out = start.folder if not trains_tower and tower_names(model) else None
    return Trainable(model, adapter, notes, left_out)


# -- adapters --------------------------------------------------------------------------------------------------------


def _add_adapter(model: Any, start: Reference, lora: Lora, seed: int, device: torch.device) -> Any:
    if start.adapter is not None:
        adapted = weights.load_adapter(model, start.adapter, device, trainable=True)
        _refuse_other_shape(start.adapter, adapted.active_peft_config, lora)
    else:
        adapted = create_adapter(model, lora, seed)
    if weights.has_adapted_head(model):
        raise UsageError(
            f"{start.adapter} adapts the head, which is computed from its own weight alone while training. Merge it "
            f"(prefcache merge {start.adapter} --output FOLDER), and start from FOLDER."
        )
    name, revision = model_files.name_anywhere(start.folder)
    adapted.active_peft_config.base_model_name_or_path = name
    adapted.active_peft_config.revision = revision
    return adapted


def create_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """Add a new adapter to the model's layers; return PEFT's model of both."""
    # Takes seconds to import.
    from peft import LoraConfig, get_peft_model

    settings = {peft_name: getattr(lora, name) for name, peft_name in _PEFT_NAMES.items()}
    settings["target_parameters"] = list(lora.target_parameters)
    _refuse_unknown_experts(model, lora.target_parameters)
    if lora.target_modules == ("all-linear",):
        settings["target_modules"] = "all-linear"
    else:
        _refuse_unknown_layers(model, lora.target_modules)
        settings["target_modules"] = list(lora.target_modules)
    # Layers of a tower often have the names of the language model's: whoever loads the adapter must not adapt them.
    settings["exclude_modules"] = tower_pattern(model)
    torch.manual_seed(seed)
    try:
        with weights.ignore_pattern_warnings():
            return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise UsageError(f"train.lora: PEFT does not make this adapter of {type(model).__name__} ({error}).") from None


def _refuse_unknown_layers(model: Any, wanted: tuple[str, ...]) -> None:
    """Refuse any name without a layer. PEFT refuses only if no name has one."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    known = ", ".join(sorted({name.rpartition(".")[2] for name, layer in layers.items() if layer is not head}))
    for name in wanted:
        matches = [layer for path, layer in layers.items() if f".{path}".endswith(f".{name}")]
        if not matches:
            raise UsageError(
                f"train.lora.target_modules: the model has no linear layer {name!r}. It has {known}; "
                "all-linear takes all of them."
            )
        if any(layer is head for layer in matches):
            raise UsageError(
                f"train.lora.target_modules: {name} is the head, which is computed in float32 from its own weight alone and "
                f"takes no adapter. Name others: {known}."
            )


def _refuse_unknown_experts(model: Any, wanted: tuple[str, ...]) -> None:
    experts = _fused_experts(model)
    known = ", ".join(sorted({name.rpartition(".")[2] for name in experts}))
    for name in wanted:
        if not any(f".{path}".endswith(f".{name}") for path in experts):
            lack = f"It has {known}" if known else "It has none; name its layers in train.lora.target_modules"
            raise UsageError(f"train.lora.target_parameters: the model has no fused experts {name!r}. {lack}.")


def _fused_experts(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights of a mixture's experts that are one parameter of three dimensions."""
    if not getattr(model.config.get_text_config(), "num_experts_per_tok", None):
        return {}
    return {
        f"{name}.{own}": p
        for name, module in model.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and not isinstance(module, torch.nn.Conv1d)
    }


def adapted_parameters(model: Any) -> dict[str, Any]:
    """PEFT's wrappers of modules whose parameters are adapted as such, by their names. They may be nested."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "ParamWrapper"}


def count_stacked(model: Any) -> dict[str, int]:
    """Names of those LoRA factors in which the factors of several experts are stacked, and the number of experts.

    In a factor A they follow one another. In a factor B the columns of one rank do: those of all experts.
    """
    return {
        f"{name}.{factor}.{adapter}.weight": wrapper.num_experts
        for name, wrapper in adapted_parameters(model).items()
        for factor in ("lora_A", "lora_B")
        for adapter in getattr(wrapper, factor)
    }


def _describe_experts(model: Any, train: Train) -> list[str]:
    """Say which experts take no adapter, and what adapted ones cost."""
    wrappers = list(adapted_parameters(model).values())
    adapted = {id(wrapper.get_param()) for wrapper in wrappers}
    notes = []
    if left_out := {name.rpartition(".")[2] for name, p in _fused_experts(model).items() if id(p) not in adapted}:
        names = ", ".join(sorted(left_out))
        notes.append(f"the experts' {names} take no adapter; train.lora.target_parameters=[{names}] adapts them")
    if any(wrapper.num_experts > 1 for wrapper in wrappers) and not train.gradient_checkpointing:
        notes.append(
            "adapted experts are added to their base in each forward, and the sums are kept for the backward pass: as much memory "
            "again as the experts take; with train.gradient_checkpointing=true it is that of one layer"
        )
    return notes


def _refuse_other_shape(folder: Path, config: Any, lora: Lora) -> None:
    """Refuse settings that differ from an existing adapter's, which is trained as it is."""
    for name, peft_name in _PEFT_NAMES.items():
        wanted, actual = getattr(lora, name), getattr(config, peft_name, None)
        if wanted == Lora.model_fields[name].default:
            continue
        if name in ("target_modules", "target_parameters"):
            wanted, actual = ", ".join(sorted(wanted)), ", ".join(sorted(actual or ()))
        if wanted != actual:
            raise UsageError(
                f"train.lora.{name}={wanted}: the policy starts from {folder}, which has {actual}, and trains that adapter "
                "further. Leave the setting out, or merge the adapter (prefcache merge) and start from the result."
            )


# -- the backward pass -----------------------------------------------------------------------------------------------


def recompute_layers(model: Any, inputs: OffloadedInputs | None = None) -> str | None:
    """Make layers keep only their input and compute once more in the backward pass; or return why that is unsupported.

    `inputs` keeps them on the host meanwhile.

    They are the layers that Transformers would recompute. It does so in training mode only, where dropout is active and policy
    and reference would differ, so their forwards are wrapped here.
    """
    layers = model_layers(model)
    if not layers or not model.supports_gradient_checkpointing:
        return f"Transformers recomputes no layer of {type(model).__name__}"
    for layer in layers:
        layer.forward = Recomputed(layer.forward, inputs)
    return None


def model_layers(model: Any) -> list[torch.nn.Module]:
    """The layers that a model is a stack of."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass
class Recomputed:
    """A layer's forward, computed once more in the backward pass."""

    forward: Callable[..., Any]
    inputs: OffloadedInputs | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with self.inputs.hooks() if self.inputs else contextlib.nullcontext():
            # Eval mode draws no random numbers, so no generator state has to be kept.
            return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
