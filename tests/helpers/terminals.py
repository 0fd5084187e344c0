"""Commands on a pseudo-terminal of a given width, or with their output piped: what they write, when, and how it looks in the end."""

import fcntl
import os
import pty
import re
import selectors
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\r\n|\n|\r")


@dataclass(frozen=True)
class Output:
    """What a command wrote where its progress goes, and on stdout if that went elsewhere."""

    text: str
    stdout: str
    code: int
    silences: list[tuple[float, str]]  # each pause in seconds, between two outputs, with what was written before it

    @property
    def longest_silence(self) -> tuple[float, str]:
        return max(self.silences, default=(0.0, ""))

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.text).replace("\r", "")

    @property
    def screen(self) -> list[str]:
        """The lines that are left: a program moves up and erases what it draws anew."""
        lines, row, at = [""], 0, 0
        for control, text in _split(self.text):
            lines[row] = lines[row][:at].ljust(at) + text + lines[row][at + len(text) :]
            at += len(text)
            if control in ("\r", "\r\n"):
                at = 0
            if control in ("\n", "\r\n"):
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif control.endswith("K"):
                lines[row] = ""
            elif control.endswith("A"):
                row = max(row - int(control[2:-1] or 1), 0)
        return [line.rstrip() for line in lines]


def _split(text: str) -> list[tuple[str, str]]:
    """Each control with the text before it."""
    parts, begin = [], 0
    for found in _CONTROL.finditer(text):
        parts.append((found[0], text[begin : found.start()]))
        begin = found.end()
    return [*parts, ("", text[begin:])]


def run_on_terminal(
    command: Sequence[str | Path],
    *,
    columns: int = 80,
    pipe_stdout: bool = False,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    typed: str = "",
) -> Output:
    """Run a command on a terminal; with `pipe_stdout`, only its stderr is one. `typed` is what a person types."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    stdout = subprocess.PIPE if pipe_stdout else theirs
    process = _start(command, cwd, environment, stdin=theirs, stdout=stdout, stderr=theirs)
    os.close(theirs)
    if typed:
        os.write(ours, typed.encode())
    text, silences = _read(ours)
    os.close(ours)
    out = process.communicate(timeout=60)[0] or b""
    return Output(text, out.decode(), process.returncode, silences)


def run_piped(
    command: Sequence[str | Path], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Output:
    """Run a command with stderr, where its progress goes, in one pipe and stdout in another."""
    with open(os.devnull) as nothing:
        process = _start(command, cwd, environment, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text, silences = _read(process.stderr.fileno())
    out = process.communicate(timeout=60)[0]
    return Output(text, out.decode(), process.returncode, silences)


def _start(
    command: Sequence[str | Path], cwd: Path | None, environment: Mapping[str, str] | None, **streams: object
) -> "subprocess.Popen[bytes]":
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    variables |= {"TERM": "xterm-256color", **(environment or {})}
    return subprocess.Popen(command, cwd=cwd, env=variables, **streams)  # type: ignore[call-overload,no-any-return]


def _read(descriptor: int) -> tuple[str, list[tuple[float, str]]]:
    """Read to the end; return the text, and the pauses in it."""
    data, silences, last = b"", [], time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            selector.select()
            try:
                block = os.read(descriptor, 65536)
            except OSError:  # the terminal's other end is closed
                block = b""
            if not block:
                return data.decode(), silences
            if data:
                silences.append((time.monotonic() - last, data[-100:].decode(errors="replace")))
            last = time.monotonic()
            data += block
