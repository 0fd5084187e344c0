"""A file of which this machine has some ranges of bytes. Reading others fetches them and keeps them.

The ranges lie in a sparse file, at their places. A log next to it says which they are: a line is appended after its
bytes were written, so a killed process loses at most what it was about to add, and several processes may add at once.
What the disk loses later is caught as in any other file, by the checksums of the format.
"""

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefcache.pipeline.stored import artifact

_LOG = ".ranges"


class PartialFile(io.RawIOBase):
    """A readable file of a known size; `fetch` returns the bytes from one place up to another."""

    def __init__(self, path: Path, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._position = size, fetch, 0
        self._lock = threading.RLock()
        with artifact.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._log = os.open(_log_path(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            except BaseException:
                os.close(self._data)
                raise
        self._ranges = _parse_log(os.pread(self._log, os.fstat(self._log).st_size, 0), size)

    def read_at(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, which is at most the size."""
        with self._lock:
            self.require(start, end)
            return os.pread(self._data, end - start, start)

    def require(self, start: int, end: int) -> None:
        """Fetch what is missing of a range."""
        with self._lock:
            for gap_start, gap_end in list(_gaps(self._ranges, start, end)):
                data = self._fetch(gap_start, gap_end)
                with artifact.disk_errors(Path(f"/proc/self/fd/{self._data}")):
                    _write_all(self._data, data, gap_start)
                    os.write(self._log, f"{gap_start} {gap_end}\n".encode())
                self._ranges = _merge([*self._ranges, (gap_start, gap_end)])

    @property
    def n_present(self) -> int:
        """The number of bytes that are here."""
        return sum(end - start for start, end in self._ranges)

    # -- as a file ---------------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
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
    # The log first: ranges without bytes would be zeros, bytes without ranges are nothing.
    _log_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return existed


def _log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{_LOG}")


def _parse_log(log: bytes, size: int) -> list[tuple[int, int]]:
    ranges = []
    for line in log.split(b"\n")[:-1]:
        numbers = line.split(b" ")
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            start, end = map(int, numbers)
            if start < end <= size:
                ranges.append((start, end))
    return _merge(ranges)


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges, and join those that touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _gaps(ranges: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that sorted ranges do not cover."""
    for known_start, known_end in ranges:
        if known_end <= start:
            continue
        if known_start >= end:
            break
        if known_start > start:
            yield start, known_start
        start = max(start, known_end)
    if start < end:
        yield start, end


def _write_all(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, place)
        view, place = view[n:], place + n
