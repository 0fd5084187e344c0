"""Many commands in one process of their own: for settings that a library reads once, without importing PyTorch for each."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.project import Done, checked

_SCRIPT = """
import json, os, sys
from click.testing import CliRunner
from prefcache.cli import main
for line in sys.stdin:
    arguments, settings = json.loads(line)
    before = dict(os.environ)
    os.environ.update(settings)
    result = CliRunner().invoke(main, arguments)
    os.environ.clear()
    os.environ.update(before)
    error = repr(result.exception) if result.exception and not isinstance(result.exception, SystemExit) else ""
    print(json.dumps([result.exit_code, result.stdout, result.stderr + error]), flush=True)
"""


class Session:
    """A process that runs one command after another in a folder."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self, *arguments: Any, code: int | None = 0, **settings: str) -> Done:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(map(str, arguments)), settings]) + "\n")
        self._process.stdin.flush()
        return checked(Done(*json.loads(self._process.stdout.readline())), code)


@contextmanager
def open_session(folder: Path, environment: dict[str, str]) -> Iterator[Session]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Session(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
