"""Where the progress of a command is shown: plain lines, bars on a terminal, or the output of a notebook's cell.

Each display is told when counters open, change and close, and is asked every half second whether something is due, so that
work which reports nothing for a while is not silent. All of this happens under the lock of progress.py.
"""

import html
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from prefcache.pipeline.visible_text import visible, wrap_for, wrap_words

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_UPDATES = 0.2  # of a notebook's cell, each of which is sent to the browser
_BRIEF_SECONDS = 1.0  # work on the side that takes less is not shown in a bar
_BAR_WIDTH = 12
_NARROW = 60  # columns; below, numbers need the room of the bar
_REFRESHES_PER_SECOND = 5


@dataclass
class Counter:
    """Work that is being done: `done` of `total` units, or only for how long if it has no unit."""

    what: str
    total: int | None
    unit: str
    is_main: bool = True  # the command's own work, which stays on the screen; else work on the side
    done: int = 0
    changed: Callable[["Counter"], None] | None = None
    note: str = field(default="", init=False)
    estimated_share: float | None = field(default=None, init=False)
    began: float = field(init=False)
    first: int = field(init=False)  # what was done already when the work began

    def __post_init__(self) -> None:
        self.began, self.first = time.monotonic(), self.done

    def add(self, n: int, note: str = "") -> None:
        self.done += n
        self.note = note
        if self.changed:
            self.changed(self)

    def estimate(self, share: float) -> None:
        """Say which share is about done, where the total is unknown."""
        self.estimated_share = min(share, 1.0)

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else self.estimated_share

    def facts(self, now: float) -> list[str]:
        """How much is done, how fast, how long it still takes, and the note."""
        seconds = max(now - self.began, 1e-9)
        rate = (self.done - self.first) / seconds
        facts = [format_amount(self.done, self.total, self.unit) if self.unit else f"{seconds:.0f} s"]
        if self.unit and rate > 0:
            facts.append(f"{format_rate(rate, self.unit)}/s")
            if self.total and self.done < self.total:
                facts.append(f"{format_clock((self.total - self.done) / rate)} left")
            elif not self.total and self.share and self.share < 1:
                facts.append(f"{format_clock(seconds * (1 - self.share) / self.share)} left")
        return facts

    def line(self, now: float) -> str:
        return f"{self.what}: {', '.join(self.facts(now))}" + (f"  {self.note}" if self.note else "")


class Display(Protocol):
    def print(self, line: str, *, is_warning: bool = False) -> None: ...
    def open(self, counter: Counter) -> None: ...
    def change(self, counter: Counter) -> None: ...
    def close(self, counter: Counter, *, is_finished: bool) -> None: ...
    def show_if_due(self, command: str) -> None: ...


class Lines:
    """A line every few seconds, for a file or a pipe."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._printed_at = file, time.monotonic()
        self._open: list[Counter] = []
        self._shown: dict[int, int] = {}  # what was done when a counter was last shown

    def print(self, line: str, *, is_warning: bool = False) -> None:
        print(wrap_for(self._file, visible(line)), file=self._file, flush=True)
        self.wait_anew()

    def wait_anew(self) -> None:
        self._printed_at = time.monotonic()

    def open(self, counter: Counter) -> None:
        self._open.append(counter)

    def change(self, counter: Counter) -> None:
        if self._is_due():
            self._show(counter)

    def close(self, counter: Counter, *, is_finished: bool) -> None:
        self._open.remove(counter)
        shown = self._shown.pop(id(counter), 0 if counter.is_main else None)
        # What was shown on its way is also shown at its end.
        if is_finished and counter.unit and shown is not None and shown != counter.done:
            self.print(counter.line(time.monotonic()))

    def show_if_due(self, command: str) -> None:
        if self._is_due():
            if self._open:
                self._show(self._choose())
            else:
                self.print(f"{command}: still working")

    def _choose(self) -> Counter:
        """The outermost work that has advanced since it was last shown; if none has, the innermost."""
        advanced = (each for each in self._open if each.unit and each.done > self._shown.get(id(each), each.first))
        return next(advanced, self._open[-1])

    def _is_due(self) -> bool:
        return time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES

    def _show(self, counter: Counter) -> None:
        self._shown[id(counter)] = counter.done
        self.print(counter.line(time.monotonic()))


class Bars:
    """A bar for each counter that is open, below the lines that were printed. A finished bar of a command's own work stays."""

    def __init__(self, file: TextIO) -> None:
        self._lines = Lines(file)
        self._open: list[Counter] = []
        self._console: Any = None
        self._live: Any = None

    def print(self, line: str, *, is_warning: bool = False) -> None:
        if self._live is None:
            self._lines.print(line)
        else:
            line = wrap_words(visible(line), self._console.width)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def open(self, counter: Counter) -> None:
        self._open.append(counter)
        # Most work on the side is over before it is worth a bar.
        if self._live is None and counter.is_main:
            self._start()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            # What a callback prints goes through the bar's console, but not into it if it is redirected to a file.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def change(self, counter: Counter) -> None:
        pass  # drawn several times a second in any case

    def close(self, counter: Counter, *, is_finished: bool) -> None:
        self._open.remove(counter)
        if not self._open and self._live is not None:
            self._live.stop()
            self._live = None
            self._lines.wait_anew()
        if counter.is_main and counter.total != 0:
            self._console.print(self._draw(counter), no_wrap=True, overflow="ellipsis")

    def show_if_due(self, command: str) -> None:
        if self._live is None and any(map(_is_long, self._open)):
            self._start()
        elif self._live is None:
            self._lines.show_if_due(command)

    def _render(self) -> Any:
        from rich.console import Group

        return Group(*(self._draw(each) for each in self._open if each.is_main or _is_long(each)))

    def _draw(self, counter: Counter) -> Any:
        """One line, which ends in "…" where the terminal is too narrow for it."""
        from rich.text import Text

        full, rest = ("━", "━") if self._console.encoding.startswith("utf") else ("#", "-")
        text = Text(visible(counter.what).replace("\n", " "), no_wrap=True, overflow="ellipsis")
        if counter.share is not None and self._console.width >= _NARROW:
            n = round(_BAR_WIDTH * counter.share)
            text.append(f" {full * n}", style="green").append(rest * (_BAR_WIDTH - n), style="bright_black")
        text.append(f" {'  '.join(counter.facts(time.monotonic()))}")
        if counter.note:
            text.append(f"  {visible(counter.note)}")
        return text


def _is_long(counter: Counter) -> bool:
    return time.monotonic() - counter.began >= _BRIEF_SECONDS


class Notebook:
    """An output of the cell, which the next state replaces: it needs no widgets, only what every kernel has.

    A notebook shows stderr as if something were wrong, so there all but warnings goes to the cell's output.
    """

    def __init__(self) -> None:
        self._open: list[Counter] = []
        self._handle: Any = None
        self._shown_at = 0.0

    def print(self, line: str, *, is_warning: bool = False) -> None:
        print(visible(line), file=sys.stderr if is_warning else sys.stdout, flush=True)

    def open(self, counter: Counter) -> None:
        self._open.append(counter)
        if counter.total and counter.is_main:
            self._show()

    def change(self, counter: Counter) -> None:
        if time.monotonic() - self._shown_at >= _SECONDS_BETWEEN_UPDATES:
            self._show()

    def close(self, counter: Counter, *, is_finished: bool) -> None:
        if counter.is_main and counter.done:
            self._show()
            self._handle = None  # it stays
        self._open.remove(counter)
        if not counter.is_main and self._handle is not None:
            self._show()

    def show_if_due(self, command: str) -> None:
        if self._open and time.monotonic() - self._shown_at >= _BRIEF_SECONDS:
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        self._shown_at = now = time.monotonic()
        shown = [each for each in self._open if each.is_main or _is_long(each)]
        lines = [(counter.share, visible(counter.line(now))) for counter in shown]
        if self._handle is None and not lines:
            return
        bars = ["" if share is None else f"<progress value='{share:.4f}' max='1'></progress> " for share, _ in lines]
        rows = [f"{bar}{html.escape(line)}" for bar, (_, line) in zip(bars, lines, strict=True)]
        bundle = {"text/html": "<br>".join(rows), "text/plain": "\n".join(line for _, line in lines)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def choose_display() -> Display:
    if _is_notebook():
        return Notebook()
    # A terminal that cannot move its cursor would show nothing but the end.
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Bars(sys.stderr)
    return Lines(sys.stderr)


def _is_notebook() -> bool:
    """Whether this process is a Jupyter kernel. IPython in a terminal is not one."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_shell(), "kernel", None) is not None


def format_amount(done: int, total: int | None, unit: str) -> str:
    """Return `40/60 examples`, or `1.2/13.4 GB`."""
    if unit == "bytes":
        size, name = _byte_unit(total or done)
        return f"{done / size:,.1f}{f'/{total / size:,.1f}' if total else ''} {name}"
    return f"{done:,}{f'/{total:,}' if total else ''} {unit}"


def format_rate(rate: float, unit: str) -> str:
    if unit == "bytes":
        size, name = _byte_unit(rate)
        return f"{rate / size:,.1f} {name}"
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _byte_unit(n: float) -> tuple[float, str]:
    return (1e9, "GB") if n >= 1e9 else (1e6, "MB")


def format_clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
