"""push sends a finished run's model to the hub, private, and nothing beside it. The hub is a server that speaks its protocol."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.helpers.project import Done

NAME = "me/kind"


@dataclass
class Hub:
    """What was asked of it, in order; and what it got. It takes every file within the commit, as the real one takes small ones."""

    url: str = ""
    refuses: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and token
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuses:
            return self.refuses, {"error": "no"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/{NAME}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == f"/api/models/{NAME}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if path != f"/api/models/{NAME}/commit/main":
            return 404, {"error": "not here"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.url}/{NAME}/commit/c0ffee", "commitOid": "c0ffee"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            hub.asked.append((path, self.headers.get("authorization")))
            status, answer = hub.answer(path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def push(process, hub, tmp_path):
    """The command in a process of its own, for the hub's client reads its settings once."""

    def run(*arguments: Any, code: int = 0, **settings: str) -> Done:
        of_client = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_mine",
            "HF_HOME": str(tmp_path / "home"),
        }
        return process("push", *arguments, code=code, env={**os.environ, **of_client, **settings})

    return run


def test_the_hub_has_the_models_files_and_nothing_else(push, hub, trained, model):
    (trained / "model/notes.txt").write_text("not the run's")
    done = push("runs/tiny/trained", NAME)
    assert f"{hub.url}/{NAME}" in done.stdout and "commit c0ffee" in done.stdout
    (made,) = hub.created
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "kind", "private")
    writes = {"/api/repos/create", f"/api/models/{NAME}/commit/main"}
    assert {path: token for path, token in hub.asked if path in writes} == dict.fromkeys(writes, "Bearer hf_mine")
    manifest = json.loads((trained / "manifest.json").read_text())
    names = {entry["file"] for entry in manifest["model"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    # The model that it was trained from is a folder here.
    assert b"base_model" not in hub.files["README.md"] and str(model).encode() not in hub.files["README.md"]
    assert hub.files == {name: (trained / "model" / name).read_bytes() for name in names}
    push("runs/tiny/trained", NAME, "--public")
    assert hub.created[1]["visibility"] == "public"


def test_what_is_not_a_finished_whole_run_is_refused_before_the_hub_is_asked(push, hub, trained, tmp_path):
    assert "is not a run. Name the folder of one" in push("runs/tiny/prepared", NAME, code=2).stderr
    whole = (trained / "model/config.json").read_bytes()
    (trained / "model/config.json").write_bytes(b"{}")
    assert "config.json has 2 bytes" in push("runs/tiny/trained", NAME, code=4).stderr
    (trained / "model/config.json").write_bytes(whole)
    (trained / "manifest.json").unlink()
    assert "is not finished. Train it to its end" in push("runs/tiny/trained", NAME, code=2).stderr
    assert not hub.asked


@pytest.mark.slow  # five processes, one for each answer of the hub
def test_what_the_hub_does_not_take_ends_in_one_line(push, hub, trained):
    assert "HF_HUB_OFFLINE is set" in push("runs/tiny/trained", NAME, code=2, HF_HUB_OFFLINE="1").stderr
    assert "Repo id must" in push("runs/tiny/trained", "a/b/c", code=2).stderr
    assert not hub.asked
    for hub.refuses, says in ((401, "the hub refused the token (401). Log in"), (404, "the hub answered with 404")):
        assert says in push("runs/tiny/trained", NAME, code=2).stderr
    done = push("runs/tiny/trained", NAME, code=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub did not answer" in done.stderr and not hub.files
