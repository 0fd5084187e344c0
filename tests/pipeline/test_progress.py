"""Lines elsewhere, bars on a terminal, and nothing from data or a model drives it."""

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prefcache.pipeline import progress
from prefcache.pipeline.progress import Progress


def test_lines_go_to_stderr_and_never_to_stdout(capsys):
    progress = Progress()
    progress.say("hello \x1b[31m")
    progress.warn("careful")
    out, err = capsys.readouterr()
    assert out == "" and err == "hello \u241b[31m\nwarning: careful\n"


def test_quiet_says_only_warnings(capsys):
    progress = Progress(quiet=True)
    progress.say("hello")
    with progress.count("train", 10, "steps") as counter:
        counter.add(10)
    progress.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"
    assert counter.done == 10


def clock(monkeypatch, *times: float) -> None:
    left = list(times)
    monkeypatch.setattr(progress.time, "monotonic", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_off_a_terminal_work_is_said_in_lines_at_the_end(capsys, monkeypatch):
    clock(monkeypatch, 0.0, 1.0, 2.0, 4.0)
    with Progress().count("score", 2000, "tokens") as counter:
        counter.add(500)
        counter.add(1500, "note")
    # 2,000 tokens in 4 seconds, and none left.
    assert capsys.readouterr().err == "score: 2,000/2,000 tokens, 500/s  note\n"


def test_off_a_terminal_a_line_comes_every_five_seconds_with_the_time_left(capsys, monkeypatch):
    clock(monkeypatch, 0.0, 10.0, 10.0, 12.0, 20.0)
    with Progress().count("train", 400, "steps") as counter:
        counter.add(5, "loss 0.6931")
        assert capsys.readouterr().err == "train: 5/400 steps, 0.50/s, 13:10 left  loss 0.6931\n"  # 395 / 0.5 = 790 s
        counter.add(1)  # two seconds later: too soon
        assert capsys.readouterr().err == ""


def test_work_of_unknown_size_has_no_time_left_and_no_work_says_nothing(capsys):
    with Progress().count("prepare", None, "records") as counter:
        counter.add(7)
    assert capsys.readouterr().err.startswith("prepare: 7 records, ")
    with Progress().count("score", 0, "tokens"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_time_left_is_read_as_a_clock(seconds, shown):
    assert progress._clock(seconds) == shown


def test_in_a_notebook_a_bar_is_updated_in_place_and_lines_are_output(capsys, monkeypatch):
    from IPython import display

    shown = []
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(("update", bundle, raw)))
    monkeypatch.setattr(
        display, "display", lambda bundle, raw, display_id: shown.append(("new", bundle, raw)) or handle
    )
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(kernel=object()))
    clock(monkeypatch, 0.0, 0.0, 0.1, 1.0, 1.0, 2.0)
    notebook = Progress()
    with notebook.count("train", 4, "steps") as counter:
        counter.add(1)  # a tenth of a second later: too soon
        counter.add(1, "<b>\x1b[31m")
        notebook.say("hello")
        notebook.warn("careful")
        counter.add(2, "loss 0.5")
    assert capsys.readouterr() == ("hello\n", "warning: careful\n")
    assert [(kind, bundle["text/plain"], raw) for kind, bundle, raw in shown] == [
        ("new", "train: 0/4 steps", True),
        ("update", "train: 2/4 steps, 2.00/s, 0:01 left  <b>\u241b[31m", True),
        ("update", "train: 4/4 steps, 2.00/s  loss 0.5", True),
    ]
    expected = "<progress value='0.5000' max='1'></progress> train: 2/4 steps, 2.00/s, 0:01 left  &lt;b&gt;\u241b[31m"
    assert shown[1][1]["text/html"] == expected


def on_a_terminal(code: str) -> tuple[str, str]:
    """What a process shows on a terminal, and what it writes to a redirected stdout."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    return shown.decode(), out.decode()


def test_on_a_terminal_there_is_a_bar_and_lines_stay_readable():
    shown, out = on_a_terminal(
        "from prefcache.pipeline.progress import Progress\n"
        "progress = Progress()\n"
        "with progress.count('score', 40, 'tokens') as counter:\n"
        "    counter.add(10)\n"
        "    progress.say('a line [bold]as it is[/bold] \\x1b]0;title\\x07')\n"
        "    counter.add(30, 'note')\n"
        "    print('printed by a callback')\n"
        "print('result', counter.done)\n"
    )
    # stdout is redirected here, and the bar leaves it alone.
    assert out == "printed by a callback\nresult 40\n"
    assert "score" in shown and "40/40" in shown and "note" in shown
    assert "a line [bold]as it is[/bold] \u241b]0;title\u2407" in shown
