"""Progress of a command: bars with rate and time left on a terminal and in a notebook, plain lines elsewhere.

It goes to stderr, so that stdout has results only (a notebook has no use for stderr: see progress_display.Notebook). A front
door makes it the running command's, and then nothing is silent for more than a few seconds:

    with Progress(command="score") as progress:
        progress.say("score: loading m")
        with progress.count("score", 2000, "tokens") as counter:
            counter.add(500)

Work deep inside, such as hashing a file, reports to the running command without being handed its Progress:

    with counting("hash model.safetensors", n_bytes, "bytes") as counter: ...
    with working("load m"): ...    # for what cannot report how far it is
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from prefcache.pipeline import progress_display
from prefcache.pipeline.progress_display import Counter, Display

__all__ = ["Counter", "Progress", "counting", "working"]

_SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """Prints lines and counts work. If `quiet`, it prints only warnings; if `silent`, as in all processes but the main one, nothing.

    `label` comes before what is said, as in "run 2 of 8".
    """

    def __init__(
        self, quiet: bool = False, *, command: str = "prefcache", label: str = "", silent: bool = False
    ) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self._command, self._label = command, label
        self._lock = threading.RLock()
        self._display: Display | None = None
        self._token: Token[Progress | None] | None = None
        self._is_over = threading.Event()

    # -- the running command -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._token = _running.set(self)
        if not self.quiet:
            self._display = progress_display.choose_display()
            self._is_over.clear()
            threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_over.set()
            self._display = None
        assert self._token is not None
        _running.reset(self._token)

    def _watch(self) -> None:
        """Show how far the work is where it has not reported for a while: a forward or a disk may be slow."""
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            with self._lock:
                if self._display is not None:
                    self._display.show_if_due(self._command)

    # -- lines -------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        if not self.quiet:
            with self._lock:
                self._show().print(self._add_label(line))

    def warn(self, line: str) -> None:
        if not self.silent:
            with self._lock:
                self._show().print(f"warning: {self._add_label(line)}", is_warning=True)

    def _show(self) -> Display:
        """The display of the running command; outside of one, where streams may have been replaced, the one for now."""
        return self._display or progress_display.choose_display()

    def _add_label(self, text: str) -> str:
        return f"{self._label}: {text}" if self._label else text

    # -- work --------------------------------------------------------------------------------------------------------

    def count(self, what: str, total: int | None, unit: str, *, done: int = 0) -> AbstractContextManager[Counter]:
        """Show how much of the command's own work is done, `done` units of it before now."""
        return self._count(Counter(self._add_label(what), total, unit, done=done))

    def count_aside(self, what: str, total: int | None, unit: str) -> AbstractContextManager[Counter]:
        """Show work on the side while it takes, if it takes long."""
        return self._count(Counter(self._add_label(f"{self._command}: {what}"), total, unit, is_main=False))

    @contextmanager
    def _count(self, counter: Counter) -> Iterator[Counter]:
        if self.quiet:
            yield counter
            return
        is_running, is_finished = self._display is not None, False
        self._display = display = self._show()

        def change(counter: Counter) -> None:
            with self._lock:
                display.change(counter)

        with self._lock:
            display.open(counter)
        counter.changed = change
        try:
            yield counter
            is_finished = True
        finally:
            with self._lock:
                display.close(counter, is_finished=is_finished)
            if not is_running:
                self._display = None


_running: ContextVar[Progress | None] = ContextVar("running", default=None)


def counting(what: str, total: int | None, unit: str) -> AbstractContextManager[Counter]:
    """Count work on the side of the running command, if one is running in this process."""
    return (_running.get() or _NOBODY).count_aside(what, total, unit)


def working(what: str) -> AbstractContextManager[Counter]:
    """Show for how long something takes that cannot report how far it is."""
    return counting(what, None, "")


def _forget_running() -> None:
    """Leave the display to the parent of a forked process, which may have been holding the lock."""
    _running.set(None)


os.register_at_fork(after_in_child=_forget_running)
_NOBODY = Progress(silent=True)
