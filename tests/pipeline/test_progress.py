"""Lines elsewhere, bars on a terminal, and nothing from data or a model drives it."""

import os
import sys
import time
from types import SimpleNamespace

import pytest

from prefcache.pipeline import progress_display
from prefcache.pipeline.progress import Progress, counting, working
from tests.helpers.terminals import run_on_terminal


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


class Clock:
    """Stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress_display.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_off_a_terminal_work_is_said_in_lines_at_the_end(capsys, clock):
    with Progress().count("score", 2000, "tokens") as counter:
        counter.add(500)
        clock.now = 4.0
        counter.add(1500, "note")
    # 2,000 tokens in 4 seconds, and none left.
    assert capsys.readouterr().err == "score: 2,000/2,000 tokens, 500/s  note\n"


def test_off_a_terminal_a_line_comes_every_five_seconds_with_the_time_left(capsys, clock):
    with Progress().count("train", 400, "steps") as counter:
        clock.now = 10.0
        counter.add(5, "loss 0.6931")
        assert capsys.readouterr().err == "train: 5/400 steps, 0.50/s, 13:10 left  loss 0.6931\n"  # 395 / 0.5 = 790 s
        clock.now = 12.0
        counter.add(1)  # two seconds later: too soon
        assert capsys.readouterr().err == ""


def test_a_finished_count_ends_with_all_of_it_however_late_its_last_line_was(capsys, clock):
    with Progress().count("train", 60, "steps") as counter:
        for step in range(1, 61):
            clock.now = 0.1 * step
            counter.add(1)
    # One line at 5 s, and one at the end, a second later.
    assert capsys.readouterr().err.splitlines() == [
        "train: 50/60 steps, 10/s, 0:01 left",
        "train: 60/60 steps, 10/s",
    ]


def test_a_resumed_count_goes_on_where_it_was_and_its_rate_is_of_what_is_new(capsys, clock):
    with Progress().count("train", 60, "steps", done=50) as counter:
        clock.now = 5.0
        counter.add(10)
    assert capsys.readouterr().err == "train: 60/60 steps, 2.00/s\n"  # 10 steps in 5 s


def test_work_whose_total_is_only_estimated_has_time_left(capsys, clock):
    with Progress().count("prepare", None, "records") as counter:
        clock.now = 5.0
        counter.estimate(0.25)
        counter.add(100)
        assert capsys.readouterr().err == "prepare: 100 records, 20/s, 0:15 left\n"  # 5 s for a quarter
        counter.estimate(1.3)
        clock.now = 10.0
        counter.add(300)
    assert capsys.readouterr().err == "prepare: 400 records, 40/s\n"


def test_bytes_are_counted_in_units_that_a_person_reads(capsys, clock):
    with Progress().count("hash model.safetensors", 13_400_000_000, "bytes") as counter:
        clock.now = 5.0
        counter.add(1_200_000_000)
    line = "hash model.safetensors: 1.2/13.4 GB, 240.0 MB/s, 0:50 left\n"
    assert capsys.readouterr().err == line  # 12.2 GB at 0.24 GB/s: 50.8 s


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
    assert progress_display.format_clock(seconds) == shown


def test_in_a_notebook_a_bar_is_updated_in_place_and_lines_are_output(capsys, monkeypatch, clock):
    shown = in_a_notebook(monkeypatch)
    notebook = Progress()
    with notebook.count("train", 4, "steps") as counter:
        clock.now = 0.1
        counter.add(1)  # a tenth of a second later: too soon
        clock.now = 1.0
        counter.add(1, "<b>\x1b[31m")
        notebook.say("hello")
        notebook.warn("careful")
        clock.now = 2.0
        counter.add(2, "loss 0.5")
    assert capsys.readouterr() == ("hello\n", "warning: careful\n")
    assert [(kind, bundle["text/plain"]) for kind, bundle in shown] == [
        ("new", "train: 0/4 steps"),
        ("update", "train: 2/4 steps, 2.00/s, 0:01 left  <b>\u241b[31m"),
        ("update", "train: 4/4 steps, 2.00/s  loss 0.5"),
        ("update", "train: 4/4 steps, 2.00/s  loss 0.5"),
    ]
    expected = "<progress value='0.5000' max='1'></progress> train: 2/4 steps, 2.00/s, 0:01 left  &lt;b&gt;\u241b[31m"
    assert shown[1][1]["text/html"] == expected


def in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """Make this process look like a kernel; return what it displays, as it comes."""
    from IPython import display

    shown: list[tuple[str, dict[str, str]]] = []
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(("update", bundle)))
    monkeypatch.setattr(display, "display", lambda bundle, raw, display_id: shown.append(("new", bundle)) or handle)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(kernel=object()))
    return shown


def test_in_a_notebook_long_work_on_the_side_is_shown_below_and_gone_when_it_is_done(monkeypatch, clock):
    shown = in_a_notebook(monkeypatch)
    notebook = Progress(command="train")
    with notebook.count("train", 2, "steps") as counter:
        with notebook.count_aside("evaluate", 8, "examples") as aside:
            clock.now = 2.0
            aside.add(4)
        clock.now = 4.0
        counter.add(2)
    texts = [bundle["text/plain"] for _, bundle in shown]
    assert "train: 0/2 steps\ntrain: evaluate: 4/8 examples, 2.00/s, 0:02 left" in texts
    assert texts[-1] == "train: 2/2 steps, 0.50/s"


# -- work on the side ------------------------------------------------------------------------------------------------


def test_work_deep_inside_reports_to_the_running_command(capsys, clock):
    with Progress(command="train", label="run 2 of 8"):
        with counting("hash m", 4, "files") as counter:
            clock.now = 6.0
            counter.add(1)
        with working("load m"):
            clock.now = 7.0
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["run 2 of 8: train: hash m: 1/4 files, 0.17/s, 0:18 left"]


def test_outside_of_a_command_and_in_other_processes_of_a_run_nothing_is_said(capsys, clock):
    with counting("hash m", 4, "files") as counter:
        clock.now = 60.0
        counter.add(4)
    with Progress(silent=True) as other, other.count("train", 4, "steps") as counter:
        clock.now = 120.0
        counter.add(4)
        other.say("hello")
        other.warn("careful")
    assert capsys.readouterr().err == ""


def test_work_on_the_side_that_is_soon_over_says_nothing(capsys, clock):
    with Progress(command="train"):
        for _ in range(3):
            with counting("read shard", 100, "bytes") as counter:
                clock.now += 1.0
                counter.add(100)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_work_that_reports_nothing_is_not_silent(capsys):
    with Progress(command="train"), working("load m"):
        time.sleep(6.5)
    with Progress(command="score"), Progress.count(Progress(quiet=True), "score", 2, "tokens"):
        time.sleep(6.5)
    loading, waiting = capsys.readouterr().err.splitlines()
    assert loading in ("train: load m: 5 s", "train: load m: 6 s")
    assert waiting == "score: still working"


# -- on a terminal ---------------------------------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_bar_and_lines_stay_readable():
    code = (
        "from prefcache.pipeline.progress import Progress\n"
        "progress = Progress()\n"
        "with progress.count('score', 40, 'tokens') as counter:\n"
        "    counter.add(10)\n"
        "    progress.say('a line [bold]as it is[/bold] \\x1b]0;title\\x07')\n"
        "    counter.add(30, 'note')\n"
        "    print('printed by a callback')\n"
        "print('result', counter.done)\n"
    )
    shown = run_on_terminal([sys.executable, "-c", code], pipe_stdout=True)
    # stdout is redirected here, and the bar leaves it alone.
    assert shown.stdout == "printed by a callback\nresult 40\n"
    line, bar, *_ = shown.screen
    assert line == "a line [bold]as it is[/bold] \u241b]0;title\u2407"
    assert bar.startswith("score \u2501\u2501") and "40/40 tokens" in bar and bar.endswith("  note")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bar_of_a_finished_count_reads_all_of_it_at_any_width(columns):
    code = (
        "from prefcache.pipeline.progress import Progress\n"
        "with Progress(command='train') as progress, progress.count('run 2 of 8: train', 60, 'steps') as counter:\n"
        "    for _ in range(60):\n"
        "        counter.add(1, 'loss 0.6931  accuracy 1.00  and what else a callback may note')\n"
    )
    shown = run_on_terminal([sys.executable, "-c", code], columns=columns)
    (last,) = [line for line in shown.screen if line]
    assert "60/60 steps" in last and len(last) <= columns
    assert last.endswith("\u2026") == (columns < 200)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    code = (
        "from prefcache.pipeline.progress import Progress\n"
        "with Progress().count('train', 60, 'steps') as counter:\n"
        "    counter.add(60)\n"
    )
    shown = run_on_terminal([sys.executable, "-c", code], environment={"TERM": "dumb"})
    assert shown.text.startswith("train: 60/60 steps") and "\x1b" not in shown.text


def test_a_forked_process_leaves_the_display_to_its_parent():
    """Its parent may have been holding the lock when it forked: to report anything would wait for ever."""
    with Progress(command="sql") as progress, progress._lock:
        child = os.fork()
        if child == 0:
            with working("read"):
                os._exit(7)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
