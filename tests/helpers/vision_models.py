"""Tiny random models of the families that see images, each with a processor, a tokenizer and a chat template in its style."""

import functools
import importlib.util
import json
import sys
import tempfile
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from prefcache.pipeline.image_processor import ImageProcessor
from prefcache.pipeline.images import hash_pixels
from prefcache.pipeline.schema import image_id
from tests.helpers import tokenizers

# The processor of Pixtral imports torchvision for what is not used here, and no torchvision exists for PyTorch's CPU build.
_STAND_INS = {
    name: types.ModuleType(name)
    for name in (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    )
    if importlib.util.find_spec("torchvision") is None
}
sys.modules |= _STAND_INS
importlib.import_module("transformers.models.pixtral.processing_pixtral")
for _name in _STAND_INS:
    del sys.modules[_name]  # others look whether there is one

_FOLDER = tempfile.TemporaryDirectory(prefix="prefcache-vision-models-")  # gone when the tests end
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
_PIXELS_OF_QWEN = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, "patch_size": 4}


def _turns(begin: str, end: str, image: str, ask: str, *, reads_text: bool = True) -> str:
    """A chat template in the style of the families: content is parts, or text as well if it `reads_text`."""
    parts = (
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    )
    text = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" if reads_text else ""
    return (
        f"{{% for message in messages %}}{begin}{text}{parts}{'{% endif %}' if reads_text else ''}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


_CHATML = ("<|im_start|>{{ message['role'] }}\n", "<|im_end|>\n")
_CHATML_ASK = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Family:
    config: str
    model: dict[str, Any]
    image_processor: str
    processor: str
    template: str
    image_settings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    specials: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)  # special tokens that the tokenizer has under a name


FAMILIES = {
    "qwen2.5-vl": Family(
        "Qwen2_5_VLConfig",
        {
            "text_config": _TEXT | _MROPE,
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": 32,
                "initializer_range": 0.3,
            },
        },
        "Qwen2VLImageProcessorPil",
        "Qwen2_5_VLProcessor",
        _turns(*_CHATML, "<|vision_start|><|image_pad|><|vision_end|>", _CHATML_ASK),
        _PIXELS_OF_QWEN,
        specials=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    "qwen3-vl": Family(
        "Qwen3VLConfig",
        {
            "text_config": _TEXT | {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_interleaved": True}},
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
                "out_hidden_size": 32,
                "initializer_range": 0.3,
            },
        },
        "Qwen2VLImageProcessorPil",
        "Qwen3VLProcessor",
        _turns(*_CHATML, "<|vision_start|><|image_pad|><|vision_end|>", _CHATML_ASK),
        _PIXELS_OF_QWEN,
        specials=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    "gemma3": Family(
        "Gemma3Config",
        {
            "text_config": _TEXT | {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
        "Gemma3ImageProcessorPil",
        "Gemma3Processor",
        _turns(
            "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n",
            "<end_of_turn>\n",
            "<start_of_image>",
            "<start_of_turn>model\n",
        ),
        {"size": {"height": 32, "width": 32}},
        {"image_seq_length": 4},
        ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "smolvlm": Family(
        "SmolVLMConfig",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _SIGLIP | {"model_type": "smolvlm_vision"},
            "scale_factor": 2,
        },
        "SmolVLMImageProcessorPil",
        "SmolVLMProcessor",
        "<|im_start|>"
        + _turns(
            "{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}",
            "<end_of_utterance>\n",
            "<image>",
            "Assistant:",
            reads_text=False,
        ),
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        {"image_seq_len": 4},
        (
            "<image>",
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            "<video>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
        ),
    ),
    "llava-onevision": Family(
        "LlavaOnevisionConfig",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
        "LlavaOnevisionImageProcessorPil",
        "LlavaOnevisionProcessor",
        _turns(*_CHATML, "<image>\n", _CHATML_ASK, reads_text=False),
        {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4"},
        ("<image>", "<video>"),
    ),
    "internvl": Family(
        "InternVLConfig",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "initializer_range": 0.3,
            },
            "image_seq_length": 4,
        },
        "GotOcr2ImageProcessorPil",
        "InternVLProcessor",
        _turns(*_CHATML, "<IMG_CONTEXT>\n", _CHATML_ASK),
        {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        {"image_seq_length": 4},
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "mistral3": Family(
        "Mistral3Config",
        {
            "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 64,
                "patch_size": 4,
                "initializer_range": 0.3,
            },
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        "PixtralImageProcessorPil",
        "PixtralProcessor",
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]{% elif message['content'] is string %}"
        "{{ message['content'] }}</s>{% else %}{{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}",
        {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
        {"patch_size": 4, "spatial_merge_size": 2},
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    ),
}


@functools.cache
def save(name: str, *, wide: bool = False) -> Path:
    """Return a folder as save_pretrained writes it: weights, processor, tokenizer and template.

    A wide model has heads of 32, the smallest that vLLM's kernels for CPUs take.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_FOLDER.name))
    write(folder, _widen(FAMILIES[name]) if wide else FAMILIES[name])
    return folder


def write(folder: Path, family: Family) -> None:
    tokenizer = tokenizers.build("byte-level", template=family.template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.specials)})
    if family.named:
        tokenizer = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", extra_special_tokens=family.named
        )
        tokenizer.chat_template = family.template
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**_configure(family, tokenizer))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if not parameter.any():  # a bias, an embedding of a line's end: zeros would hide a mistake
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_processor(family, folder)
    if "<|video_pad|>" in family.specials:  # vLLM also loads the processor of videos
        kind = "Qwen3VLVideoProcessor" if "Qwen3" in family.config else "Qwen2VLVideoProcessor"
        video = {"video_processor_type": kind, "patch_size": 4}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def resize(name: str, text_config: dict[str, Any], vision_config: dict[str, Any], **image_settings: Any) -> Family:
    """Return the family with a model of another size and pictures of another size."""
    family = FAMILIES[name]
    model = family.model | {
        "text_config": family.model["text_config"] | text_config,
        "vision_config": family.model["vision_config"] | vision_config,
    }
    return replace(family, model=model, image_settings=image_settings)


def _widen(family: Family) -> Family:
    text, vision = (dict(family.model[name]) for name in ("text_config", "vision_config"))
    text |= {"hidden_size": 128, "head_dim": 32}
    if rope := text.get("rope_parameters"):
        text["rope_parameters"] = rope | {"mrope_section": [8, 4, 4]}
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = 128
    return replace(family, model=family.model | {"text_config": text, "vision_config": vision})


def _configure(family: Family, tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    text = {"vocab_size": len(tokenizer)} | family.model["text_config"]
    more: dict[str, Any] = {"tie_word_embeddings": False}
    for token in ("<image_soft_token>", "<|image_pad|>", "<IMG_CONTEXT>", "[IMG]", "<image>"):
        if token in family.specials:
            more |= {"image_token_id": ids(token), "image_token_index": ids(token)}
            break
    for key, token in (
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("boi_token_index", "<start_of_image>"),
        ("eoi_token_index", "<end_of_image>"),
        ("video_token_index", "<video>"),
    ):
        if token in family.specials:
            more[key] = ids(token)
    return family.model | {"text_config": text} | more


def _save_processor(family: Family, folder: Path) -> None:
    """Write the settings as save_pretrained does, which needs the video processors' torchvision."""
    image_processor = getattr(transformers, family.image_processor)(**family.image_settings)
    settings = image_processor.to_dict() | {"processor_class": family.processor}
    settings["image_processor_type"] = family.image_processor.removesuffix("Pil")
    processor = {"processor_class": family.processor, "image_processor": settings} | family.settings
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2, default=list))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Pictures:
    """Pictures by id, as scoring and training get them from prepared data."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor, self._pixels = processor, dict[bytes, tuple[np.ndarray, bool]]()

    def add(self, image: Image.Image, *, one_of_several: bool = False) -> bytes:
        pixels = np.asarray(image)
        several = one_of_several and self.processor.counts_pictures
        name = image_id(hash_pixels(pixels), self.processor.id, one_of_several=several)
        self._pixels[name] = pixels, several
        return name

    def pixels(self, image: bytes) -> np.ndarray:
        return self._pixels[image][0]

    def is_one_of_several(self, image: bytes) -> bool:
        return self._pixels[image][1]


def ask(
    folder: Path, pictures: Pictures, images: list[Image.Image], question: str
) -> tuple[np.ndarray, tuple[bytes, ...]]:
    """The ids of a prompt with these images, as the model's processor places them, and the images' ids."""
    several = len(images) > 1
    pieces = render(folder, len(images), question).split(pictures.processor.placeholder)
    text = pieces[0]
    for image, rest in zip(images, pieces[1:], strict=True):
        text += pictures.processor.process(np.asarray(image), one_of_several=several).replacement + rest
    ids = np.array(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"], np.int32)
    return ids, tuple(pictures.add(image, one_of_several=several) for image in images)


def render(folder: Path, n_images: int, question: str) -> str:
    """A prompt of that many images and a question, as the chat template prints it."""
    parts = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": question}]
    text: str = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    return text


def load(folder: Path) -> Any:
    """Load the model, to compute in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
