"""The guide: one Markdown chapter per topic, next to this file, for `prefcache guide` and for people who read the repository.

A chapter begins with its title and one line that says what it is for. Its commands run in a fresh checkout (tests/docs/test_demo.py).
"""

import io
import re
from pathlib import Path

from prefcache.pipeline.errors import look_up

_ORDER = (
    "data",
    "images",
    "scoring",
    "training",
    "losses",
    "questions",
    "sql",
    "ui",
    "report",
    "python",
    "trl",
    "other-trainers",
    "gpu",
    "many-machines",
    "sharing",
    "trust",
    "extend",
)
CHAPTERS = {name: Path(__file__).parent / f"{name}.md" for name in _ORDER}
_LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
_WIDEST = 120  # longer lines are hard to read


def chapter(topic: str) -> str:
    """Return a chapter's Markdown, or raise UsageError with the nearest topic."""
    name = topic.lower().replace(" ", "-").replace("_", "-").removesuffix(".md")
    return look_up(CHAPTERS, name, "", "`prefcache guide` lists them.", what="chapter").read_text(encoding="utf-8")


def summaries() -> dict[str, str]:
    """Return each topic with its one line, the first paragraph below its title; of a link, what it says."""
    firsts = {name: file.read_text(encoding="utf-8").split("\n\n")[1] for name, file in CHAPTERS.items()}
    return {name: _LINK.sub(r"\1", text.replace("\n", " ")) for name, text in firsts.items()}


def render(markdown: str, width: int, color: bool = True) -> str:
    """Lay out Markdown for a terminal of `width` columns."""
    from rich.console import Console
    from rich.markdown import Markdown

    out = io.StringIO()
    console = Console(file=out, width=min(width, _WIDEST), force_terminal=color, color_system="auto" if color else None)
    # Files of the repository cannot be opened from a terminal: print what the link says.
    console.print(Markdown(_LINK.sub(r"\1", markdown), code_theme="ansi_dark", hyperlinks=False))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
