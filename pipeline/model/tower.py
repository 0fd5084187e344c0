"""The tower of a model that sees images: its encoder and projector, everything but the language model.

A model whose forward also takes features computes without its tower, and the tower makes features without the language model.
Each part can be loaded alone: the other is neither read nor allocated.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

Part = Literal["whole", "language", "tower"]


def tower_names(model: Any) -> list[str]:
    """List the modules and parameters that make up the tower, also if it was left out; none if the model has no tower.

    Also none if the model's own forward takes no features: such a model always needs its tower.
    """
    base, decoder = getattr(model, model.base_model_prefix, model), model.get_decoder()
    if decoder is base or "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        return []
    children = {**base._modules, **base._parameters}
    return [f"{model.base_model_prefix}.{name}" for name, child in children.items() if child is not decoder]


def tower_pattern(model: Any) -> str | None:
    """Return a pattern that matches the names of everything in the tower; None without a tower."""
    names = tower_names(model)
    return rf"(?:{'|'.join(map(re.escape, names))})(?:\..*)?" if names else None


def tower_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The tower's parameters by their names in the model; none if it was left out."""
    pattern = tower_pattern(model)
    return {name: p for name, p in model.named_parameters() if pattern and re.fullmatch(pattern, name)}


def tower_modules(model: Any) -> set[torch.nn.Module]:
    """The modules of the tower; none if it was left out."""
    parts = (model.get_submodule(name) for name in tower_names(model) if _is_module(model, name))
    return {module for part in parts for module in part.modules()}


def _is_module(model: Any, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return isinstance(model.get_submodule(owner)._modules.get(own), torch.nn.Module)


class UsedParameters:
    """Makes every forward a function of the tower's trained parameters, so that each has a gradient, if only zeros.

    All processes must have gradients of the same parameters, also those whose examples have no image.
    """

    def __init__(self, model: Any) -> None:
        modules = [*tower_modules(model), getattr(model, model.base_model_prefix, model)]
        names = {id(p) for p in tower_parameters(model).values() if p.requires_grad}
        # By their modules: of a sharded model, the parameters within a forward are other objects.
        self._owners = [(m, name) for m in modules for name, p in m._parameters.items() if id(p) in names]

    def add_to(self, values: torch.Tensor) -> torch.Tensor:
        """Return the same values, as a function of the parameters."""
        if not self._owners or not torch.is_grad_enabled():
            return values
        first = torch.stack([getattr(owner, name).flatten()[0].float() for owner, name in self._owners])
        return values + 0 * first.sum().to(values.dtype)


def part_class(model_class: Any, part: Part) -> Any:
    """Return a subclass whose models never allocate the other part; `model_class` itself for the whole."""
    if part == "whole":
        return model_class

    def init(self: Any, config: Any, *more: Any, **options: Any) -> None:
        model_class.__init__(self, config, *more, **options)
        names = tower_names(self)
        if not names:
            return
        if part == "tower":
            names = _names_outside_tower(self, names)
            self.all_tied_weights_keys = {}
        for name in names:
            owner, _, own = name.rpartition(".")
            setattr(self.get_submodule(owner), own, None)
        # Its values come from the file, and an initialization would stumble over what is gone.
        getattr(self, self.base_model_prefix)._is_hf_initialized = True
        ignored = {*(self._keys_to_ignore_on_load_unexpected or ()), *(rf"^{re.escape(name)}(\.|$)" for name in names)}
        self._keys_to_ignore_on_load_unexpected = ignored

    members: Mapping[str, Any] = {"__init__": init, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), dict(members))


def _names_outside_tower(model: Any, tower: list[str]) -> list[str]:
    """Names of the language model and of the head."""
    base, prefix = getattr(model, model.base_model_prefix), model.base_model_prefix
    inside = (f"{prefix}.{name}" for name in {**base._modules, **base._parameters})
    outside = (name for name, module in model._modules.items() if module is not base)
    return [name for name in (*inside, *outside) if name not in tower]
