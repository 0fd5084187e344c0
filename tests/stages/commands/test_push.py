"""push sends a finished run's model to the hub, private, and nothing beside it. The hub is a server that speaks its protocol."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.hub import Hub, client_settings, run_hub
from tests.helpers.project import Done

NAME = "me/kind"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as hub:
        yield hub


@pytest.fixture
def push(process, hub, tmp_path):
    """The command in a process of its own, for the hub's client reads its settings once."""

    def run(*arguments: Any, code: int = 0, **settings: str) -> Done:
        environment = {**os.environ, **client_settings(hub, tmp_path / "home"), **settings}
        return process("push", *arguments, code=code, env=environment)

    return run


def test_the_hub_has_the_models_files_and_nothing_else(push, hub, trained, model):
    (trained / "model/notes.txt").write_text("not the run's")
    done = push("runs/tiny/trained", NAME)
    repository = hub.repositories[f"models/{NAME}"]
    assert f"{hub.url}/{NAME}" in done.stdout and f"commit {repository.commits[-1][0]}" in done.stdout
    (made,) = hub.created
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "kind", "private")
    writes = {"/api/repos/create", f"/api/models/{NAME}/commit/main"}
    assert {path: token for path, token in hub.asked if path in writes} == dict.fromkeys(writes, "Bearer hf_mine")
    manifest = json.loads((trained / "manifest.json").read_text())
    names = {entry["file"] for entry in manifest["model"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    # The model that it was trained from is a folder here.
    assert (
        b"base_model" not in repository.files["README.md"] and str(model).encode() not in repository.files["README.md"]
    )
    assert repository.files == {name: (trained / "model" / name).read_bytes() for name in names}
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
    assert "the hub did not answer" in done.stderr and not hub.repositories
