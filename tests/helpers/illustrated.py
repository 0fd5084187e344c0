"""Put pictures into a prepared folder: the tags in its prompts, the ids in its examples, and the bytes in a shard of their own."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from PIL import Image

from prefcache.pipeline.images import Picture, decode
from prefcache.pipeline.schema import IMAGES, PREPARED, image_id
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import PreparedManifest

PROCESSOR = b"a processor's id"


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def id_of(picture: Picture) -> bytes:
    return image_id(picture.hash, PROCESSOR)


def image_row(picture: Picture) -> dict[str, object]:
    """The row of schema.IMAGES of a picture."""
    return {
        "image": id_of(picture),
        "pixels": picture.hash,
        "width": picture.width,
        "height": picture.height,
        "format": picture.format,
        "one_of_several": False,
        "n_tokens": 9,
        "encoded": picture.encoded,
    }


def illustrate(folder: Path, pictures: Mapping[int, Sequence[bytes]], broken: Sequence[bytes] = ()) -> None:
    """Begin the prompts of these lines with these pictures; of those in `broken`, store bytes that no longer decode.

    Keys and token ids stay as they are, so that what was scored and trained is still read.
    """
    decoded = {line: [decode(each) for each in several] for line, several in pictures.items()}
    manifest, shards = PreparedManifest.find(folder), []
    assert manifest is not None
    for shard in manifest.shards:
        rows = artifact.open_arrow_stream(folder / shard.file).to_pylist()
        for row in rows:
            shown = decoded.get(row["line"], [])
            row["images"] = [id_of(picture) for picture in shown]
            row["prompt"] = "".join(picture.tag for picture in shown) + (row["prompt"] or "")
        data = artifact.arrow_stream(pa.Table.from_pylist(rows, schema=PREPARED[manifest.kind]))
        shards.append(artifact.commit_file(folder / f"new-{shard.file}", data, split=shard.split, rows=len(rows)))
    stored = {id_of(picture): image_row(picture) for several in decoded.values() for picture in several}
    for row in stored.values():
        if row["encoded"] in broken:
            row["encoded"] = b"<script>alert(1)</script>"
    data = artifact.arrow_stream(pa.Table.from_pylist([*stored.values()], schema=IMAGES))
    images = [artifact.commit_file(folder / "images-0.arrow", data, rows=len(stored))]
    facts = manifest.facts() | {"shards": shards, "images": images}
    PreparedManifest.make(**facts).commit(folder / artifact.MANIFEST)
