"""End the command with one sentence and exit code 130 whenever SIGINT, SIGTERM or SIGHUP arrives.

While a command runs, the signal is raised as KeyboardInterrupt so that the command can clean up. During start-up, while a
command still imports its stage, and at exit there is nothing to clean up, and a library might swallow or replace the
exception: there the process exits at once. A thread that does not end delays the exit by a few seconds at most. A signal
that was ignored at start, as under nohup or in a script's background job, stays ignored.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

SENTENCE = "interrupted. Finished work is kept: run the same command to resume."
EXIT_CODE = 130
SECONDS_TO_EXIT = 5.0  # for threads and exit handlers, after the command has cleaned up
_JSON_ERROR = f'{{"error": {{"kind": "interrupted", "message": "{SENTENCE}", "exit_code": {EXIT_CODE}}}}}'
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Modules that may be on the stack between the program's first line and the import of a stage.
_PACKAGE = __name__.rpartition(".")[0]
_MODULES_BEFORE_STAGE = ("__main__", "runpy", "click", "contextlib", f"{_PACKAGE}.__main__", f"{_PACKAGE}.cli")

_is_running = False
_last_signal = 0  # that arrived, or 0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. They end the prompt too, where Ctrl-C only cancels a query."""


def install() -> None:
    """Install the handlers. Call this before importing anything else."""
    atexit.register(_ignore_signals)  # registered first, so it runs last
    sys.unraisablehook = _repeat_swallowed
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextlib.contextmanager
def raise_signals() -> Iterator[None]:
    """Raise signals as KeyboardInterrupt while a command runs."""
    global _is_running
    _is_running = True
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _last_signal:
            _bound_exit()
            if not isinstance(error, KeyboardInterrupt):  # a library has turned the interrupt into an error of its own
                raise KeyboardInterrupt from None
        raise
    finally:
        _is_running = False


def forget_signal() -> None:
    """Forget a handled signal: the command continues."""
    global _last_signal
    _last_signal = 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _last_signal
    _last_signal = number
    if not _is_running or _is_importing_stage(frame):
        _exit()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _exit() -> NoReturn:
    line = _JSON_ERROR if "--json" in sys.argv else f"error: {SENTENCE}"
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(EXIT_CODE)


def _is_importing_stage(frame: FrameType | None) -> bool:
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    for caller in reversed(stack):
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            return True
        name = str(caller.f_globals.get("__name__"))
        if not any(f"{name}.".startswith(f"{known}.") for known in _MODULES_BEFORE_STAGE):
            return False
    return False


def _bound_exit() -> None:
    """Exit in a few seconds even if a thread never ends: the interpreter would wait for it without a limit."""
    timer = threading.Timer(SECONDS_TO_EXIT, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()


def _repeat_swallowed(unraisable: Any) -> None:
    """Repeat an interrupt that hit a destructor or a callback, where Python would only print it."""
    if not (_last_signal and issubclass(unraisable.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)
    elif not _is_running:
        _exit()
    else:
        threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, _last_signal)).start()


def _ignore_signals() -> None:
    """Ignore signals during the interpreter's own shutdown, which restores the default handlers."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
