"""The pictures of prepared examples, each stored once: Arrow shards next to the examples."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.images import decode, image_tag
from prefcache.pipeline.schema import IMAGES
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import TableEntry


class ImageFacts(NamedTuple):
    """What is known of a picture without decoding it."""

    pixels: bytes  # hash of its pixels
    width: int
    height: int
    one_of_several: bool

    @property
    def tag(self) -> str:
        return image_tag(self.width, self.height, self.pixels)


class FileStamp(NamedTuple):
    """A file of a picture as it was when it was read; a row of schema.IMAGE_FILES."""

    path: str
    n_bytes: int | None  # None, like the others, if it could not be read
    mtime_ns: int | None
    xxh3_128: str | None

    def why_changed(self, since_ns: int) -> str | None:
        """Say how the file differs from what it was; None if it does not, or was not touched since then."""
        try:
            status = Path(self.path).stat()
        except (OSError, ValueError):
            return None if self.n_bytes is None else f"{self.path} is gone"
        if self.n_bytes is None:
            return f"{self.path} was missing"
        if status.st_size != self.n_bytes:
            return f"{self.path} has changed"
        # The change time also shows files that were moved here with an older time.
        is_touched = status.st_mtime_ns != self.mtime_ns or status.st_ctime_ns > since_ns
        if is_touched and artifact.checksum(Path(self.path)) != self.xxh3_128:
            return f"{self.path} has changed"
        return None


class StoredImages:
    """The pictures of one preparation, by the ids that its examples name."""

    def __init__(self, folder: Path, entries: Sequence[TableEntry]) -> None:
        self._folder, self._entries = folder, entries

    def __len__(self) -> int:
        return sum(entry.rows for entry in self._entries)

    @cached_property
    def table(self) -> pa.Table:
        """The rows of schema.IMAGES, memory-mapped."""
        tables = [artifact.open_arrow_stream(self._folder / entry.file) for entry in self._entries]
        return pa.concat_tables(tables) if tables else IMAGES.empty_table()

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        return {image: row for row, image in enumerate(self.table["image"].to_pylist())}

    def __contains__(self, image: bytes) -> bool:
        return image in self._rows

    def facts(self, image: bytes) -> ImageFacts:
        row = self._rows[image]
        return ImageFacts(*(self.table[name][row].as_py() for name in ImageFacts._fields))

    def is_one_of_several(self, image: bytes) -> bool:
        return self.facts(image).one_of_several

    def encoded(self, image: bytes) -> bytes:
        """The picture's bytes as they came."""
        return bytes(self.table["encoded"][self._rows[image]].as_py())

    def pixels(self, image: bytes) -> np.ndarray:
        """Decode a picture to RGB, [height, width, 3]; IntegrityError if these are not the pixels that were prepared."""
        picture = decode(self.encoded(image))
        if picture.hash != self.facts(image).pixels:
            raise IntegrityError(
                f"{self.facts(image).tag} in {self._folder} decodes to other pixels than when it was prepared. Use the version of "
                "Pillow that prepared it, or prepare again (prefcache prepare CONFIG)."
            )
        return picture.pixels
