"""Where lines and tables go: names and paths made visible, and the width of a terminal or a pipe."""

import shutil
import sys
from textwrap import fill

from rich.console import Console

from prefcache.pipeline.visible_text import visible

PIPE_WIDTH = 100


def say(text: str) -> None:
    """Print a line. Names and paths in it may come from anywhere, so they are made visible."""
    print(visible(text))


def wrap(text: str, indent: int = 0) -> str:
    """Break a line between words at the terminal's width. A pipe gets it whole, so that grep finds all of it."""
    text = visible(text)
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise what every other write to a closed pipe raises: rich would exit with code 1."""
        raise BrokenPipeError


def open_console() -> Console:
    """Return a console as wide as the terminal, or of a fixed width for a pipe."""
    console = _Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else _Console(markup=False, highlight=False, emoji=False, width=PIPE_WIDTH)
