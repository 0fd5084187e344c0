"""Lines for a person on stdout: names and paths made visible, and wrapped between words on a terminal."""

import sys

from rich.console import Console
from rich.text import Text

from prefcache.pipeline.visible_text import visible, wrap_for
from prefcache.row_layout import open_console

__all__ = ["open_console", "print_text", "say", "wrap"]


def say(text: str, indent: int | None = None) -> None:
    """Print a line. Names and paths in it may come from anywhere, so they are made visible."""
    print(wrap(text, indent))


def print_text(console: Console, text: Text) -> None:
    """Print text with styles, wrapped between words on a terminal."""
    console.print(text, soft_wrap=not console.is_terminal)


def wrap(text: str, indent: int | None = None) -> str:
    """Break lines between words on a terminal; those that follow begin with `indent` blanks, or with as many as the first."""
    return wrap_for(sys.stdout, visible(text), indent)
