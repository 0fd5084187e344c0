"""README and the chapters of the guide: their code blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

from prefcache.guide import CHAPTERS
from tests.helpers.project import ROOT

README = ROOT / "README.md"
DOCUMENTS = [README, *(ROOT / "stages/guide" / file.name for file in CHAPTERS.values())]
# Chapters whose Python blocks are one script, to be run in order. Those of README, trl and
# other-trainers run in tests of their own; those of the rest are excerpts from the source.
SCRIPTS = [CHAPTERS["python"]]
EXCERPTS = [file for file in DOCUMENTS if file not in (README, *SCRIPTS, CHAPTERS["trl"], CHAPTERS["other-trainers"])]


def blocks(language: str, *files: Path) -> list[str]:
    """Return the fenced code blocks in that language, of all documents or of these."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [block for file in files or DOCUMENTS for block in fence.findall(file.read_text(encoding="utf-8"))]


def commands(block: str) -> list[str]:
    """Split a block into commands. One continues on the next line after a backslash, or inside quotes."""
    found, lines = [], re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    while lines:
        n = next(n for n in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:n])))
        found.append("\n".join(lines[:n]).strip())
        lines = lines[n:]
    return found


def shown(block: str) -> tuple[str, str]:
    """Split a console block into its command and the output below it."""
    lines = block.splitlines()
    n = next(n for n in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:n])))
    return "\n".join(lines[:n]).removeprefix("$ "), "\n".join(lines[n:])


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:  # an open quote
        return False
    return True
