"""The prompt of `prefcache sql`, with history and completion.

A query may take several lines and ends with a semicolon. Ctrl-C cancels the running query, or the one being typed; Ctrl-D quits.
A line that is a command, such as `help`, needs no semicolon. They are those that people know from psql and DuckDB.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefcache import interrupts
from prefcache.pipeline.errors import PrefcacheError
from prefcache.terminal_output import choices
from prefcache.terminal_output.console import say

_FIRST_PROMPT, _NEXT_PROMPT = "prefcache> ", "       ... "
_HISTORY_LENGTH = 1000  # queries
# Replaces line ends in the history's file: queries keep their lines, because a comment ends with its line.
_LINE_END = "\x01"
_KEYWORDS = (
    *("select", "from", "where", "group by", "order by", "having", "limit", "with", "join", "using", "count(*)"),
    *("avg(", "sum(", "corr(", "describe", "summarize", "show tables"),
)


_HELP = """\
A query may take several lines and ends with a semicolon: select * from pairs limit 5;
help VIEW (or \\d VIEW) describes a view and its columns. exit (or quit, \\q, Ctrl-D) leaves.
Tab completes, Ctrl-C cancels, the arrow up brings back earlier queries."""
_HELP_WORDS = ("help", "?", ".help", "\\h", "\\?")
_EXIT_WORDS = ("exit", "quit", ".exit", ".quit", "\\q")
_VIEWS_WORDS = ("views", "tables", ".tables", ".schema", "\\d", "\\dt", "\\dv")
# With these, a query may begin on a line of its own.
_STARTERS = ("select", "with", "from", "describe", "summarize", "show", "pivot", "unpivot", "values", "table")

View = tuple[str, str, list[tuple[str, str]]]  # its name, its purpose, its columns with their types


def run(ask: Callable[[str], None], views: Sequence[View]) -> None:
    """Read queries and pass each to `ask`, which prints the answer and may be interrupted. Names in `views` are completed."""
    print("A query ends with a semicolon. Tab completes, Ctrl-C cancels, Ctrl-D quits. Try `help`, or `show tables;`.")
    names = [name for view, _, columns in views for name in (view, *(column for column, _ in columns))]
    with _line_editing(names) as add_to_history:
        while (query := _read_query()) is not None:
            if not query:
                continue
            if _is_command(query):
                if query.lower() in _EXIT_WORDS:
                    return
                _obey(query, views)
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
                say(f"error: {error}")


def _is_command(line: str) -> bool:
    """Tell whether a line is not a query: a command, or a single word that no query begins with."""
    first, *others = line.lower().split()
    if others:
        return first in (*_HELP_WORDS, *_VIEWS_WORDS) and len(others) == 1
    return first not in _STARTERS


def _obey(line: str, views: Sequence[View]) -> None:
    word, _, name = line.partition(" ")
    known = {view[0]: view for view in views}
    asked = name.strip().lower()
    if asked in known:
        choices.print_views([known[asked]])
    elif asked:
        near = difflib.get_close_matches(asked, known, n=1)
        say(f"There is no view {asked}{f'; the nearest is {near[0]}' if near else ''}. There are {', '.join(known)}.")
    elif word.lower() in _HELP_WORDS:
        say(f"{_HELP}\nViews: {', '.join(known)}.")
    elif word.lower() in _VIEWS_WORDS:
        for view, purpose, _ in views:
            say(f"{view}: {purpose}", indent=4)
    else:
        example = word.lower() if word.lower() in known else "pairs"
        say(
            f"`{word}` is not a query, nor a command. Ask in SQL, as in `select * from {example} limit 5;`, or try `help`."
        )


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
        if not lines and line.strip() and _is_command(command := line.strip().rstrip(";").strip() or ";"):
            return command
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
