"""The pictures of a run: what a frozen tower made of them, computed once for all runs, or the policy's own tower."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from prefcache.pipeline import identity
from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import IdentityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model import weights
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.tower import tower_names, tower_parameters
from prefcache.pipeline.model.vision import ComputedFeatures, Vision, VisionTower, encode_image, freeze_unused, pack
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import feature_writer
from prefcache.pipeline.stored.image_features import FeatureStore
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training.dataset import Examples
from prefcache.pipeline.training.distributed import arithmetic

_TRIED_PICTURES = 4


@dataclass(frozen=True)
class RunImages:
    images: frozenset[bytes]  # of all prompts of the run
    inputs: PromptImages
    store: FeatureStore | None  # None: the tower is trained

    @property
    def trains_tower(self) -> bool:
        return self.store is None

    def attach(self, model: Any, device: torch.device) -> Vision:
        """Give the policy's model its way with images."""
        if not tower_names(model):
            raise UsageError(
                f"The examples have images, and a {model.config.model_type} model has no vision tower that prefcache knows how to "
                "train with. Train a model that sees images, or prepare text alone (prefcache prepare CONFIG)."
            )
        if self.store is not None:
            return Vision(model, ComputedFeatures(self.store, device))
        return Vision(model, VisionTower(model, self.inputs, trained=True))

    def describe(self, model: Any) -> list[str]:
        """Lines to print. Of a tower that is trained, what no picture reaches is frozen."""
        if self.store is not None:
            return [f"the vision tower stays as it is and is not loaded: {self.store.folder} has its features"]
        tried = sorted(self.images)[:_TRIED_PICTURES]
        unused = freeze_unused(model, map(self.inputs.inputs, tried))
        parameters = tower_parameters(model)
        n_trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        rest = (
            f"; {len(unused)} of its tensors, which its features do not depend on, stay as they are" if unused else ""
        )
        return [f"the vision tower is trained, {n_trained:,} parameters{rest}"]


def find(
    start: Reference,
    train: Train,
    prepared: Prepared,
    examples: Mapping[str, Examples],
    accelerator: Accelerator,
    root: Path,
    progress: Progress,
) -> RunImages | None:
    """Return the pictures of a run's prompts, computed by a frozen tower if that is missing; None if there are none."""
    lists = (each.images(np.arange(len(each))) for each in examples.values())
    images = frozenset(image for prompts in lists for prompt in prompts for image in prompt)
    inputs = prepared.prompt_images(start.processor) if images else None
    if inputs is None:
        if train.vision == "trained":
            progress.say("train: no example has a picture, so the vision tower stays as it is (train.vision)")
        return None
    _refuse_other_processor(start, inputs, prepared)
    store = None
    if train.vision == "frozen":
        store = _compute_features(start, train, images, inputs, accelerator, root, progress)
    return RunImages(images, inputs, store)


def _refuse_other_processor(start: Reference, inputs: PromptImages, prepared: Prepared) -> None:
    expected = prepared.manifest.inputs.processor_id
    if expected is not None and inputs.processor.id.hex() != expected:
        raise IdentityError(
            f"{start.processor} prepares pictures in another way than when {prepared.folder} was prepared: another size, patches or "
            "normalisation. Prepare again with this model (prefcache prepare CONFIG), or start from another."
        )


def _compute_features(
    start: Reference,
    train: Train,
    images: frozenset[bytes],
    inputs: PromptImages,
    accelerator: Accelerator,
    root: Path,
    progress: Progress,
) -> FeatureStore:
    """Open the store of the start's tower and compute what it lacks, with the tower alone in memory."""
    if identity.tower_adapter(start):
        raise UsageError(
            f"{start.adapter} adapts the vision tower, which is not loaded for training (train.vision=frozen). Merge the adapter "
            "(prefcache merge) and start from the result."
        )
    kernel, dtype = choose_kernel(start.folder, "sdpa"), arithmetic(train, accelerator)
    bare = replace(start, adapter=None)
    store = feature_writer.open_store(root, bare, identity.tower_numerics(bare, accelerator.device.type, dtype, kernel))
    if missing := store.missing(images):
        progress.say(
            f"train: the vision tower computes {len(missing):,} of {len(images):,} pictures, once for all runs"
        )
        model = weights.load_base(bare, dtype, kernel, accelerator.device, "tower").eval().requires_grad_(False)
        with torch.inference_mode():
            feature_writer.fill(
                store,
                missing,
                lambda image: pack(encode_image(model, inputs.inputs(image))),
                first=accelerator.process_index,
            )
        del model
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    store.rescan()
    return store
