"""The pictures of prepared examples, each stored once: Arrow shards next to the examples."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.images import UnusableImage, decode, image_tag
from prefcache.pipeline.schema import IMAGE_FILES, IMAGES
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import TableEntry


class ImageFacts(NamedTuple):
    """What is known of a picture without decoding it."""

    pixels: bytes  # hash of its pixels
    width: int
    height: int
    one_of_several: bool
    n_tokens: int | None  # that stand for it in a prompt; None if an earlier version prepared it

    @property
    def tag(self) -> str:
        return image_tag(self.width, self.height, self.pixels)


class FileStamp(NamedTuple):
    """A file of a picture as it was when it was read; a row of schema.IMAGE_FILES."""

    path: str
    n_bytes: int | None  # None, like the checksum, if it could not be read
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
        is_touched = max(status.st_mtime_ns, status.st_ctime_ns) > since_ns
        if is_touched and artifact.checksum(Path(self.path)) != self.xxh3_128:
            return f"{self.path} has changed"
        return None


def read_stamps(folder: Path, entries: Sequence[TableEntry]) -> Iterator[FileStamp]:
    """Yield the rows of tables of schema.IMAGE_FILES; none of one that cannot be read."""
    for entry in entries:
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            for batch in artifact.open_arrow_stream(folder / entry.file).cast(IMAGE_FILES).to_batches():
                yield from (FileStamp(**row) for row in batch.to_pylist())


def explain_changed_files(folder: Path, entries: Sequence[TableEntry], since_ns: int) -> str | None:
    """Say which files of pictures are not what they were; None if all are. Only what was touched since then is read."""
    first, n_changed = "", 0
    for stamp in read_stamps(folder, entries):
        if why := stamp.why_changed(since_ns):
            first, n_changed = first or why, n_changed + 1
    if not n_changed:
        return None
    return first if n_changed == 1 else f"{n_changed:,} files of images have changed: {first}, for one"


class StoredImages:
    """The pictures of one preparation, by the ids that its examples name."""

    def __init__(self, folder: Path, entries: Sequence[TableEntry]) -> None:
        self._folder, self._entries = folder, entries

    def __len__(self) -> int:
        return sum(entry.rows for entry in self._entries)

    @cached_property
    def table(self) -> pa.Table:
        """The rows of schema.IMAGES, memory-mapped."""
        tables = [IMAGES.empty_table()]
        for entry in self._entries:
            path = self._folder / entry.file
            try:
                table = artifact.open_arrow_stream(path)
                # An earlier version did not store n_tokens.
                table = pa.concat_tables([IMAGES.empty_table(), table], promote_options="default")
                tables.append(table.cast(IMAGES))
            except (OSError, ValueError, pa.ArrowException) as error:
                reason = str(error).partition("\n")[0]
                raise IntegrityError(
                    f"{path} cannot be read ({reason}). Delete {self._folder} and prepare again (prefcache prepare CONFIG)."
                ) from None
        return pa.concat_tables(tables)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids in order, and the row of each."""
        ids = np.array(self.table["image"].to_pylist(), "S16")
        order = np.argsort(ids)
        return ids[order], order

    def _find(self, image: bytes) -> int | None:
        (ids, rows), wanted = self._index, np.array(image, "S16")
        at = int(np.searchsorted(ids, wanted))
        return int(rows[at]) if at < len(ids) and ids[at] == wanted else None

    def _row(self, image: bytes) -> int:
        row = self._find(image)
        if row is None:
            raise IntegrityError(
                f"{self._folder} has no image {image.hex()}, which one of its examples names. Delete {self._folder} and prepare "
                "again (prefcache prepare CONFIG)."
            )
        return row

    def __contains__(self, image: bytes) -> bool:
        return self._find(image) is not None

    def facts(self, image: bytes) -> ImageFacts:
        row = self._row(image)
        return ImageFacts(*(self.table[name][row].as_py() for name in ImageFacts._fields))

    def is_one_of_several(self, image: bytes) -> bool:
        return self.facts(image).one_of_several

    def encoded(self, image: bytes) -> bytes:
        """The picture's bytes as they came."""
        return bytes(self.table["encoded"][self._row(image)].as_py())

    def pixels(self, image: bytes) -> np.ndarray:
        """Decode a picture to RGB, [height, width, 3]; IntegrityError if these are not the pixels that were prepared."""
        try:
            picture = decode(self.encoded(image))
        except UnusableImage as error:
            found = str(error)
        else:
            if picture.hash == self.facts(image).pixels:
                return picture.pixels
            found = "other pixels"
        raise IntegrityError(
            f"{self.facts(image).tag} in {self._folder} decodes to {found}, unlike when it was prepared. Use the version of "
            f"Pillow that prepared it, or delete {self._folder} and prepare again (prefcache prepare CONFIG)."
        )
