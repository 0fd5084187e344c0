"""With --json an error is JSON too: one object on stderr, in place of the line, with the same exit code."""

import json
import signal
import subprocess
import time

import pytest

from prefcache.cli import main
from tests.helpers.project import PREFCACHE, has_handlers, start

WITH_JSON = sorted(
    name for name, command in main.commands.items() if any("--json" in parameter.opts for parameter in command.params)
)
# For each command, arguments that name what is not there.
MISSING = {
    "architectures": ["nowhere"],
    "ask": ["nowhere"],
    "config": ["train.nowhere"],
    "download": ["s3://nowhere", "--out", "nowhere"],
    "export": ["nowhere.yaml", "--output", "rows.parquet"],
    "fetch": ["nowhere.yaml", "me/nowhere"],
    "formats": ["nowhere"],
    "gc": ["nowhere"],
    "import": ["nowhere.yaml", "nowhere.parquet"],
    "losses": ["nowhere"],
    "merge": ["nowhere"],
    "parity": ["nowhere.yaml", "a", "b"],
    "publish": ["nowhere.yaml", "me/nowhere"],
    "push": ["nowhere", "me/nowhere"],
    "show": ["nowhere", "nowhere.yaml"],
    "sign": ["nowhere", "--key", "nowhere"],
    "sql": ["select 1 from nowhere", "nowhere"],
    "verify": ["nowhere"],
}


def error_of(stderr: str) -> dict:
    """The last line: progress and warnings may come before it."""
    content = json.loads(stderr.splitlines()[-1])
    assert list(content) == ["error"] and "error: " not in stderr
    return content["error"]


def test_the_commands_with_json_are_most_of_them():
    assert len(WITH_JSON) > 20 and MISSING.keys() <= set(WITH_JSON)


@pytest.mark.parametrize("command", WITH_JSON)
def test_a_wrong_option_is_reported_as_json(prefcache, command):
    plain = prefcache(command, "--no-such-option", code=2)
    assert plain.stderr.startswith("Usage: ") and "Error: " in plain.stderr
    done = prefcache(command, "--json", "--no-such-option", code=2)
    error = error_of(done.stderr)
    assert (error["kind"], error["exit_code"], done.stdout) == ("usage", 2, "")
    assert error["message"].startswith("No such option '--no-such-option'")


@pytest.mark.parametrize("command", WITH_JSON)
def test_what_is_not_there_is_reported_as_json(prefcache, command):
    arguments = MISSING.get(command, ["nowhere.yaml"])
    plain = prefcache(command, *arguments, code=None)
    done = prefcache(command, "--json", *arguments, code=None)
    assert done.returncode == plain.returncode == 2
    error = error_of(done.stderr)
    assert (error["kind"], error["exit_code"], done.stdout) == ("usage", 2, "")
    # The same sentence as without --json, which click begins with a capital for its own errors.
    assert plain.stderr.rstrip().endswith(f"rror: {error['message']}")


def test_other_kinds_have_their_names_and_exit_codes(prefcache, config, tmp_path):
    same = {"prompt": "p", "chosen": "the same", "rejected": "the same"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(same)}\n" * 20)
    error = error_of(prefcache("prepare", config, "--json", code=3).stderr)
    assert (error["kind"], error["exit_code"]) == ("data", 3)


def test_every_error_has_a_kind_of_its_own():
    from prefcache.pipeline import errors

    kinds = {each.kind: each.exit_code for each in errors.PrefcacheError.__subclasses__()}
    assert kinds == {"callback": 1, "usage": 2, "data": 3, "integrity": 4, "identity": 5, "resource": 6, "alert": 7}


def test_text_that_nobody_would_see_is_escaped(prefcache):
    done = prefcache("train", "a\u202eb.yaml", "--json", code=2)
    assert "\u202e" not in done.stderr and "No config at a\u202eb.yaml" in error_of(done.stderr)["message"]


def test_success_prints_what_it_did_and_exits_with_0(prefcache):
    done = prefcache("losses", "ipo", "--json")
    assert json.loads(done.stdout) and not done.stderr


@pytest.mark.parametrize("moment", ["at its start", "while it reads records"])
def test_an_interruption_is_reported_as_json(config, tmp_path, moment):
    child = start(
        *(PREFCACHE, "prepare", config, "--json", "-q", "--set", "prepare.data=-"),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not has_handlers(child):
        time.sleep(0.001)
    if moment == "while it reads records":
        child.stdin.write(json.dumps({"prompt": "long " * 50_000}))  # a pipe holds a quarter of it
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    error = error_of(stderr)
    assert (child.returncode, error["kind"], error["exit_code"]) == (130, "interrupted", 130)
