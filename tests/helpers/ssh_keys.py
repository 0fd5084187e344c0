"""SSH keys and files of allowed signers, made by ssh-keygen."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def make_key(path: Path, passphrase: str = "") -> Path:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs OpenSSH")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", path.name, "-f", path], check=True)
    return path


def allow(file: Path, *keys: Path, options: str = "") -> Path:
    """Write a file that allows these keys, each under the name of its file."""
    lines = [f"{key.name}@example.com {options} {' '.join(public(key))}\n" for key in keys]
    file.write_text("".join(lines))
    return file


def public(key: Path) -> list[str]:
    return key.with_name(f"{key.name}.pub").read_text().split()[:2]


@contextmanager
def agent() -> Iterator[dict[str, str]]:
    """Run an agent; yield the variables that lead to it."""
    started = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    found = dict(word.split("=", 1) for word in started.replace(";", " ").split() if "=" in word)
    try:
        yield found
    finally:
        subprocess.run(["ssh-agent", "-k"], env={**os.environ, **found}, capture_output=True, check=True)
