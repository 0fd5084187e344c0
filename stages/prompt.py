"""The prompt of `prefcache sql`: one query after another, with a history and completion of names.

A query may take several lines and ends with a semicolon. Ctrl-C cancels the one that runs, or what is typed; Ctrl-D leaves.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import PrefcacheError
from pipeline.progress import printable

_FIRST, _NEXT = "prefcache> ", "       ... "
_REMEMBERED = 1000  # queries
_LINE_END = "\x01"  # within a query, in the history's file: a comment ends with its line, and text may go over several
_KEYWORDS = (
    *("select", "from", "where", "group by", "order by", "having", "limit", "with", "join", "using", "count(*)"),
    *("avg(", "sum(", "corr(", "describe", "summarize", "show tables"),
)


def run(ask: Callable[[str], None], cancel: Callable[[], None], names: Sequence[str]) -> None:
    """`ask` answers a query on stdout; `cancel` ends it, from another thread."""
    print("A query ends with a semicolon. Tab completes, Ctrl-C cancels, Ctrl-D leaves. Try `show tables;`.")
    with _line_editing(names) as remember:
        while (query := _read()) is not None:
            if query:
                remember(query)
                _answer(ask, cancel, query)


def _read() -> str | None:
    """A query without its semicolon; empty where it was given up, None at the end of the input."""
    lines: list[str] = []
    while not lines or not lines[-1].rstrip().endswith(";"):
        try:
            line = input(_NEXT if lines else _FIRST)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""
        if lines or line.strip():
            lines.append(line)
    return "\n".join(lines).rstrip().rstrip(";").strip()


def _answer(ask: Callable[[str], None], cancel: Callable[[], None], query: str) -> None:
    """In a thread: Python looks at Ctrl-C only between its own instructions, of which a query has none."""
    failed: list[BaseException] = []
    done = threading.Event()

    def answer() -> None:
        try:
            ask(query)
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=answer, daemon=True).start()
    given_up = False
    while not done.is_set():
        try:
            done.wait(0.1)
            if given_up:  # again and again: the query may not have begun yet
                cancel()
        except KeyboardInterrupt:
            given_up = True
    for error in failed:
        if isinstance(error, KeyboardInterrupt):
            print("cancelled")
        elif isinstance(error, PrefcacheError):
            print(f"error: {printable(str(error))}")
        else:
            raise error


@contextlib.contextmanager
def _line_editing(names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Yields what remembers a query. Without readline, as on some systems, lines are read plainly."""
    try:
        import readline
    except ImportError:
        yield lambda query: None
        return
    words = sorted({*names, *_KEYWORDS})

    def complete(text: str, state: int) -> str | None:
        return next((word for i, word in enumerate(w for w in words if w.startswith(text)) if i == state), None)

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_auto_history(False)
    readline.set_history_length(_REMEMBERED)
    file = history_file()
    # A history that cannot be read or written is no reason not to answer.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
        _replace_in_history(_LINE_END, "\n")
    try:
        yield lambda query: readline.add_history(f"{query};")
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            _replace_in_history("\n", _LINE_END)
            readline.write_history_file(file)


def _replace_in_history(old: str, new: str) -> None:
    import readline

    for i in range(readline.get_current_history_length()):
        readline.replace_history_item(i, readline.get_history_item(i + 1).replace(old, new))


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "prefcache" / "history"
