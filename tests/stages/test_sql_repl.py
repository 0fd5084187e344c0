"""The prompt of `prefcache sql`, at a terminal: lines, completion, history, Ctrl-C and Ctrl-D."""

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.helpers.project import PREFCACHE, default_signals

CTRL_C, CTRL_D, TAB = "\x03", "\x04", "\t"


def _take_terminal() -> None:
    default_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "prepared").mkdir(parents=True, exist_ok=True)
        parent, child = pty.openpty()
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "TERM": "dumb"}
        command = [PREFCACHE, "sql", str(folder), *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(child)
        self._terminal, self.seen = parent, ""

    def send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, expected: str, seconds: float = 30) -> str:
        """Read up to the expected text; return what came before it."""
        ends = time.monotonic() + seconds
        while expected not in self.seen and time.monotonic() < ends:
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.seen += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", os.read(self._terminal, 4096).decode())
        assert expected in self.seen, self.seen
        found, _, self.seen = self.seen.partition(expected)
        return found

    def give_up_line(self) -> None:
        """Send Ctrl-C, repeatedly: just before readline waits, it is noticed only with the next key."""
        for _ in range(10):
            self.send(CTRL_C)
            with contextlib.suppress(AssertionError):
                self.until("prefcache> ", 3)
                return
        raise AssertionError(self.seen)

    def leave(self) -> None:
        """Send Ctrl-D at the prompt; before it, the terminal itself would take it."""
        self.until("prefcache> ")
        self.send(CTRL_D)
        assert self.process.wait(30) == 0


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(tmp_path)
    opened.until("prefcache> ")
    yield opened
    opened.process.kill()


def test_a_query_takes_several_lines_and_ends_with_a_semicolon(terminal):
    terminal.send("select 40 +\n")
    terminal.until("... ")
    terminal.send("2 as answer;\n")
    assert "42" in terminal.until("1 row")
    terminal.leave()


def test_an_error_leaves_the_prompt_as_it_was(terminal):
    terminal.send("select * from pears;\n")
    assert "error: There is no view pears; the nearest is pairs" in terminal.until("prefcache> ")
    terminal.send("select 'still ' || 'here';\n")
    terminal.until("still here")


def test_ctrl_c_cancels_a_query_without_end_and_what_is_typed(terminal):
    terminal.send("with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t;\n")
    terminal.until("from t;")
    time.sleep(1)
    terminal.send(CTRL_C)
    terminal.until("cancelled")
    terminal.until("prefcache> ")
    terminal.send("select nonsense")
    terminal.until("select nonsense")
    terminal.give_up_line()
    terminal.send("select 6 * 7;\n")
    terminal.until("42")
    terminal.leave()


def test_commands_work_with_and_without_a_semicolon(terminal):
    for line in ("help", "help;", "\\h"):
        terminal.send(f"{line}\n")
        shown = " ".join(terminal.until("prefcache> ").split())
        assert "ends with a semicolon: select * from pairs limit 5;" in shown and "quarantine" in shown
    for line in ("help pairs", "help pairs;", "\\d pairs"):
        terminal.send(f"{line}\n")
        assert "chosen_logp double" in terminal.until("prefcache> ")
    terminal.send("help pears\n")
    assert "There is no view pears; the nearest is pairs." in terminal.until("prefcache> ")
    terminal.send("views\n")
    assert "examples: " in terminal.until("prefcache> ")


def test_a_word_that_is_no_query_gets_a_hint_at_once(terminal):
    terminal.send("pairs\n")
    expected = "`pairs` is not a query, nor a command. Ask in SQL, as in `select * from pairs limit 5;`"
    assert expected in " ".join(terminal.until("prefcache> ").split())
    # A query may begin with a word on a line of its own.
    terminal.send("select\n")
    terminal.until("... ")
    terminal.send("6 * 7;\n")
    terminal.until("42")
    terminal.until("prefcache> ")


@pytest.mark.parametrize("word", ["exit", "quit;", "\\q"])
def test_the_usual_words_leave(terminal, word):
    terminal.send(f"{word}\n")
    assert terminal.process.wait(30) == 0


def test_tab_completes_views_and_columns(terminal):
    terminal.send(f"select count(length_diff{TAB}) from quaran{TAB};\n")
    terminal.until("count(length_difference) from quarantine")
    terminal.leave()


def test_queries_are_remembered_where_state_belongs(tmp_path):
    first = Terminal(tmp_path)
    first.until("prefcache> ")
    first.send("select 1200 -- and\n")
    first.until("... ")
    first.send("+ 34 as n;\n")
    first.until("1234")
    first.leave()
    assert (tmp_path / "state/prefcache/history").read_text() == "select 1200 -- and\x01+ 34 as n;\n"
    again = Terminal(tmp_path)
    again.until("prefcache> ")
    again.send("\x10\n")  # Ctrl-P, the one before: with its lines, so that its comment ends where it did
    again.until("1234")
    again.process.kill()
