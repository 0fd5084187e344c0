"""Records in JSON text: JSON Lines or one array, plain or compressed by gzip or zstd.

They are only cut into chunks here, in memory that does not grow with the file; workers parse them.
"""

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources.chunk import Chunk, Limits, Line, count_raw, group_by_size, parse_json

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 16
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

# -- bytes -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes, decompressed. What keeps them from being read becomes an error for the user."""
    compression = None
    try:
        with open(file, "rb") as plain:
            first = plain.read(4)
            compression = next((name for magic, name in _MAGIC.items() if first.startswith(magic)), None)
        with _decompress(file, compression) if compression else open(file, "rb", buffering=BLOCK) as stream:
            yield stream
    except OSError as error:
        if compression is None:
            raise UsageError(f"{file} cannot be read ({error.strerror or error}).") from None
        raise DataError(
            f"{file} is cut short or damaged: {error}. Expected a whole {compression} file; copy or download it again."
        ) from None


def _decompress(file: Path, compression: str) -> BinaryIO:
    import pyarrow as pa

    # Unlike the standard library's gzip, it also reads zstd, and reports a cut file as an OSError.
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression=compression), BLOCK))


def copy_stream(stream: BinaryIO, file: BinaryIO, most: int | None) -> None:
    """Copy a stream; of JSON Lines, stop after the first `most` records."""
    head = stream.read(64)
    if most is None or not head.removeprefix(BOM).lstrip().startswith(b"{"):
        file.write(head)
        shutil.copyfileobj(stream, file, BLOCK)
        return
    head += stream.readline()
    file.write(head)
    n = sum(bool(line.strip()) for line in head.split(b"\n"))
    while n < most and (line := stream.readline()):
        file.write(line)
        n += not line.isspace()


# -- JSON Lines ------------------------------------------------------------------------------------------------------


def line_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    with open_bytes(file) as stream:
        buffer, number, ended = bytearray(stream.read(BLOCK).removeprefix(BOM)), 1, False
        while True:
            # One byte more than fits tells whether a last line without a line end fits too.
            while len(buffer) <= limits.n_bytes and not ended:
                block = stream.read(BLOCK)
                ended = not block
                buffer += block
            if not buffer:
                return
            end, n_lines = _find_cut(buffer, ended, limits)
            if not end:
                end, n_lines = _read_long_line(buffer, stream, limits), 1
            with memoryview(buffer) as view:
                lines = bytes(view[:end])
            yield Chunk(source, number, end, lines, read_lines)
            del buffer[:end]
            number += n_lines


def _find_cut(buffer: bytearray, ended: bool, limits: Limits) -> tuple[int, int]:
    """Return where the most whole lines that one chunk may hold end, and their number; 0 if not even one fits."""
    limit, n_lines = min(len(buffer), limits.n_bytes), 0
    for start in range(0, limit, _PIECE):
        stop = min(start + _PIECE, limit)
        missing = limits.records - n_lines
        n_more = buffer.count(b"\n", start, stop)
        if n_more >= missing:
            beyond = buffer[start:stop].split(b"\n", missing)[-1]
            return stop - len(beyond), limits.records
        n_lines += n_more
    if ended and limit == len(buffer):
        return limit, n_lines
    return buffer.rfind(b"\n", 0, limit) + 1, n_lines


def _read_long_line(buffer: bytearray, stream: BinaryIO, limits: Limits) -> int:
    """Read on until the first line is whole, and return its length."""
    searched = limits.n_bytes
    while (newline := buffer.find(b"\n", searched)) < 0:
        searched = len(buffer)
        block = stream.read(BLOCK)
        if not block:
            return len(buffer)
        buffer += block
    return newline + 1


def read_lines(chunk: Chunk) -> Iterator[Line]:
    """Parse the lines of a chunk. Blank lines are skipped, but they count."""
    for number, raw in enumerate(chunk.payload.split(b"\n"), start=chunk.number):
        if raw and not raw.isspace():
            raw = raw.rstrip(b"\r")
            yield Line(chunk.source, number, raw, *parse_json(raw))


# -- one JSON array --------------------------------------------------------------------------------------------------


def array_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    """`number` is the element's, from 1."""
    with open_bytes(file) as stream:
        elements = zip(count(1), _Array(file, stream).elements())
        for size, group in group_by_size(elements, limits, count_raw):
            yield Chunk(source, group[0][0], size, group, read_elements)


def read_elements(chunk: Chunk) -> Iterator[Line]:
    for number, raw in chunk.payload:
        yield Line(chunk.source, number, raw, *parse_json(raw))


class _Array:
    """The elements of an array as raw bytes, through a window on the file.

    The window is decoded as Latin-1, in which a character is a byte: JSON's own signs are ASCII, and whether the rest
    is UTF-8 is checked for each element when it is parsed.
    """

    _SPACE = re.compile(r"[ \t\r\n]*")
    # Numbers are not converted: one with too many digits is the element's error, not the array's.
    _decode = staticmethod(json.JSONDecoder(parse_int=str, parse_float=str, strict=False).raw_decode)

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.window, self.at, self.ended = stream.read(BLOCK).removeprefix(BOM).decode("latin-1"), 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def elements(self) -> Iterator[bytes]:
        self._next_sign()
        self.at += 1  # the bracket, by which the array was recognised
        sign = self._next_sign()
        while sign != "]":
            self._next_sign()
            yield self._next_element()
            sign = self._next_sign()
            if sign not in (",", "]"):
                self._fail("Expecting ',' or ']'", self.at)
            self.at += sign == ","
        self.at += 1
        if self._next_sign():
            self._fail("Something follows the array's end", self.at)

    def _next_sign(self) -> str:
        """Return the next character that is not a space, without consuming it; "" at the end of the file."""
        while True:
            space = self._SPACE.match(self.window, self.at)
            assert space
            self.at = space.end()
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self._read_on()

    def _next_element(self) -> bytes:
        while True:
            try:
                _, end = self._decode(self.window, self.at)
                # A number may continue beyond the window, at whose end "1e+" is read as 1.
                if end + 2 < len(self.window) or self.ended:
                    raw = self.window[self.at : end].encode("latin-1")
                    self.at = end
                    return raw
            except json.JSONDecodeError as error:
                # The longest sign that the end of the window can cut is a pair of \u escapes.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if self.ended or not cut:
                    self._fail(error.msg, error.pos)
            except RecursionError:
                self._fail("Nested too deeply", self.at)
            self._read_on()

    def _read_on(self) -> None:
        """Drop what was consumed, and read as much as is left: reading less would take quadratic time on a long element."""
        self.line, self.column = self._locate(self.at)
        rest = self.window[self.at :]
        block = self.stream.read(max(BLOCK, len(rest)))
        self.ended = not block
        self.window, self.at = rest + block.decode("latin-1"), 0

    def _locate(self, position: int) -> tuple[int, int]:
        before = self.window[:position]
        newlines = before.count("\n")
        n_characters = len(before[before.rfind("\n") + 1 :].encode("latin-1").decode("utf-8", "replace"))
        return self.line + newlines, n_characters + (1 if newlines else self.column)

    def _fail(self, problem: str, position: int) -> NoReturn:
        line, column = self._locate(position)
        raise DataError(
            f"{self.file} is a JSON array that breaks at line {line}, column {column}: {problem}. Nothing after that "
            "can be trusted: repair the file there, or write it again as JSON Lines, an object per line."
        )
