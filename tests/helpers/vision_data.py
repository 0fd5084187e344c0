"""A project whose prompts have pictures: prepared by hand, ready to be scored and trained on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from prefcache.pipeline import identity, image_processor
from prefcache.pipeline.image_processor import SizedPixels
from prefcache.pipeline.images import hash_pixels
from prefcache.pipeline.schema import IMAGES, sequence_key
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import PreparedManifest
from tests.helpers import vision_models
from tests.helpers.examples import masked, pair, prepared
from tests.helpers.project import write_config

TRAIN = {"learning_rate": 3e-3, "batch_size": 4, "epochs": 1, "samples": 3, "sample_tokens": 5, "rows": "auto"}


def pictures_of(i: int) -> list[Image.Image]:
    """Of four prompts, two have one picture, one has two of which one is another prompt's, and one has none."""
    one = vision_models.picture(30 + 5 * (i % 3), 24 + 7 * (i % 2), seed=i % 5)
    return [[one], [one], [one, vision_models.picture(30, 24, seed=0)], []][i % 4]


def rows_of(folder: Path, pictures: vision_models.Pictures, n: int, *, with_pictures: bool) -> list[dict[str, Any]]:
    """Pairs; every fifth has answers of several turns, of which some tokens do not count; a quarter is held out."""
    rows = []
    for i in range(n):
        dice = np.random.default_rng(i)
        shown = pictures_of(i) if with_pictures else []
        prompt, images = vision_models.ask(folder, pictures, shown, f"the dog {i}")
        chosen, rejected = (dice.integers(20, 300, dice.integers(6, 12)).tolist() for _ in range(2))
        row = pair(i, prompt.tolist(), chosen, rejected) | {"line": i, "images": list(images)}
        row["split"] = "held_out" if (i % 4 == 3 and i > 8) or i == 1 else "train"
        for name in ("chosen", "rejected"):
            row[f"{name}_key"] = sequence_key(prompt, row[f"{name}_ids"], images)
        rows.append(masked(row, chosen=[0, 2, 4, 6], rejected=[1, 5]) if i % 5 == 4 else row)
    return rows


def prepare(out: Path, model: Path, n: int, *, with_pictures: bool = True) -> None:
    """Write `out`/prepared."""
    pictures = vision_models.Pictures(image_processor.load(model))
    rows = rows_of(model, pictures, n, with_pictures=with_pictures)
    folder = out / "prepared"
    manifest = prepared(folder, rows).manifest
    table = [_image_row(pictures, image) for image in dict.fromkeys(image for row in rows for image in row["images"])]
    data = artifact.arrow_stream(pa.Table.from_pylist(table, schema=IMAGES))
    entries = [artifact.commit_file(folder / "images-0.arrow", data, rows=len(table))] if table else []
    processor = {"processor_id": pictures.processor.id.hex()} if table else {}
    inputs = {"tokenizer_id": identity.tokenizer_id(model)} | processor
    facts = manifest.facts() | {"images": entries, "inputs": inputs}
    PreparedManifest.make(**facts).commit(folder / artifact.MANIFEST)


def _image_row(pictures: vision_models.Pictures, image: bytes) -> dict[str, Any]:
    pixels, file = pictures.pixels(image), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    height, width = pixels.shape[:2]
    several, processor = pictures.is_one_of_several(image), pictures.processor
    return {
        "image": image,
        "pixels": hash_pixels(pixels),
        "width": width,
        "height": height,
        "format": "PNG",
        "one_of_several": several,
        "n_tokens": processor.replace(SizedPixels(width, height, pixels), one_of_several=several).n_tokens,
        "encoded": file.getvalue(),
    }


def write_project(folder: Path, model: Path, n: int = 18, *, with_pictures: bool = True, **train: Any) -> Path:
    """Write a config and what prepare would have written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").touch()
    write_config(folder, model, **TRAIN | train)
    prepare(folder / "runs/tiny", model, n, with_pictures=with_pictures)
    return folder
