"""Placeholders in place of pictures' tokens: what is left is what the chat template alone writes."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from prefcache.pipeline import image_processor
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.placeholders import Placeholders, find_ids
from tests.helpers import vision_models

SIZES = [(40, 24), (30, 44), (40, 24)]  # one of them twice


def ask(name: str) -> tuple[Placeholders, TokenSequence, list[int]]:
    """A prompt with three pictures, and the ids of what its template writes."""
    folder = vision_models.save(name)
    pictures = vision_models.Pictures(image_processor.load(folder))
    images = [vision_models.picture(*size, seed=n) for n, size in enumerate(SIZES)]
    ids, names = vision_models.ask(folder, pictures, images, "which of these?")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "which of these?"}]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    sequence = TokenSequence(ids, np.array([5], np.int32), images=names)
    placeholders = Placeholders(PromptImages(pictures.processor, pictures))
    return placeholders, sequence, tokenizer(written, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in vision_models.FAMILIES if name != "gemma3"])
def test_with_placeholders_a_prompt_is_what_its_template_writes(name):
    placeholders, sequence, written = ask(name)
    spans = placeholders.find(sequence)
    assert len(spans) == len(SIZES)
    kept, at = [], 0
    for span in spans:
        kept += [*sequence.prompt_ids[at : span.begin].tolist(), *placeholders.ids]
        at = span.end
    assert [*kept, *sequence.prompt_ids[at:].tolist()] == written


def test_pictures_whose_tokens_merge_with_the_text_are_refused():
    """Gemma 3's processor writes line ends around a picture, which merge with those of the chat template."""
    placeholders, sequence, _ = ask("gemma3")
    with pytest.raises(UsageError, match=re.escape("merge with the text around them in some prompts")):
        placeholders.find(sequence)


def test_ids_are_found_whole_and_not_across_their_borders():
    # The bytes of 1 (01 00 00 00) also stand across the border of 256 and 0: 00 01 00 00 | 00 00 00 00.
    ids = np.array([256, 0, 7, 1, 2, 1], "<i4").tobytes()
    one = np.array([1], "<i4").tobytes()
    assert find_ids(ids, one, 0) == 3 and find_ids(ids, one, 4) == 5 and find_ids(ids, one, 6) is None
