"""Serve an experiment's pages as `prefcache ui` does, and ask for them over HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from tests.helpers.project import PREFCACHE, default_signals


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str


class Site:
    """A running server, asked as its own pages ask it unless told otherwise."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.address, self.host = address, parts.netloc
        self.token = parts.query.removeprefix("token=")
        self.cookie = f"prefcache-{parts.port}={self.token}"

    def get(self, path: str, query: Sequence[tuple[str, Any]] = (), **headers: str | None) -> Answer:
        return self.ask("GET", path + (f"?{urlencode(query)}" if query else ""), None, headers)

    def post(self, path: str, form: Sequence[tuple[str, Any]], **headers: str | None) -> Answer:
        defaults = {"origin": f"http://{self.host}", "content-type": "application/x-www-form-urlencoded"}
        return self.ask("POST", path, urlencode(form), defaults | headers)

    def ask(self, method: str, path: str, body: str | None, headers: Mapping[str, str | None]) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        sent = {"host": self.host, "cookie": self.cookie} | dict(headers)
        connection.putrequest(method, path, skip_host=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body.encode())))
        connection.endheaders(body.encode() if body is not None else None)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, text)


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Site]:
    """Run `prefcache ui` in the folder until the block ends, then end it as Ctrl-C does and expect exit code 0."""
    command = [PREFCACHE, "ui", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=default_signals,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        address = process.stdout.readline().strip()
        assert address, process.stderr.read()
        yield Site(address)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    finally:
        process.kill()
        process.communicate()


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(" ".join([tag, *sorted(name for name, _ in attrs)]))


def elements(page: str) -> list[str]:
    """The elements of a page with the names of their attributes: what a text must not be able to change."""
    parser = _Elements()
    parser.feed(page)
    return parser.tags


def listed_ids(page: str) -> list[str]:
    """The examples in a list, in its order."""
    return re.findall(r'name="id" value="([^"]+)"', page)


def json_of(answer: Any) -> Any:
    return json.loads(answer.stdout)
