"""What a vision tower makes of pictures, as it is read: Arrow shards in a folder of the cache, memory-mapped.

A store belongs to one tower as it was computed (weights, dtype, versions, attention), and tower.json says which. A shard counts
only with a commit record that matches its bytes; the values of each picture have a checksum of their own, which is compared
whenever they are read. Writing is in feature_writer.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.progress import counting
from prefcache.pipeline.schema import FEATURES, StoredFeatures
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import FeaturesRecord, MalformedError, NewerError, TowerRecord
from prefcache.pipeline.stored.shards import list_records
from prefcache.pipeline.stored.verified_shards import Remember, VerifiedShards

TOWER_FILE = "tower.json"
_REMOVE = "Remove it: what it vouched for is computed again."


class _Place(NamedTuple):
    record: FeaturesRecord
    table: pa.Table
    row: int


class FeatureStore:
    """The features of one tower."""

    def __init__(self, folder: Path, *, every_byte: bool = False, remember: Remember = "all") -> None:
        self.folder = folder
        self.tower = TowerRecord.read(folder / TOWER_FILE, f"Remove {folder}: what it holds is computed again.")
        self.records: list[FeaturesRecord] = []
        self.damaged: dict[Path, str] = {}  # records of damaged shards, and what is wrong with each
        self.newer: list[Path] = []  # those of the damaged that a newer prefcache wrote
        self.malformed: list[Path] = []  # and those that no prefcache would have written
        self._remember: Remember = remember
        self._places: dict[bytes, _Place] = {}
        self._listed = set[str]()
        self.rescan(every_byte=every_byte)

    @property
    def dtype(self) -> str:
        return self.tower.dtype

    def __contains__(self, image: bytes) -> bool:
        return image in self._places

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, images: Iterable[bytes]) -> list[bytes]:
        """List those of the images that the store lacks, each once, in an order that all processes share."""
        return sorted({image for image in images if image not in self._places})

    def read(self, image: bytes) -> StoredFeatures:
        """Return a picture's features; IntegrityError if they are not as they were written."""
        record, table, row = self._places[image]
        embeds, deep = (_bytes_of(table, name, row) for name in ("embeds", "deep"))
        assert embeds is not None
        if checksum(embeds, deep) != table["xxh3_64"][row].as_py():
            path = self.folder / record.name
            raise IntegrityError(
                f"{self.folder / record.file} has other values than were written (checksum). Delete {path} and run the same "
                "command again: only what the file held is computed."
            )
        grid, n_tiles = table["grid"][row].as_py(), table["n_tiles"][row].as_py()
        n_tokens = table["n_tokens"][row].as_py()
        return StoredFeatures(embeds, deep, n_tokens, None if grid is None else tuple(grid), n_tiles)

    def rescan(self, *, every_byte: bool = False) -> None:
        """Take in the shards that were committed since the last scan."""
        paths = [path for path in list_records(self.folder) if path.name not in self._listed]
        if not paths:
            return
        verified = VerifiedShards(self.folder, self._remember)
        with counting(f"open {self.folder}", len(paths), "shards") as counter:
            for path in paths:
                self._add(path, verified, every_byte)
                counter.add(1)
        if len(paths) == len(self._listed):  # a memo of some shards would forget the others
            verified.save()

    def _add(self, path: Path, verified: VerifiedShards, every_byte: bool) -> None:
        self._listed.add(path.name)
        try:
            record = FeaturesRecord.read(path, _REMOVE)
            if reason := verified.find_damage(record, every_byte):
                raise IntegrityError(f"{self.folder / record.file} {reason}")
            table = _open(self.folder, record)
        except IntegrityError as error:
            if isinstance(error, MalformedError):
                (self.newer if isinstance(error, NewerError) else self.malformed).append(path)
            self.damaged[path] = str(error)
            return
        self.records.append(record)
        for row, image in enumerate(table["image"].to_pylist()):
            # The first one stays: two processes may have computed the same picture.
            self._places.setdefault(image, _Place(record, table, row))

    def note_discarded(self, paths: Iterable[Path]) -> None:
        """Forget damaged shards whose records were deleted, so that new ones of their names are taken in."""
        for path in paths:
            self.damaged.pop(path, None)
            self._listed.discard(path.name)


def checksum(embeds: np.ndarray, deep: np.ndarray | None) -> int:
    digest = xxhash.xxh3_64(embeds.data)
    if deep is not None:
        digest.update(deep.data)
    return digest.intdigest()


def _open(folder: Path, record: FeaturesRecord) -> pa.Table:
    path = folder / record.file
    try:
        table = artifact.open_arrow_stream(path)
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read ({str(error).partition(chr(10))[0]})") from None
    if table.schema != FEATURES or len(table) != record.rows:
        raise IntegrityError(f"{path} has other columns or rows than were written")
    return table


def _bytes_of(table: pa.Table, name: str, row: int) -> np.ndarray | None:
    """The bytes of a value, without a copy."""
    buffer = table[name][row].as_buffer()
    return None if buffer is None else np.frombuffer(buffer, np.uint8)
