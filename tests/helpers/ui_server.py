"""`prefcache ui` as a user starts it, and requests to it as a browser with the cookie sends them."""

import http.client
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from tests.helpers.project import PREFCACHE, start


@dataclass(frozen=True)
class Page:
    status: int
    html: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Site:
    """A running server."""

    address: str  # as it was printed, with the token
    process: "subprocess.Popen[str]"

    @property
    def root(self) -> str:
        return self.address.partition("/?")[0]

    def get(self, path: str, **headers: str) -> Page:
        return self._request("GET", path, None, headers)

    def post(self, path: str, form: list[tuple[str, str]]) -> Page:
        headers = {"content-type": "application/x-www-form-urlencoded", "origin": self.root}
        return self._request("POST", path, urlencode(form), headers)

    def _request(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Page:
        parts = urlsplit(self.address)
        (token,) = parse_qs(parts.query)["token"]
        connection = http.client.HTTPConnection(parts.netloc, timeout=120)
        cookie = {"cookie": f"prefcache-{parts.port}={token}"}
        connection.request(method, path, body, {**cookie, **headers})
        answer = connection.getresponse()
        found = Page(
            answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
        )
        connection.close()
        return found


@contextmanager
def serve(folder: Path, experiment: str = "runs/tiny") -> Iterator[Site]:
    """Start the command in this folder, and end it as Ctrl-C does."""
    command = (PREFCACHE, "ui", experiment, "--port", 0, "--quiet")
    with start(*command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address, process.stderr.read()
            yield Site(address, process)
        finally:
            process.kill()
