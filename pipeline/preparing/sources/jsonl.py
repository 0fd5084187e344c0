"""Records in JSON text: JSON Lines or one array, plain or compressed by gzip or zstd.

Here they are only cut into chunks, at a memory that does not grow with the file; workers parse them.
"""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from pipeline.errors import DataError, UsageError
from pipeline.preparing.sources.chunk import Chunk, Limits, Line, grouped, parse_json

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 16
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

# -- bytes -----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. What keeps them from being read is told as the user's error."""
    compression = None
    try:
        with open(file, "rb") as plain:
            first = plain.read(4)
            compression = next((name for magic, name in _MAGIC.items() if first.startswith(magic)), None)
        with _decompressed(file, compression) if compression else open(file, "rb", buffering=BLOCK) as stream:
            yield stream
    except OSError as error:
        if compression is None:
            raise UsageError(f"{file} cannot be read ({error.strerror or error}).") from None
        raise DataError(
            f"{file} is cut short or damaged: {error}. Expected a whole {compression} file; copy or download it again."
        ) from None


def _decompressed(file: Path, compression: str) -> BinaryIO:
    import pyarrow as pa

    # Unlike the standard library's gzip, it also reads zstd, and reports a cut file as an OSError.
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression=compression), BLOCK))


# -- JSON Lines ------------------------------------------------------------------------------------------------------


def line_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    with opened(file) as stream:
        buffer, number, ended = bytearray(stream.read(BLOCK).removeprefix(BOM)), 1, False
        while True:
            # One byte more than fits: it tells whether a last line without an end fits too.
            while len(buffer) <= limits.n_bytes and not ended:
                block = stream.read(BLOCK)
                ended = not block
                buffer += block
            if not buffer:
                return
            end, n_lines = _cut(buffer, ended, limits)
            if not end:
                end, n_lines = _end_of_long_line(buffer, stream, limits), 1
            with memoryview(buffer) as view:
                lines = bytes(view[:end])
            yield Chunk(source, number, end, lines, read_lines)
            del buffer[:end]
            number += n_lines


def _cut(buffer: bytearray, ended: bool, limits: Limits) -> tuple[int, int]:
    """Where the most whole lines that one chunk may hold end, and how many they are; 0 where not even one fits."""
    limit, n_lines = min(len(buffer), limits.n_bytes), 0
    for start in range(0, limit, _PIECE):
        stop = min(start + _PIECE, limit)
        missing = limits.records - n_lines
        found = buffer.count(b"\n", start, stop)
        if found >= missing:
            beyond = buffer[start:stop].split(b"\n", missing)[-1]
            return stop - len(beyond), limits.records
        n_lines += found
    if ended and limit == len(buffer):
        return limit, n_lines
    return buffer.rfind(b"\n", 0, limit) + 1, n_lines


def _end_of_long_line(buffer: bytearray, stream: BinaryIO, limits: Limits) -> int:
    searched = limits.n_bytes
    while (found := buffer.find(b"\n", searched)) < 0:
        searched = len(buffer)
        block = stream.read(BLOCK)
        if not block:
            return len(buffer)
        buffer += block
    return found + 1


def read_lines(chunk: Chunk) -> Iterator[Line]:
    """Blank lines are no records; they are passed over, but they count."""
    for number, raw in enumerate(chunk.payload.split(b"\n"), start=chunk.number):
        if raw and not raw.isspace():
            raw = raw.rstrip(b"\r")
            yield Line(chunk.source, number, raw, *parse_json(raw))


# -- one JSON array --------------------------------------------------------------------------------------------------


def array_chunks(file: Path, source: str, limits: Limits) -> Iterator[Chunk]:
    """`number` is the element's, from 1."""
    with opened(file) as stream:
        for size, group in grouped(zip(count(1), _Array(file, stream).elements()), limits):
            yield Chunk(source, group[0][0], size, group, read_elements)


def read_elements(chunk: Chunk) -> Iterator[Line]:
    for number, raw in chunk.payload:
        yield Line(chunk.source, number, raw, *parse_json(raw))


class _Array:
    """The elements of an array as raw bytes, through a window on the file.

    The window is decoded as Latin-1, in which a character is a byte: JSON's own signs are ASCII, and whether the
    rest is UTF-8 is asked of each element where it is parsed.
    """

    _SPACE = re.compile(r"[ \t\r\n]*")
    # Numbers are not converted: one of too many digits is its element's fault, not the array's.
    _decode = staticmethod(json.JSONDecoder(parse_int=str, parse_float=str, strict=False).raw_decode)

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.window, self.at, self.ended = stream.read(BLOCK).removeprefix(BOM).decode("latin-1"), 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def elements(self) -> Iterator[bytes]:
        self._sign()
        self.at += 1  # the bracket, by which the array was recognised
        sign = self._sign()
        while sign != "]":
            self._sign()
            yield self._element()
            sign = self._sign()
            if sign not in (",", "]"):
                self._broken("Expecting ',' or ']'", self.at)
            self.at += sign == ","
        self.at += 1
        if self._sign():
            self._broken("Something follows the array's end", self.at)

    def _sign(self) -> str:
        """The next character that is no space, without taking it; at the file's end nothing."""
        while True:
            space = self._SPACE.match(self.window, self.at)
            assert space
            self.at = space.end()
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self._read_on()

    def _element(self) -> bytes:
        while True:
            try:
                _, end = self._decode(self.window, self.at)
                # A number may go on behind the window's end, at which "1e+" is read as 1.
                if end + 2 < len(self.window) or self.ended:
                    raw = self.window[self.at : end].encode("latin-1")
                    self.at = end
                    return raw
            except json.JSONDecodeError as error:
                # The longest sign that the window's end can cut is a pair of \u escapes.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if self.ended or not cut:
                    self._broken(error.msg, error.pos)
            except RecursionError:
                self._broken("Nested too deeply", self.at)
            self._read_on()

    def _read_on(self) -> None:
        """Forget what was taken, and read as much again as is left, so that a long element costs no quadratic time."""
        self.line, self.column = self._where(self.at)
        rest = self.window[self.at :]
        block = self.stream.read(max(BLOCK, len(rest)))
        self.ended = not block
        self.window, self.at = rest + block.decode("latin-1"), 0

    def _where(self, position: int) -> tuple[int, int]:
        before = self.window[:position]
        newlines = before.count("\n")
        n_characters = len(before[before.rfind("\n") + 1 :].encode("latin-1").decode("utf-8", "replace"))
        return self.line + newlines, n_characters + (1 if newlines else self.column)

    def _broken(self, problem: str, position: int) -> NoReturn:
        line, column = self._where(position)
        raise DataError(
            f"{self.file} is a JSON array that breaks at line {line}, column {column}: {problem}. Nothing after that "
            "can be trusted: mend the file there, or write it again as JSON Lines, an object per line."
        )
