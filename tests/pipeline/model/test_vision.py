"""Log-probs of answers to prompts with images: those of each model's own forward, whatever shares a row."""

import functools
import inspect
import re

import numpy as np
import pytest
import torch

from prefcache.pipeline import image_processor
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model import vision as vision_module
from prefcache.pipeline.model import weights
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.model.vision import ComputedFeatures, Vision, VisionTower, encode_image, pack
from prefcache.pipeline.schema import StoredFeatures, TokenSequence
from tests.helpers import vision_models
from tests.helpers.models import compute, dpo_loss, gradient, relative_error

FAMILIES = list(vision_models.FAMILIES)


class Prompts:
    """A model with prompts of one picture, of two, of the same pictures again, and of text alone."""

    def __init__(self, name: str) -> None:
        self.folder = vision_models.save(name)
        self.pictures = vision_models.Pictures(image_processor.load(self.folder))
        self.images = PromptImages(self.pictures.processor, self.pictures)
        a, b = vision_models.picture(40, 24, seed=1), vision_models.picture(30, 44, seed=2)
        self.asked = [
            ([a], "why the cat?"),
            ([b], "why the cat?"),
            ([a, b], "the dog runs"),
            ([], "the answer is"),
            ([b, a], "why"),
        ]
        self.sequences = [
            TokenSequence(ids, answer, images=images)
            for prompt, (pictures, question) in enumerate(self.asked)
            for ids, images in [vision_models.ask(self.folder, self.pictures, pictures, question)]
            for answer in self._answers(prompt)
        ]

    def _answers(self, seed: int) -> list[np.ndarray]:
        drawn = np.random.default_rng(seed).integers(20, 300, (3, 9), dtype=np.int32)
        drawn[1, :4] = drawn[0, :4]  # two that begin alike
        return [drawn[0], drawn[1], drawn[2, :5]]

    def load(self, *, trained: bool = False):
        model = vision_models.load(self.folder)
        return model, Vision(model, VisionTower(model, self.images, trained=trained), self.images)


@functools.cache
def prompts(name: str) -> Prompts:
    return Prompts(name)


def published_logps(model, data: Prompts, prompt: int) -> torch.Tensor:
    """Of the first answer to a prompt, by what the model's own processor makes of the prompt, all of it as it came."""
    sequence, (pictures, question) = data.sequences[3 * prompt], data.asked[prompt]
    text = vision_models.render(data.folder, len(pictures), question)
    inputs = data.pictures.processor.transformers(
        text=[text], images=[pictures], add_special_tokens=False, return_mm_token_type_ids=True, return_tensors="pt"
    )
    answer_1N = torch.from_numpy(sequence.completion_ids.astype(np.int64)).unsqueeze(0)
    for name in ("token_type_ids", "mm_token_type_ids"):  # an answer is text
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(answer_1N)], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_1N], 1)
    taken = inspect.signature(type(model).forward).parameters.keys() - {"attention_mask"}
    logits = model(**{name: value for name, value in inputs.items() if name in taken}).logits[0]
    return logits[-1 - answer_1N.shape[1] : -1].log_softmax(-1).gather(1, answer_1N.T).squeeze(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_forward_gets_what_the_model_s_processor_gives(name):
    data = prompts(name)
    model, vision = data.load()
    with torch.no_grad():
        for prompt in (0, 2):  # of one picture, of two
            expected = published_logps(model, data, prompt)
            assert (plain_logps(model, data.sequences[3 * prompt], vision) - expected).abs().max() < 1e-5


def plainly(model, vision: Vision, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    """By the model's own forward of one sequence, with the pixels of its processor."""
    return [plain_logps(model, sequence, vision) for sequence in sequences]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_gives_what_the_model_gives_for_each_sequence_alone(name, layout):
    data = prompts(name)
    model, vision = data.load()
    forward = Forward(model, "sdpa", layout, "float32", "train.rows", vision)
    forward.choose_layout(data.sequences)
    assert forward.layout == layout, forward.layout_reason
    with torch.no_grad():
        logps, _ = compute(forward, data.sequences)
        forward_native = vision_models.load(data.folder)
        expected = plainly(forward_native, Vision(forward_native, vision.source, data.images), data.sequences)
    assert max((a - b).abs().max().item() for a, b in zip(logps, expected, strict=True)) < 1e-5


def test_rows_are_padded_for_a_model_whose_images_attend_in_an_unknown_way(monkeypatch):
    monkeypatch.setattr(vision_module, "_BIDIRECTIONAL", set())
    data = prompts("gemma3")
    model, vision = data.load()
    # Most prompts are text alone, and longer.
    texts = [
        TokenSequence(np.arange(i, i + 120, dtype=np.int32), np.arange(20, 30, dtype=np.int32)) for i in range(100)
    ]
    sequences = [*texts, *data.sequences]
    forward = Forward(model, "sdpa", "auto", "float32", "train.rows", vision)
    forward.choose_layout(sequences)
    assert forward.layout == "padded"
    assert re.match(r"not shared: off by .*; not packed: off by ", forward.layout_reason)
    with torch.no_grad():
        logps, _ = compute(forward, data.sequences[:1])
        expected = published_logps(model, data, 0)
    assert (logps[0] - expected).abs().max() < 1e-5


def test_a_model_whose_answers_see_what_follows_next_to_images_is_refused(monkeypatch):
    """As PaliGemma's do with these token types: to it, 0 is a prompt, all of whose tokens see one another."""
    data = prompts("gemma3")
    model, vision = data.load()
    plain_inputs = vision.plain_inputs

    def as_one_image(sequence, n_tokens):
        return plain_inputs(sequence, n_tokens) | {"token_type_ids": torch.ones(1, n_tokens, dtype=torch.int64)}

    forward = Forward(model, "sdpa", "auto", "float32", "train.rows", vision)
    monkeypatch.setattr(vision, "plain_inputs", as_one_image)
    with pytest.raises(UsageError, match="not causal here"):
        forward.choose_layout(data.sequences)


class Shelf:
    """What a tower made of pictures, as bytes."""

    def __init__(self, model, images: PromptImages, dtype: str) -> None:
        self.dtype, self._model, self._images = dtype, model, images

    def read(self, image: bytes) -> StoredFeatures:
        with torch.no_grad():
            return pack(encode_image(self._model, self._images.inputs(image)))


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stored_features_do_for_a_model_without_its_tower(name, layout):
    data = prompts(name)
    model, vision = data.load()
    language = weights.load_base(Reference(data.folder), "float32", "sdpa", "cpu", "language")
    stored = Vision(language, ComputedFeatures(Shelf(model, data.images, "float32"), "cpu"))
    forward = Forward(language, "sdpa", layout, "float32", "train.rows", stored)
    forward.choose_layout(data.sequences)
    assert forward.layout == layout, forward.layout_reason
    with torch.no_grad():
        logps, _ = compute(forward, data.sequences)
        expected = plainly(model, vision, data.sequences)
    assert max((a - b).abs().max().item() for a, b in zip(logps, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("name", ["qwen3-vl", "llava-onevision"])
def test_features_are_stored_bit_by_bit(name):
    data = prompts(name)
    model, image = data.load()[0].bfloat16(), data.sequences[0].images[0]
    with torch.no_grad():
        expected = encode_image(model, data.images.inputs(image))
    (found,) = ComputedFeatures(Shelf(model, data.images, "bfloat16"), "cpu").features([image])
    assert found.embeds_ND.dtype == torch.bfloat16 and torch.equal(found.embeds_ND, expected.embeds_ND)
    assert (found.deep_KND is None) == (name != "qwen3-vl")
    assert found.deep_KND is None or torch.equal(found.deep_KND, expected.deep_KND)
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_picture_is_computed_once_in_a_forward(layout, monkeypatch):
    data = prompts("qwen2.5-vl")
    model, vision = data.load()
    vision = Vision(model, vision.source)
    forward, asked = Forward(model, "sdpa", layout, "float32", "train.rows", vision), []
    forward.choose_layout(data.sequences)
    features = vision.source.features
    monkeypatch.setattr(vision.source, "features", lambda images: asked.extend(images) or features(images))
    with torch.no_grad():
        forward.logps([[sequence] for sequence in data.sequences])
    assert len(asked) == len({*asked}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_another_picture_gives_other_log_probs(name):
    """Else the pictures did not reach the decoder, and nothing above would show anything."""
    data = prompts(name)
    model, vision = data.load()
    first, second = data.sequences[0], data.sequences[3]
    with torch.no_grad():
        seen = plain_logps(model, first, vision)
        other = plain_logps(model, TokenSequence(second.prompt_ids, first.completion_ids, images=second.images), vision)
    assert (seen - other).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_model_s_own_forward(name):
    data = prompts(name)
    model, vision = data.load(trained=True)
    forward = Forward(model, "sdpa", "shared", "float32", "train.rows", vision)
    forward.choose_layout(data.sequences)
    logps, _ = compute(forward, data.sequences)
    dpo_loss(logps[:14]).backward()
    shared = gradient(model)
    model.zero_grad()
    with forward.native_attention():
        dpo_loss(plainly(model, vision, data.sequences[:14])).backward()
    expected = gradient(model)
    assert relative_error(shared, expected) < 1e-4
    tower = [p for name, p in model.named_parameters() if "visi" in name or "visual" in name]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower)
