"""A file of which this machine has some blocks. Reading others fetches them and keeps them.

Each block has a checksum, so that nothing is parsed that was not written: neither what a store returns nor what lies here
from before. The blocks lie in a sparse file, at their places. A log next to it says which they are: a line is appended
after its block was written, so a killed process loses at most what it was about to add, and several may add at once.
"""

import bisect
import io
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact

_LOG = ".blocks"
_PIECE_BYTES = 8 << 20  # of a block in memory at once


class Block(NamedTuple):
    """A range of a file's bytes and its checksum."""

    start: int
    end: int
    xxh3_128: str


class PartialFile(io.RawIOBase):
    """A readable file, given by its blocks in order. `fetch` returns the bytes of `name` from one place up to another."""

    def __init__(self, path: Path, name: str, blocks: Sequence[Block], fetch: Callable[[int, int], bytes]) -> None:
        self._path, self._name, self._blocks, self._fetch, self._position = path, name, blocks, fetch, 0
        self._ends = [block.end for block in blocks]
        self._lock = threading.RLock()
        self._checked = set[int]()  # blocks that are here, as this process has seen
        with artifact.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._log = os.open(_log_path(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            except BaseException:
                os.close(self._data)
                raise
        self._logged = {int(line) for line in self._read_log().split(b"\n")[:-1] if line.isdigit()}

    def read_at(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, which is at most the size."""
        with self._lock:
            self.require(start, end)
            return os.pread(self._data, end - start, start)

    def read_last_block(self) -> bytes:
        return self.read_at(self._blocks[-1].start, self._blocks[-1].end)

    def require(self, start: int, end: int) -> None:
        """Fetch the blocks of a range that are not here; IntegrityError if one is not as it was written."""
        with self._lock:
            for i in range(bisect.bisect_right(self._ends, start), len(self._blocks)):
                if self._blocks[i].start >= end:
                    break
                if i not in self._checked:
                    self._require_block(i)

    def _require_block(self, i: int) -> None:
        block = self._blocks[i]
        n_bytes = block.end - block.start
        is_here = i in self._logged and _is_whole(block, os.pread(self._data, n_bytes, block.start))
        if not is_here:
            with artifact.disk_errors(self._path):
                is_whole = self._fetch_block(block)
            if not is_whole:
                raise IntegrityError(f"{self._name} has other bytes than were written (checksum)")
            with artifact.disk_errors(self._path):
                os.write(self._log, f"{i}\n".encode())
        self._checked.add(i)

    def _fetch_block(self, block: Block) -> bool:
        """Write a block in its place, a piece at a time; return whether its bytes are those that were written."""
        digest = xxhash.xxh3_128()
        for start in range(block.start, block.end, _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, block.end)
            data = self._fetch(start, end)
            if len(data) != end - start:
                return False
            digest.update(data)
            _write_all(self._data, data, start)
        return digest.hexdigest() == block.xxh3_128

    def _read_log(self) -> bytes:
        return os.pread(self._log, os.fstat(self._log).st_size, 0)

    # -- as a file ---------------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._ends[-1])
        data = self.read_at(self._position, end) if end > self._position else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._data)
            os.close(self._log)
        super().close()


def remove(path: Path) -> bool:
    """Delete a partial file; return whether there was one. A process that reads it can go on."""
    existed = path.exists()
    _log_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return existed


def _log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{_LOG}")


def _is_whole(block: Block, data: bytes) -> bool:
    return len(data) == block.end - block.start and artifact.checksum_bytes(data) == block.xxh3_128


def _write_all(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, place)
        view, place = view[n:], place + n
