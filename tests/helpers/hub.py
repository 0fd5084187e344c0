"""A hub of models and data sets that speaks the hub's protocol over HTTP: small files within the commit, Parquet by LFS."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_mine"
Files = dict[str, bytes]
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Repository:
    """The files of each commit; the last one is main."""

    private: bool = True
    commits: list[tuple[str, Files]] = field(default_factory=list)

    def add(self, files: Files) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits.append((commit, files))
        return commit

    @property
    def files(self) -> Files:
        return self.commits[-1][1]

    def find(self, revision: str) -> tuple[str, Files] | None:
        if revision == "main":
            return self.commits[-1]
        return next((each for each in self.commits if each[0] == revision), None)


@dataclass
class Hub:
    """What was asked of it, in order; what it has; and how it misbehaves."""

    url: str = ""
    refuses: int | None = None  # the status of every answer
    loses: int | None = None  # this many uploads by LFS work, and none after that
    tampers: Any = None  # function of a file's name and bytes, for what is served
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and token
    created: list[dict[str, Any]] = field(default_factory=list)
    repositories: dict[str, Repository] = field(default_factory=dict)  # by `models/org/name` or `datasets/org/name`
    stored: Files = field(default_factory=dict)  # by LFS, by their SHA-256
    served: list[tuple[str, int, bool]] = field(default_factory=list)  # file, bytes, and whether it was a range

    def answer(self, method: str, path: str, body: bytes, headers: Any) -> Answer:
        if self.refuses:
            return self.refuses, {"error": "no"}, {}
        parts = urlsplit(path).path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}, {}
        if parts[0] == "lfs":
            return self._store(parts[1], body)
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            skipped = 1 if kind == "datasets" else 0
            name, rest = "/".join(parts[skipped : skipped + 2]).removesuffix(".git"), parts[skipped + 2 :]
        repository = self.repositories.get(f"{kind}/{name}")
        if repository is None or (repository.private and headers.get("authorization") != f"Bearer {TOKEN}"):
            return 404, {"error": "not here"}, {"x-error-code": "RepoNotFound"}
        match rest:
            case ["preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {each: "lfs" if each.endswith(".parquet") else "regular" for each in paths}
                files = [{"path": each, "uploadMode": modes[each], "shouldIgnore": False} for each in paths]
                return 200, {"files": files}, {}
            case ["info", "lfs", "objects", "batch"]:
                return self._offer(json.loads(body))
            case ["commit", _]:
                return self._commit(f"{kind}/{name}", repository, body)
            case [] | ["revision", _]:
                return self._describe(name, repository, rest[1] if rest else "main")
            case ["tree", revision, *folders]:
                return self._list(repository, unquote(revision), "/".join(folders))
            case ["paths-info", revision]:
                return self._list(repository, unquote(revision), "", json.loads(body)["paths"])
            case ["resolve", revision, *steps]:
                return self._serve(repository, unquote(revision), unquote("/".join(steps)), method, headers)
        return 404, {"error": f"not here: {path}"}, {}

    # -- uploads -----------------------------------------------------------------------------------------------------

    def _create(self, asked: dict[str, Any]) -> Answer:
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        self.created.append(asked)
        url = f"{self.url}/{'' if kind == 'models' else 'datasets/'}{name}"
        if f"{kind}/{name}" in self.repositories:
            return 409, {"error": "exists", "url": url}, {}
        self.repositories[f"{kind}/{name}"] = repository = Repository(asked.get("visibility") == "private")
        repository.add({".gitattributes": b"*.parquet filter=lfs\n"} if kind == "datasets" else {})
        return 200, {"url": url}, {}

    def _offer(self, asked: dict[str, Any]) -> Answer:
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{each['oid']}", "header": {}}}
            objects.append({**each, **({} if each["oid"] in self.stored else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, oid: str, body: bytes) -> Answer:
        if self.loses is not None and len(self.stored) >= self.loses:
            return 400, {"error": "gone"}, {}
        assert hashlib.sha256(body).hexdigest() == oid
        self.stored[oid] = body
        return 200, {}, {}

    def _commit(self, key: str, repository: Repository, body: bytes) -> Answer:
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.add(files)
        name = key.removeprefix("models/")
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}, {}

    # -- downloads ---------------------------------------------------------------------------------------------------

    def _describe(self, name: str, repository: Repository, revision: str) -> Answer:
        if (found := repository.find(revision)) is None:
            return 404, {"error": "no such revision"}, {"x-error-code": "RevisionNotFound"}
        siblings = [{"rfilename": path} for path in found[1]]
        facts = {"id": name, "sha": found[0], "siblings": siblings, "private": repository.private, "tags": []}
        return 200, {**facts, "downloads": 0, "likes": 0}, {}

    def _list(self, repository: Repository, revision: str, folder: str, only: list[str] | None = None) -> Answer:
        if (found := repository.find(revision)) is None:
            return 404, {"error": "no such revision"}, {"x-error-code": "RevisionNotFound"}
        entries = []
        for path, data in found[1].items():
            oid = hashlib.sha1(data).hexdigest()
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            entry = {"type": "file", "oid": oid, "size": len(data), "path": path}
            if (only is None or path in only) and path.startswith(folder):
                entries.append({**entry, **({"lfs": lfs} if path.endswith(".parquet") else {})})
        return 200, entries, {}

    def _serve(self, repository: Repository, revision: str, path: str, method: str, headers: Any) -> Answer:
        found = repository.find(revision)
        if found is None or path not in found[1]:
            return 404, {"error": "no such file"}, {"x-error-code": "EntryNotFound"}
        data = found[1][path]
        facts = {"x-repo-commit": found[0], "etag": f'"{hashlib.sha256(data).hexdigest()}"', "accept-ranges": "bytes"}
        if self.tampers is not None:
            data = self.tampers(path, data)
        if method == "HEAD":
            return 200, data, facts
        if asked := headers.get("range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(end) + 1 if end else None]
            facts["content-range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            self.served.append((path, len(part), True))
            return 206, part, facts
        self.served.append((path, len(data), False))
        return 200, data, facts


@contextmanager
def run_hub() -> Iterator[Hub]:
    hub = Hub()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            hub.asked.append((self.path.partition("?")[0], self.headers.get("authorization")))
            status, content, headers = hub.answer(self.command, self.path, body, self.headers)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
            for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_settings(hub: Hub, home: Any) -> dict[str, str]:
    """Environment variables with which the hub's client finds this hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
    }
