"""Configs: one made from another trainer's, and the settings that a config can have."""

import sys
from collections.abc import Iterable

from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.config_settings import Setting
from prefcache.pipeline.visible_text import visible
from prefcache.terminal_output.console import open_console, print_text, say


def print_converted(result: command_results.ConvertResult) -> None:
    """Print the config on stdout unless it went to a file, and what became of each key on stderr."""
    titles = {"": result.became, "has no meaning here: ": result.ignored, "DIFFERS: ": result.differs}
    for title, entries in titles.items():
        for theirs, ours in entries.items():
            print(visible(f"{theirs}: {title}{ours}"), file=sys.stderr)
    if result.output is None:
        print(result.config_text(), end="")


def print_settings(settings: Iterable[Setting]) -> None:
    console = open_console()
    for setting in settings:
        line = Text(setting.key, style="bold") + Text(f" ({setting.type})")
        if setting.default:
            line += Text(f" = {setting.default}")
        elif setting.default is None:
            line += Text(" required", style="bold")
        print_text(console, line)
        say(f"    {setting.meaning}")
