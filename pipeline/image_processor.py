"""What a model's processor does with a picture: the text that stands for it, and the arrays that the model sees.

The processor is Transformers', with its PIL backend, so the same files give the same arrays on every machine. Each picture is
processed by itself. The folder's own code is never run.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from prefcache.pipeline import identity, model_config, model_files
from prefcache.pipeline.errors import UsageError, first_line
from prefcache.pipeline.tokenizer import PROCESSOR_CONFIGS, load_tokenizer, refuse_own_code

# Keys of an image processor's settings that do not shape its results.
_VOLATILE = {"processor_class", "image_processor_type", "auto_map", "return_tensors", "device", "data_format"}
_SETTINGS = (*PROCESSOR_CONFIGS, "video_preprocessor_config.json")
# What a processor counts, beyond what the model's forward reads.
_COUNTS = {"num_crops", "num_patches", "rows", "cols"}
# Their processors cut a picture into tiles only if it is the only one of its prompt.
_COUNTS_PICTURES = {"llava_onevision"}
_MOST_SIZES = 8192  # whose replacements are kept


class Sized(Protocol):
    """A picture whose size is known before it is decoded: `images.Picture`."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def pixels(self) -> np.ndarray: ...  # [height, width, 3]


class SizedPixels(NamedTuple):
    width: int
    height: int
    pixels: np.ndarray


class Replacement(NamedTuple):
    """What takes the place of a picture's placeholder: the same for all pictures of a size."""

    text: str
    ids: np.ndarray  # of the text by itself, int32
    n_tokens: int  # of them that stand for the picture; the others mark its borders, lines or tiles


class ProcessedImage(NamedTuple):
    replacement: str  # the text that takes the place of the placeholder
    inputs: dict[str, np.ndarray]  # keywords of the model's get_image_features


class ImageProcessor:
    """A model's processor, for single pictures."""

    def __init__(self, processor: Any, *, counts_pictures: bool) -> None:
        self._processor = processor
        # Whether a picture that is one of several in a prompt is processed in another way.
        self.counts_pictures = counts_pictures
        self._replacements: dict[tuple[int, int, bool], Replacement] = {}

    @property
    def transformers(self) -> Any:
        """The processor itself, without what processes video."""
        return self._processor

    @property
    def placeholder(self) -> str:
        """The text that a chat template writes for a picture."""
        return str(self._processor.image_token)

    @property
    def token_ids(self) -> list[int]:
        """The tokens that stand for pictures, which no other text may have."""
        return [number for number in self._processor.image_token_ids if number is not None]

    @cached_property
    def id(self) -> bytes:
        """A hash of the class and the settings: size, patches, normalisation."""
        own = {name: value for name, value in vars(self._processor).items() if isinstance(value, int | float | str)}
        settings = self._processor.image_processor.to_dict() | {"own": own}
        kept = {name: value for name, value in settings.items() if name not in _VOLATILE}
        name = type(self._processor.image_processor).__name__
        text = json.dumps([name, kept], sort_keys=True, default=str)
        return blake2b(text.encode(), digest_size=16).digest()

    def process(self, pixels: np.ndarray, *, one_of_several: bool = False) -> ProcessedImage:
        """Process a picture of shape [height, width, 3]. With `one_of_several`, it shares its prompt with others."""
        if not (one_of_several and self.counts_pictures):
            inputs, replacements = self._process([pixels])
            return ProcessedImage(replacements[0], inputs)
        inputs, replacements = self._process([pixels, pixels])
        return ProcessedImage(replacements[0], {name: value[:1] for name, value in inputs.items()})

    def replace(self, picture: Sized, *, one_of_several: bool = False) -> Replacement:
        """Return what takes the place of a picture. One of each size is processed."""
        key = picture.width, picture.height, one_of_several and self.counts_pictures
        if (known := self._replacements.get(key)) is not None:
            return known
        text = self.process(picture.pixels, one_of_several=one_of_several).replacement
        ids = np.array(self.encode_text(text), np.int32)
        if len(self._replacements) == _MOST_SIZES:
            self._replacements.clear()
        self._replacements[key] = Replacement(text, ids, self.count_image_tokens(ids))
        return self._replacements[key]

    def count_image_tokens(self, ids: np.ndarray) -> int:
        """Count the tokens that stand for pictures."""
        return int(np.isin(ids, self.token_ids).sum())

    def process_together(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Process all pictures of a prompt at once, as the processor does by itself: keywords of the model's forward."""
        return self._process(pictures)[0]

    def _process(self, pictures: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        from PIL import Image

        processor, images = self._processor, [Image.fromarray(pixels) for pixels in pictures]
        settings = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs={}, return_tensors="np"
        )["images_kwargs"]
        laid_out = processor.prepare_inputs_layout(images=[images], text=[self.placeholder * len(images)])[0]
        processed, replacements = processor._process_images(laid_out, **settings)
        return {name: np.asarray(value) for name, value in processed.items() if name not in _COUNTS}, replacements

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text without pictures, such as a replacement."""
        return [int(number) for number in self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def encode(self, text: str, images: Sequence[np.ndarray]) -> list[int]:
        """Return the ids that the processor itself makes of a rendered prompt and its pictures."""
        from PIL import Image

        pictures = [[Image.fromarray(pixels) for pixels in images]]
        # As TRL calls it: a template has written the special tokens already.
        encoded = self._processor(text=[text], images=pictures, add_special_tokens=False)
        return [int(number) for number in encoded["input_ids"][0]]


def load(folder: Path) -> ImageProcessor:
    """Load the processor of a model's folder, or of an adapter's and its base's; UsageError if there is none."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model = model_files.find_base(folder, weights=False) if model_files.is_adapter(folder) else folder
    model_type = model_config.read(model).model_type or ""
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if not isinstance(name, str):
        raise UsageError(
            f"{folder} is a {model_type} model, for which Transformers has no processor of pictures. Name one that sees images."
        )
    try:
        # Not by AutoProcessor, which also loads what processes video, and that needs torchvision.
        module = sys.modules["transformers"]._class_to_module[name]
        base = getattr(import_module(f"transformers.{module}"), name)
        source = identity.find_processor(folder)
        image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
        settings, _ = base.get_processor_dict(source)
        parts = {"image_processor": image_processor, "tokenizer": load_tokenizer(folder)}
        attributes = classmethod(lambda _: list(parts))
        without_video: Any = type(name, (base,), {"get_attributes": attributes})
        absent = {key: None for key in base.get_attributes() if key not in parts}
        processor = without_video.from_args_and_dict([], settings, **parts, **absent)
        vars(processor).update(absent)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The image processor of {folder} needs the package {error.name}, which is not installed (pip install {error.name})."
        ) from None
    except Exception as error:  # The loader raises whatever its parts raise.
        refuse_own_code(error, folder)
        raise UsageError(
            f"{folder} has no processor of pictures that loads ({first_line(error)}). Expected preprocessor_config.json or "
            "processor_config.json next to the model."
        ) from None
    return ImageProcessor(processor, counts_pictures=model_type in _COUNTS_PICTURES)


def copy_settings(source: Path, folder: Path) -> None:
    """Copy the files from which a model's processor is loaded, except its tokenizer's."""
    for name in _SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class PictureSource(Protocol):
    """Reads the pixels of images by their ids: `stored.images.StoredImages`."""

    def pixels(self, image: bytes) -> np.ndarray: ...
    def is_one_of_several(self, image: bytes) -> bool: ...


class PromptImages:
    """Reads images of prompts as arrays for a model: decodes and processes them on demand."""

    def __init__(self, processor: ImageProcessor, pictures: PictureSource, features_root: Path | None = None) -> None:
        """`features_root`: the folder in which features may be cached, if any."""
        self.processor, self.pictures, self.features_root = processor, pictures, features_root

    def inputs(self, image: bytes) -> dict[str, np.ndarray]:
        """Return the keywords of the model's get_image_features for one image."""
        one_of_several = self.pictures.is_one_of_several(image)
        return self.processor.process(self.pictures.pixels(image), one_of_several=one_of_several).inputs

    def replacement(self, image: bytes) -> Replacement:
        pixels, one_of_several = self.pictures.pixels(image), self.pictures.is_one_of_several(image)
        height, width = pixels.shape[:2]
        return self.processor.replace(SizedPixels(width, height, pixels), one_of_several=one_of_several)

    def prompt_inputs(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Return the keywords of the model's forward for all images of a prompt, processed together."""
        return self.processor.process_together([self.pictures.pixels(image) for image in images])
