"""The features of a reference's images: computed by its own tower, and cached for training."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from prefcache.pipeline import identity
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model.tower import tower_names
from prefcache.pipeline.model.vision import (
    ComputedFeatures,
    FeatureSource,
    ImageFeatures,
    VisionTower,
    encode_image,
    pack,
)
from prefcache.pipeline.stored import feature_writer


class CachedFeatures:
    """A source of features: the store of the reference's tower, which `compute` fills; without a store, the live tower."""

    def __init__(
        self, model: Any, images: PromptImages, reference: Reference, device: str, dtype: str, kernel: str
    ) -> None:
        self._model, self._images, self._store = model, images, None
        self._source: FeatureSource = VisionTower(model, images)
        if images.features_root is not None and tower_names(model):
            numerics = identity.tower_numerics(reference, device, dtype, kernel)
            self._store = feature_writer.open_store(images.features_root, reference, numerics)
            self._source = ComputedFeatures(self._store, next(model.parameters()).device)

    def compute(self, images: Collection[bytes]) -> None:
        """Compute and store the features of those images that are missing."""
        if self._store is not None:
            with torch.inference_mode():
                feature_writer.fill(
                    self._store, images, lambda image: pack(encode_image(self._model, self._images.inputs(image)))
                )

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        return self._source.features(images)
