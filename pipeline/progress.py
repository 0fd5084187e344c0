"""Progress of a stage: bars with rate and time left on a terminal and in a notebook, plain lines elsewhere.

It goes to stderr, so that stdout has results only. A notebook shows stderr as if something were wrong, so there all but warnings goes
to the cell's output.
"""

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefcache.pipeline.visible_text import visible

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_UPDATES = 0.2  # of a bar in a notebook, each of which is sent to the browser


class Progress:
    """Prints lines and counts work. If `quiet`, it prints only warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._in_notebook = _is_notebook()

    def say(self, line: str) -> None:
        if not self.quiet:
            self._print(line, sys.stdout if self._in_notebook else sys.stderr)

    def warn(self, line: str) -> None:
        self._print(f"warning: {line}", sys.stderr)

    def _print(self, line: str, file: Any) -> None:
        if self._bar is not None:
            self._bar.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(visible(line), file=file, flush=True)

    @contextmanager
    def count(self, what: str, total: int | None, unit: str) -> Iterator["Counter"]:
        """Show progress up to `total` units of work."""
        if self.quiet:
            yield Counter(total)
        elif self._in_notebook:
            display = _NotebookDisplay()
            counter = _TextCounter(total, what, unit, display.show, _SECONDS_BETWEEN_UPDATES)
            if total:
                counter.show()
            yield counter
            counter.finish()
        elif sys.stderr.isatty():
            with self._rich_bar() as self._bar:
                try:
                    task = self._bar.add_task(what, total=total, unit=unit, note="")
                    yield _BarCounter(total, self._bar, task)
                finally:
                    bar, self._bar = self._bar, None
                    bar.refresh()
        else:
            counter = _TextCounter(total, what, unit, lambda line, _: self.say(line), _SECONDS_BETWEEN_LINES)
            yield counter
            counter.finish()

    @staticmethod
    def _rich_bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        return RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _rate_column(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            # What a callback prints goes through the bar's console, but not into it if it is redirected to a file.
            redirect_stdout=sys.stdout.isatty(),
        )


class Counter:
    """Counts finished units of work."""

    def __init__(self, total: int | None) -> None:
        self.total, self.done = total, 0

    def add(self, n: int, note: str = "") -> None:
        self.done += n


class _BarCounter(Counter):
    def __init__(self, total: int | None, bar: Any, task: Any) -> None:
        super().__init__(total)
        self._bar, self._task = bar, task

    def add(self, n: int, note: str = "") -> None:
        super().add(n)
        self._bar.update(self._task, advance=n, note=note)


class _TextCounter(Counter):
    """Describes the work in a line every few seconds, and at its end. `show` gets the line and the share that is done, if known."""

    def __init__(
        self, total: int | None, what: str, unit: str, show: Callable[[str, float | None], None], seconds: float
    ) -> None:
        super().__init__(total)
        self._what, self._unit, self._show, self._seconds, self._note = what, unit, show, seconds, ""
        self._start = self._shown_at = time.monotonic()
        self._shown_done = 0

    def add(self, n: int, note: str = "") -> None:
        super().add(n)
        self._note = note
        if time.monotonic() - self._shown_at >= self._seconds:
            self.show()

    def finish(self) -> None:
        if self.done != self._shown_done:
            self.show()

    def show(self) -> None:
        self._shown_at, self._shown_done = time.monotonic(), self.done
        seconds = max(self._shown_at - self._start, 1e-9)
        rate = self.done / seconds
        of = f"/{self.total:,}" if self.total else ""
        speed = f", {_number(rate)}/s" if self.done else ""
        left = f", {_clock((self.total - self.done) / rate)} left" if self.total and 0 < self.done < self.total else ""
        note = f"  {self._note}" if self._note else ""
        share = self.done / self.total if self.total else None
        self._show(f"{self._what}: {self.done:,}{of} {self._unit}{speed}{left}{note}", share)


class _NotebookDisplay:
    """An output of a cell that is replaced by the next one. It needs no widgets, only what every kernel has."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str, share: float | None) -> None:
        from IPython.display import display

        shown = visible(line)
        bar = "" if share is None else f"<progress value='{share:.4f}' max='1'></progress> "
        bundle = {"text/html": f"{bar}{html.escape(shown)}", "text/plain": shown}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _is_notebook() -> bool:
    """Whether this process is a Jupyter kernel. A shell of IPython in a terminal is none."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_shell(), "kernel", None) is not None


def _rate_column() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_number(speed)} {task.fields['unit']}/s" if speed else "")

    return RateColumn()


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
