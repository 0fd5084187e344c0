"""Progress of a stage on stderr: bars with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefcache.pipeline.visible_text import visible

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Prints lines and counts work. If `quiet`, it prints only warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None

    def say(self, line: str) -> None:
        if not self.quiet:
            self._print(line)

    def warn(self, line: str) -> None:
        self._print(f"warning: {line}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(visible(line), file=sys.stderr, flush=True)

    @contextmanager
    def count(self, what: str, total: int | None, unit: str) -> Iterator["Counter"]:
        """Show progress up to `total` units of work."""
        if self.quiet:
            yield Counter(total)
        elif sys.stderr.isatty():
            with self._rich_bar() as self._bar:
                try:
                    task = self._bar.add_task(what, total=total, unit=unit, note="")
                    yield _BarCounter(total, self._bar, task)
                finally:
                    bar, self._bar = self._bar, None
                    bar.refresh()
        else:
            counter = _LineCounter(total, what, unit, self)
            yield counter
            counter.last_line()

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


class _LineCounter(Counter):
    def __init__(self, total: int | None, what: str, unit: str, progress: Progress) -> None:
        super().__init__(total)
        self._what, self._unit, self._progress, self._note = what, unit, progress, ""
        self._start = self._printed_at = time.monotonic()
        self._printed_done = 0

    def add(self, n: int, note: str = "") -> None:
        super().add(n)
        self._note = note
        if time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._line()

    def last_line(self) -> None:
        if self.done != self._printed_done:
            self._line()

    def _line(self) -> None:
        self._printed_at, self._printed_done = time.monotonic(), self.done
        seconds = max(self._printed_at - self._start, 1e-9)
        rate = self.done / seconds
        of = f"/{self.total:,}" if self.total else ""
        left = f", {_clock((self.total - self.done) / rate)} left" if self.total and self.done < self.total else ""
        note = f"  {self._note}" if self._note else ""
        self._progress.say(f"{self._what}: {self.done:,}{of} {self._unit}, {_number(rate)}/s{left}{note}")


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
