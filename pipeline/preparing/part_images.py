"""The pictures of a part: the ids that its rows name them by, and a file that holds each of them once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prefcache.pipeline.images import Picture
from prefcache.pipeline.preparing.shard_writer import ShardWriter
from prefcache.pipeline.schema import IMAGE_FILES, IMAGES, image_id
from prefcache.pipeline.stored.images import FileStamp

if TYPE_CHECKING:
    from prefcache.pipeline.image_processor import ImageProcessor

_BLOCK_BYTES = 8 << 20


class PartImages:
    """Names pictures, and writes them to a file as they come; without a path it only names them."""

    def __init__(self, processor: "ImageProcessor | None", path: Path | None) -> None:
        self._processor, self._path = processor, path
        self._ids: set[bytes] = set()
        self._waiting: list[dict[str, Any]] = []
        self._waiting_bytes = 0
        if path is not None:
            self._writer = ShardWriter(path.parent, lambda _: path.name, IMAGES, durable=False)

    def __enter__(self) -> "PartImages":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._path is not None:
            if error is None:
                self._flush()
            self._writer.__exit__(kind, error, trace)

    @property
    def entry(self) -> dict[str, Any] | None:
        """The entry of the closed file in the part's record; None without pictures."""
        return self._writer.entries[0] if self._path is not None and self._writer.entries else None

    def add(self, pictures: Sequence[Picture]) -> tuple[bytes, ...]:
        """Store the pictures of one prompt, and return their ids."""
        if not pictures:
            return ()
        assert self._processor is not None
        one_of_several = self._processor.counts_pictures and len(pictures) > 1
        ids = [image_id(each.hash, self._processor.id, one_of_several=one_of_several) for each in pictures]
        for name, picture in zip(ids, pictures, strict=True):
            if self._path is not None and name not in self._ids:
                self._ids.add(name)
                self._waiting.append(
                    {
                        "image": name,
                        "pixels": picture.hash,
                        "width": picture.width,
                        "height": picture.height,
                        "format": picture.format,
                        "one_of_several": one_of_several,
                        "n_tokens": self._processor.replace(picture, one_of_several=one_of_several).n_tokens,
                        "encoded": picture.encoded,
                    }
                )
                self._waiting_bytes += len(picture.encoded)
                if self._waiting_bytes > _BLOCK_BYTES:
                    self._flush()
        return tuple(ids)

    def _flush(self) -> None:
        self._writer.write(pa.Table.from_pylist(self._waiting, schema=IMAGES))
        self._waiting, self._waiting_bytes = [], 0


def tabulate_stamps(stamps: Sequence[FileStamp]) -> pa.Table:
    """Return the rows of schema.IMAGE_FILES."""
    return pa.Table.from_pylist([stamp._asdict() for stamp in stamps], schema=IMAGE_FILES)
