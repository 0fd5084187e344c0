"""make follows what a stage was made from, and runs nothing that the folder of an experiment says."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MANIFEST = "runs/x/prepared/manifest.json"
STUB = f"#!/bin/sh\necho prefcache $1; mkdir -p runs/x/prepared; touch {MANIFEST}\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with a command that only says that it ran, and a preparation of data.jsonl that is up to date."""
    for path in ("pyproject.toml", "tests/constraints.txt", ".venv/.installed", "data.jsonl", "config.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
        os.utime(tmp_path / path, (1e9, 1e9))
    (tmp_path / "config.yaml").write_text("out: runs/x\n")
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = tmp_path / ".venv/bin/prefcache"
    command.parent.mkdir()
    command.write_text(STUB)
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    assert make(tmp_path) == ["prefcache prepare"] and make(tmp_path) == []
    return tmp_path


def make(folder: Path, goal: str = "prepare", code: int = 0) -> list[str]:
    """What ran, apart from make's own sentences."""
    # A make that runs this suite would make this one a sub-make, which says which folder it enters.
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    command = ["make", goal, "CONFIG=config.yaml"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "up to date" not in line and not line.startswith(".venv/bin/prefcache")]


def test_an_input_that_changed_or_vanished_runs_the_stage_again(checkout):
    (checkout / "runs/x/prepared/inputs.mk").write_text(f"{MANIFEST}: data.jsonl\ndata.jsonl:\n")
    assert make(checkout) == []
    os.utime(checkout / "data.jsonl")
    assert make(checkout) == ["prefcache prepare"]
    (checkout / "data.jsonl").unlink()
    assert make(checkout) == ["prefcache prepare"]


PLANTED = [
    "$(shell touch planted)",
    "x := $(shell touch planted)",
    f"{MANIFEST}: $(shell touch planted)",
    f"{MANIFEST}: ; touch planted",
    f"{MANIFEST}: data.jsonl ; touch planted",
    f"{MANIFEST}: data.jsonl\n\ttouch planted",
    f"{MANIFEST}: `touch planted`",
    f"{MANIFEST}:: data.jsonl\n\ttouch planted",
    "data.jsonl:\n\ttouch planted",
    "prepare:\n\ttouch planted",
    "SHELL = ./evil",
    ".SHELLFLAGS = -c 'touch planted' ",
    "include evil.mk",
    "$(eval include evil.mk)",
    "define x\n$(shell touch planted)\nendef\n$(x)",
    f"{MANIFEST}: vllm",
    f"{MANIFEST}: .venv-vllm/.installed",
    f"{MANIFEST}: ./.venv-vllm/.installed",
    f"{MANIFEST}: .ONESHELL",
    f"{MANIFEST}: evil.o",  # which make's own rules would compile
]


@pytest.mark.parametrize("lines", PLANTED)
def test_a_planted_file_of_inputs_runs_nothing(checkout, lines):
    for name, content in [
        ("evil", "#!/bin/sh\ntouch planted\n"),
        ("evil.mk", "$(shell touch planted)\n"),
        ("evil.c", '#error "compiled"\n'),
    ]:
        (checkout / name).write_text(content)
        (checkout / name).chmod(0o755)
    (checkout / "runs/x/prepared/inputs.mk").write_text(f"{lines}\n{MANIFEST}: data.jsonl\ndata.jsonl:\n")
    before = set(checkout.rglob("*"))
    # A file that does not exist makes the stage look again; no more than that.
    assert make(checkout) in ([], ["prefcache prepare"])
    assert set(checkout.rglob("*")) == before
    os.utime(checkout / "data.jsonl")
    assert make(checkout) == ["prefcache prepare"]


@pytest.mark.parametrize("out", ["$(shell touch planted)", "runs/x;touch${IFS}planted", "`touch${IFS}planted`"])
def test_a_place_that_would_run_something_is_refused(checkout, out):
    (checkout / "config.yaml").write_text(f"out: {out}\n")
    assert "call prefcache itself" in " ".join(make(checkout, code=2))
    assert not (checkout / "planted").exists()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_an_input_with_letters_of_any_language_is_followed(checkout, monkeypatch, locale):
    monkeypatch.setenv("LC_ALL", locale)
    (checkout / "donn\u00e9es.jsonl").write_text("")
    inputs = f"{MANIFEST}: donn\u00e9es.jsonl\ndonn\u00e9es.jsonl:\n"
    (checkout / "runs/x/prepared/inputs.mk").write_text(inputs, encoding="utf-8")
    os.utime(checkout / "donn\u00e9es.jsonl")
    assert make(checkout) == ["prefcache prepare"]
