"""What a person reads on a terminal."""

import os
import re
import subprocess
import sys

import pytest

from prefcache import command_results, row_layout, terminal_output
from prefcache.pipeline.model import architectures
from prefcache.pipeline.stored.cache_maintenance import CollectedCache
from prefcache.terminal_output import choices
from tests.helpers.project import PREFCACHE
from tests.helpers.terminals import run_on_terminal, run_piped

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
    done = CollectedCache(tmp_path, str(tmp_path), merged=2, into=1, shards=1)
    idle = CollectedCache(tmp_path / "idle", str(tmp_path / "idle"), shards=3)
    terminal_output.print_result(command_results.GcResult([done, idle], damaged=0, dry_run=False))
    first, second = capsys.readouterr().out.splitlines()
    assert "2 shards merged into 1" in first and second == f"{tmp_path}/idle: nothing to do, 3 shards"


@pytest.mark.parametrize(("n_others", "ending"), [(0, "\n"), (2904, ", 2,904 by other scorers meanwhile\n")])
def test_score_says_what_it_did_itself_and_what_others_did(capsys, n_others, ending):
    result = command_results.ScoreResult(
        cache="s3://team/refs/tiny",
        sequences=3000 + n_others,
        cached_before=0,
        scored=3000,
        tokens=120_000,
        scored_by_others=n_others,
        failed=0,
        parity=None,
        changed=True,
    )
    terminal_output.print_result(result)
    assert capsys.readouterr().out.endswith(f"3,000 scored now (120,000 tokens){ending}")


@pytest.mark.parametrize("command", ["losses", pytest.param("doctor", marks=pytest.mark.slow)])
def test_a_closed_pipe_ends_a_command_without_an_error(command):
    # losses prints plainly and doctor through rich, which would exit with code 1.
    with subprocess.Popen([PREFCACHE, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (0, b"")


SENTENCE = "the quick brown fox jumps over the lazy dog and finds that there are many more of them"
ID = "f56b7daec7ffecfb"
ROWS = f"select '{ID}' as example_id, '{SENTENCE}' as prompt, i * 0.5 as margin from range(2) t(i)"


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "it/prepared").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("columns", [80, 200])
def test_long_texts_are_blocks_that_wrap_between_words(experiment, columns):
    shown = run_on_terminal([PREFCACHE, "sql", ROWS, "it"], cwd=experiment, columns=columns)
    assert shown.code == 0 and max(map(len, shown.screen)) <= columns
    assert shown.screen[:2] == ["-- row 1", f"example_id  {ID}"]
    prompt = " ".join(shown.plain.split("prompt")[1].split("margin")[0].split())
    assert prompt == SENTENCE  # no word is broken, or it would be two


def test_headers_wrap_between_words_and_values_stay_whole(capsys, monkeypatch):
    monkeypatch.setattr(row_layout, "PIPE_WIDTH", 60)
    columns = ["~296 held-out pairs of a long name", ">reward accuracy", ">reward margin", ">loss"]
    row_layout.print_table(row_layout.open_console(), columns, [["loss=sigmoid+beta=0.1", "98.0%", "0.204", "0.5962"]])
    table = capsys.readouterr().out
    words = {word for column in columns for word in column.strip("~>").split()}
    assert words <= set(table.split()) and "loss=sigmoid+beta=0.1" in table
    assert max(map(len, table.splitlines())) <= 60
    # Narrower than its words, it is a block.
    monkeypatch.setattr(row_layout, "PIPE_WIDTH", 30)
    row_layout.print_table(row_layout.open_console(), columns, [["loss=sigmoid+beta=0.1", "98.0%", "0.204", "0.5962"]])
    assert "reward accuracy                    98.0%\n" in capsys.readouterr().out


def test_a_pipe_gets_the_same_plain_bytes_in_any_terminal(experiment):
    def pipe(**variables: str) -> str:
        done = subprocess.run(
            [PREFCACHE, "sql", "select 1 as one, 'two words' as two", "it"],
            cwd=experiment,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    outputs = {pipe(COLUMNS="20"), pipe(COLUMNS="300"), pipe(FORCE_COLOR="1", TERM="xterm-256color")}
    assert len(outputs) == 1
    (output,) = outputs
    assert "\x1b" not in output and all(line == line.rstrip() for line in output.splitlines())


def test_errors_wrap_between_words_on_a_terminal_and_are_one_line_in_a_pipe(experiment):
    for wrong in (
        ["sql", "select * from pears_and_apples_of_a_long_name", "it"],
        ["score", "--a-long-option-that-is-none"],
    ):
        shown = run_on_terminal([PREFCACHE, *wrong], cwd=experiment, columns=40)
        piped = run_piped([PREFCACHE, *wrong], cwd=experiment)
        assert shown.code == piped.code == 2
        (line,) = [line for line in piped.text.splitlines() if line.lower().startswith("error: ")]
        assert set(line.split()) <= set(shown.plain.split())
        begin = next(i for i, line in enumerate(shown.screen) if line.lower().startswith("error: "))
        assert all(len(line) <= 40 or " " not in line for line in shown.screen[begin:])
