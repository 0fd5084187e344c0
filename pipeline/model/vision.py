"""Images in a model's forward: the features of an image replace the embeddings of its tokens in the prompt.

Features come from the tower (`VisionTower`), or from where they were stored (`ComputedFeatures`). Those of one image do not depend
on what else is computed with it. What belongs to the tower, and how to load it alone, is in tower.py.

Shapes: T positions, N image tokens of a picture, D hidden width, K layers to which DeepStack adds features.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model.device import to_device, to_host
from prefcache.pipeline.model.tower import tower_parameters
from prefcache.pipeline.schema import StoredFeatures, TokenSequence

# Models whose image tokens also attend to later tokens of their image. Any other such model fails the trial of a layout, and its
# rows are padded (forward.py).
_BIDIRECTIONAL = {"gemma3", "shieldgemma2"}
_TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}  # keywords of a model's forward: 1 for an image token, else 0
_REMEMBERED_PROMPTS = 4096
Positions = Callable[[int, int], np.ndarray]


class ImageFeatures(NamedTuple):
    """What the decoder gets of one picture."""

    embeds_ND: torch.Tensor
    deep_KND: torch.Tensor | None = None  # of Qwen3-VL's DeepStack
    grid: tuple[int, ...] | None = None  # frames, rows and columns of patches, from which M-RoPE counts positions
    n_tiles: int | None = None  # the tower's output is [tiles, tokens of a tile, D]; None: [N, D]


class FeatureSource(Protocol):
    """Where features come from."""

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        """Return the features of these images, on the model's device."""
        ...


class VisionTower:
    """The model's own tower and projector, run for one picture at a time."""

    def __init__(self, model: Any, images: PromptImages, *, trained: bool = False) -> None:
        self._model, self._images, self._trained = model, images, trained

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        with torch.set_grad_enabled(self._trained and torch.is_grad_enabled()):
            return [encode_image(self._model, self._images.inputs(image)) for image in images]


class FeatureReader(Protocol):
    """Reads stored features: `stored.image_features.FeatureStore`."""

    @property
    def dtype(self) -> str: ...
    def read(self, image: bytes) -> StoredFeatures: ...


class ComputedFeatures:
    """Features that were computed before, by a tower that need not be in memory."""

    def __init__(self, reader: FeatureReader, device: torch.device | str) -> None:
        self._reader, self._device = reader, device

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        return [self._unpack(self._reader.read(image)) for image in images]

    def _unpack(self, stored: StoredFeatures) -> ImageFeatures:
        embeds_ND = self._to_tensor(stored.embeds).view(stored.n_tokens, -1)
        deep_KND = None if stored.deep is None else self._to_tensor(stored.deep).view(-1, *embeds_ND.shape)
        return ImageFeatures(embeds_ND, deep_KND, stored.grid, stored.n_tiles)

    def _to_tensor(self, values: np.ndarray) -> torch.Tensor:
        # A copy: the bytes are a view of a read-only memory map.
        return to_device(torch.from_numpy(values.copy()).view(getattr(torch, self._reader.dtype)), self._device)


def pack(features: ImageFeatures) -> StoredFeatures:
    """Convert features to bytes, bit for bit."""
    embeds, deep = features.embeds_ND, features.deep_KND
    return StoredFeatures(
        _to_bytes(embeds), None if deep is None else _to_bytes(deep), len(embeds), features.grid, features.n_tiles
    )


def _to_bytes(values: torch.Tensor) -> np.ndarray:
    values_N: np.ndarray = to_host(values).contiguous().flatten().view(torch.uint8).numpy()
    return values_N


def encode_image(model: Any, inputs: dict[str, np.ndarray]) -> ImageFeatures:
    """Run the tower and the projector on one picture, which the processor prepared."""
    output = model.get_image_features(**_to_model(model, inputs), return_dict=True)
    pooled = output.pooler_output
    is_list = isinstance(pooled, list | tuple)
    embeds_ND = torch.cat(list(pooled)) if is_list else pooled.flatten(0, -2)
    deep = getattr(output, "deepstack_features", None)
    grid = inputs.get("image_grid_thw")
    return ImageFeatures(
        embeds_ND,
        torch.stack([torch.cat(list(each)) for each in deep]) if deep else None,
        None if grid is None else tuple(grid[0].tolist()),
        None if is_list else len(pooled),
    )


def freeze_unused(model: Any, images: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """Freeze those parameters of the tower on which no image's features depend; return their names.

    A pooling head, for example, that a checkpoint has and the projector does not read.
    """
    parameters = tower_parameters(model)
    features = [encode_image(model, inputs) for inputs in images]
    values = [each for image in features for each in (image.embeds_ND, image.deep_KND) if each is not None]
    total = torch.stack([each.float().sum() for each in values]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    return unused


def _to_model(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    tensors = {name: to_device(torch.from_numpy(value), device) for name, value in inputs.items()}
    return {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in tensors.items()}


class Vision:
    """Feeds images to a model's forward, packed or plain."""

    def __init__(self, model: Any, source: FeatureSource, images: PromptImages | None = None) -> None:
        """Give the plain forward the pixels of `images`; without `images` it gets features from `source`, as packed rows do."""
        self.model, self.source, self._images = model, source, images
        self._base = getattr(model, model.base_model_prefix)
        self.token: int = model.config.image_token_id
        self._counts_by_grid = hasattr(self._base, "get_rope_index")
        self._is_bidirectional = model.config.model_type in _BIDIRECTIONAL
        self._prompt_positions = lru_cache(_REMEMBERED_PROMPTS)(self._count_by_grid)
        self._computed: dict[bytes, ImageFeatures] | None = None

    # -- features ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def one_forward(self) -> Iterator[None]:
        """Compute the features of each image once until the end of the block, however many prompts have it."""
        self._computed = {}
        try:
            yield
        finally:
            self._computed = None

    def features(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        computed = {} if self._computed is None else self._computed
        missing = [image for image in dict.fromkeys(images) if image not in computed]
        computed |= zip(missing, self.source.features(missing), strict=True) if missing else {}
        return [computed[image] for image in images]

    # -- one sequence ------------------------------------------------------------------------------------------------

    def image_places(self, sequence: TokenSequence) -> np.ndarray:
        """Return the positions of image tokens in the prompt; none for a sequence without images."""
        if not sequence.images:
            return np.empty(0, np.int64)
        return np.flatnonzero(sequence.prompt_ids == self.token)

    def blocks(self, sequence: TokenSequence) -> list[slice]:
        """Return the runs of image tokens that attend to one another in both directions."""
        if not self._is_bidirectional:
            return []
        places = self.image_places(sequence)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
        return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]

    def positions(self, sequence: TokenSequence, grids: Sequence[tuple[int, ...]]) -> Positions:
        """Return a function that gives the position ids of tokens begin:end, for any answer to this prompt.

        They are [T]; with M-RoPE frame, row and column, [3, T].
        """
        if not self._counts_by_grid:
            return np.arange
        if not sequence.images:
            return lambda begin, end: np.tile(np.arange(begin, end), (3, 1))
        prompt_3P = self._prompt_positions(sequence.prompt_ids.tobytes(), tuple(grids))
        first, n_prompt = int(prompt_3P.max()) + 1, prompt_3P.shape[1]

        def count(begin: int, end: int) -> np.ndarray:
            answer = first + np.arange(max(begin - n_prompt, 0), max(end - n_prompt, 0))
            return np.concatenate([prompt_3P[:, begin:end], np.tile(answer, (3, 1))], 1)

        return count

    def _count_by_grid(self, prompt: bytes, grids: tuple[tuple[int, ...], ...]) -> np.ndarray:
        ids_1P = torch.from_numpy(np.frombuffer(prompt, "<i4").astype(np.int64)).unsqueeze(0)
        positions, _ = self._base.get_rope_index(ids_1P, (ids_1P == self.token).int(), torch.tensor(grids))
        counted: np.ndarray = positions[:, 0].numpy()
        return counted

    def plain_inputs(self, sequence: TokenSequence, n_tokens: int) -> dict[str, Any]:
        """Return keywords of the model's own forward, next to ids, for the first `n_tokens` of a sequence with images."""
        device = next(self.model.parameters()).device
        is_image_T = torch.zeros(1, n_tokens, dtype=torch.int64)
        is_image_T[0, self.image_places(sequence)] = 1
        types = to_device(is_image_T, device)
        # Some models attend by them. Packed rows do not get them, so the trial of the layout shows whether that matters.
        taken = inspect.signature(type(self.model).forward).parameters.keys() & _TOKEN_TYPES
        more: dict[str, Any] = dict.fromkeys(taken, types)
        if self._images is not None:
            return more | _to_model(self.model, self._images.prompt_inputs(sequence.images))
        features = self.features(sequence.images)
        if self._counts_by_grid:
            more["image_grid_thw"] = to_device(torch.tensor([each.grid for each in features]), device)
        return more | {"mm_encoder_outputs": {"image": _as_tower_output(features)}}

    # -- a row -------------------------------------------------------------------------------------------------------

    def embed(
        self, ids_T: torch.Tensor, place_I: torch.Tensor, features: Sequence[ImageFeatures]
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Return keywords of the decoder for a row: embeddings, with the features of images at these places."""
        decoder = self.model.get_decoder()
        # The image token may lie outside the vocabulary; its own embedding is not used.
        embeds_TD = decoder.get_input_embeddings()(ids_T.index_fill(0, place_I, 0))
        image_ID = torch.cat([each.embeds_ND for each in features]).to(embeds_TD.device, embeds_TD.dtype)
        if len(image_ID) != len(place_I):
            raise IntegrityError(
                f"The model makes {len(image_ID):,} features of the images of some prompts, which have {len(place_I):,} image "
                "tokens. Prepare again with this model (prefcache prepare CONFIG)."
            )
        inputs: dict[str, Any] = {"inputs_embeds": embeds_TD.index_copy(0, place_I, image_ID).unsqueeze(0)}
        deep = [each.deep_KND for each in features if each.deep_KND is not None]
        if deep:
            is_image_T = torch.zeros(len(ids_T), dtype=torch.bool, device=ids_T.device).index_fill(0, place_I, True)
            inputs["visual_pos_masks"] = is_image_T.unsqueeze(0)
            inputs["deepstack_visual_embeds"] = list(torch.cat(deep, 1))
        return inputs


def _as_tower_output(features: Sequence[ImageFeatures]) -> BaseModelOutputWithPooling:
    """Pack features as the tower's output, which the model's own forward takes instead of pixels."""
    if features[0].n_tiles is None:
        pooled: Any = [each.embeds_ND for each in features]
    else:
        width = features[0].embeds_ND.shape[-1]
        pooled = torch.cat([each.embeds_ND.view(each.n_tiles or 1, -1, width) for each in features])
    output = BaseModelOutputWithPooling(pooler_output=pooled)
    if features[0].deep_KND is not None:
        stacked = [each.deep_KND for each in features if each.deep_KND is not None]
        output.deepstack_features = [list(layer) for layer in zip(*stacked, strict=True)]
    return output
