"""The ids of a prompt with images are those that the model's own processor gives."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from prefcache.pipeline import image_processor
from prefcache.pipeline.config import Prepare
from prefcache.pipeline.preparing.part_worker import PartWorker, PreparedPart
from prefcache.pipeline.preparing.resolved_config import resolve_config
from prefcache.pipeline.preparing.sources import open_source
from prefcache.pipeline.progress import Progress
from tests.helpers import vision_models
from tests.helpers.vision_models import picture

FAMILIES = tuple(vision_models.FAMILIES)
A, SAME_SIZE, B = picture(60, 40, 1), picture(60, 40, 2), picture(33, 61, 3)


def inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """A message of texts and pictures, as the processor itself takes it."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def record(prompt: list[dict[str, Any]], chosen: Any = "Yes.", rejected: Any = "No.") -> dict[str, Any]:
    """The same messages in JSON, with each picture in its part."""
    written = json.loads(json.dumps(prompt, default=inline))
    return {"prompt": written, "chosen": chosen, "rejected": rejected} | (
        {}
        if isinstance(chosen, list)
        else {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    )


def prepare(folder: Path, tmp_path: Path, records: list[dict[str, Any]], **settings: Any) -> PreparedPart:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    config = Prepare.model_validate({"data": [str(path)], "max_length": 4096} | settings)
    sources = [open_source(entry, tmp_path) for entry in config.sources]
    worker = PartWorker(resolve_config(config, folder, sources, Progress(quiet=True)))
    (chunk,) = sources[0].chunks()
    return worker.prepare(0, chunk)


def expected_ids(folder: Path, messages: list[dict[str, Any]], **asks: bool) -> list[int]:
    """What Transformers gives: the template's text, then the processor, called on the whole as TRL does."""
    processor = image_processor.load(folder)._processor
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **asks)
    pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    images = [pictures] if pictures else None
    return list(processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0])


PROMPTS = {
    "one picture": [turn("user", A, "What is it?")],
    "a picture after text": [turn("user", "Look: ", A, " What is it?")],
    "pictures of one size": [turn("user", A, SAME_SIZE, "Which is first?")],
    "pictures of several sizes": [turn("user", A, "or", B, "?")],
    "a picture in a later turn": [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", B, "And this?")],
    "pictures in two turns": [turn("user", A, "This?"), turn("assistant", "A box."), turn("user", B, "And this?")],
    "text alone": [turn("user", "What is it?")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_the_processors_own(family, tmp_path):
    folder = vision_models.save(family)
    part = prepare(folder, tmp_path, [record(prompt) for prompt in PROMPTS.values()])
    assert not part.quarantined
    for (name, prompt), row in zip(PROMPTS.items(), part.table.to_pylist(), strict=True):
        assert row["prompt_ids"] == expected_ids(folder, prompt, add_generation_prompt=True), name
        for answer, text in (("chosen", "Yes."), ("rejected", "No.")):
            whole = expected_ids(folder, [*prompt, turn("assistant", text)])
            assert row["prompt_ids"] + row[f"{answer}_ids"] == whole, name
