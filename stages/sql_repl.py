"""The prompt of `prefcache sql`, with history and completion.

A query may take several lines and ends with a semicolon. Ctrl-C cancels the running query, or the one being typed; Ctrl-D quits.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefcache import interrupts
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.visible_text import visible

_FIRST_PROMPT, _NEXT_PROMPT = "prefcache> ", "       ... "
_HISTORY_LENGTH = 1000  # queries
# Replaces line ends in the history's file: queries keep their lines, because a comment ends with its line.
_LINE_END = "\x01"
_KEYWORDS = (
    *("select", "from", "where", "group by", "order by", "having", "limit", "with", "join", "using", "count(*)"),
    *("avg(", "sum(", "corr(", "describe", "summarize", "show tables"),
)


def run(ask: Callable[[str], None], names: Sequence[str]) -> None:
    """Read queries and pass each to `ask`, which prints the answer and may be interrupted. `names` are completed."""
    print("A query ends with a semicolon. Tab completes, Ctrl-C cancels, Ctrl-D quits. Try `show tables;`.")
    with _line_editing(names) as add_to_history:
        while (query := _read_query()) is not None:
            if not query:
                continue
            add_to_history(query)
            try:
                ask(query)
            except interrupts.Terminated:
                raise
            except KeyboardInterrupt:
                interrupts.forget_signal()
                print("cancelled")
            except PrefcacheError as error:
                print(f"error: {visible(str(error))}")


def _read_query() -> str | None:
    """Read a query without its semicolon; return "" if it was cancelled, None at the end of the input."""
    lines: list[str] = []
    while not lines or not lines[-1].rstrip().endswith(";"):
        try:
            line = input(_NEXT_PROMPT if lines else _FIRST_PROMPT)
        except EOFError:
            print()
            return None
        except interrupts.Terminated:
            raise
        except KeyboardInterrupt:
            interrupts.forget_signal()
            print()
            return ""
        if lines or line.strip():
            lines.append(line)
    return "\n".join(lines).rstrip().rstrip(";").strip()


@contextlib.contextmanager
def _line_editing(names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Set up completion and history; yield what adds a query to the history. Some systems lack readline: then do nothing."""
    try:
        import readline
    except ImportError:
        yield lambda query: None
        return
    words = sorted({*names, *_KEYWORDS})

    def complete(text: str, state: int) -> str | None:
        matches = [word for word in words if word.startswith(text)]
        return matches[state] if state < len(matches) else None

    def replace_in_history(old: str, new: str) -> None:
        for i in range(readline.get_current_history_length()):
            readline.replace_history_item(i, readline.get_history_item(i + 1).replace(old, new))

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_auto_history(False)
    readline.set_history_length(_HISTORY_LENGTH)
    file = history_file()
    # The prompt works without a readable and writable history.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
        replace_in_history(_LINE_END, "\n")
    try:
        yield lambda query: readline.add_history(f"{query};")
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_in_history("\n", _LINE_END)
            readline.write_history_file(file)


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "prefcache" / "history"
