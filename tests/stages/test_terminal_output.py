"""What a person reads on a terminal."""

import re
import subprocess
import sys

import pytest

from prefcache import command_results, terminal_output
from prefcache.pipeline.model import architectures
from prefcache.pipeline.stored.cache_maintenance import CollectedCache
from prefcache.terminal_output import choices
from tests.helpers.project import PREFCACHE

REASON = "prompts are not shared, because the model carries a state from one token to the next, as Mamba does"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_break_between_words_on_a_terminal_and_stay_whole_in_a_pipe(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "60")
    command = f"prefcache train {'x' * 60} --set train.run=x"
    finding = command_results.Finding("reference", "absent", REASON, command)
    terminal_output.print_result(command_results.DoctorResult([finding], 0, None))
    choices.print_architectures(architectures.load("mamba"))
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert f"     {command}\n" in printed  # to be copied
    lines = [line for line in printed.splitlines() if command not in line]
    if is_terminal:
        assert max(map(len, lines)) <= 60 and REASON in " ".join(printed.split())
        assert "     state from one token" in printed
    else:
        assert f"  -- {REASON}\n" in printed


def test_gc_with_nothing_to_do_says_so(capsys, tmp_path):
    done = CollectedCache(tmp_path, merged=2, into=1, shards=1)
    idle = CollectedCache(tmp_path / "idle", shards=3)
    terminal_output.print_result(command_results.GcResult([done, idle], damaged=0, dry_run=False))
    first, second = capsys.readouterr().out.splitlines()
    assert "2 shards merged into 1" in first and second == f"{tmp_path}/idle: nothing to do, 3 shards"


@pytest.mark.parametrize("command", ["losses", pytest.param("doctor", marks=pytest.mark.slow)])
def test_a_closed_pipe_ends_a_command_without_an_error(command):
    # losses prints plainly and doctor through rich, which would exit with code 1.
    with subprocess.Popen([PREFCACHE, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (0, b"")
