"""Progress: a bar with the time left on a terminal, log lines elsewhere.

Bars go to stderr. Several may be open at once (evaluation inside training): they
share one display, and the innermost is the lowest.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from absl import logging

from gecko_jax.io import wording

T = TypeVar("T")

# Elsewhere than on a terminal: seconds between two log lines.
LOG_EVERY_SECONDS = 10.0


def track(
    iterable: Iterable[T], description: str, total: int | None = None, start: int = 0
) -> Iterator[T]:
    """Yields the items of `iterable` while showing how far it has come.

    Args:
        iterable: What to go through.
        description: A few words, such as "Encoding passages".
        total: Number of all items, those before `start` too; None asks `len`.
        start: Items that were finished before, by an earlier run.
    """
    if total is None:
        with contextlib.suppress(TypeError):
            total = start + len(iterable)  # pyright: ignore[reportArgumentType]
    with Progress(description, total, start) as progress:
        for step, item in enumerate(iterable, start=start + 1):
            yield item
            progress.update(step)


class Progress:
    """A counter that a loop moves; a context manager that closes the bar."""

    def __init__(
        self,
        description: str,
        total: int | None = None,
        start: int = 0,
        enabled: bool = True,
    ):
        """Opens the bar, or the log, at `start` of `total` steps.

        Args:
            description: A few words, such as "Training".
            total: Steps at the end; None when unknown.
            start: Steps finished earlier; the rate does not count them.
            enabled: False shows nothing, as on every process but the first.
        """
        self._description = description = wording.printable(description)
        self._total = total
        self._start = self._step = start
        self._text = ""
        self._began = self._logged = time.monotonic()
        self._logged_step: int | None = None
        # The first update, step and time: what comes before (compiling) happens once,
        # and says nothing of the time left.
        self._first: tuple[int, float] | None = None
        self._open = enabled
        self._task: Any = None
        # Python has None for an error output that was closed.
        if enabled and sys.stderr is not None and sys.stderr.isatty():
            self._task = _open_bar(description, total, start)

    def update(self, step: int, text: str = "") -> None:
        """Moves to `step` finished steps; `text` is shown beside them."""
        self._step = step
        self._first = self._first or (step, time.monotonic())
        self._text = wording.printable(text) or self._text
        if not self._open:
            return
        if self._task is not None:
            _display.update(self._task, completed=step, text=self._text)
        elif time.monotonic() - self._logged >= LOG_EVERY_SECONDS:
            self._log()

    def skip(self, step: int) -> None:
        """Moves to `step` past work that was done earlier; the rate leaves it out."""
        skipped = step - self._step
        self._start += skipped
        if self._first:
            self._first = (self._first[0] + skipped, self._first[1])
        self.update(step)

    def close(self) -> None:
        """Ends the bar, or logs the last line. Calling it again does nothing."""
        if not self._open:
            return
        self._open = False
        if self._task is not None:
            _close_bar(self._task)
        elif self._step != self._logged_step:
            self._log()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _log(self) -> None:
        self._logged = time.monotonic()
        self._logged_step = self._step
        logging.info("%s", self._line(self._logged - self._began))

    def _line(self, seconds: float) -> str:
        parts = [f"{self._description}: {self._step:,}"]
        if self._total:
            parts[0] += f"/{self._total:,} ({self._step / self._total:.0%})"
        left = (self._total or 0) - self._step
        done, elapsed = self._step - self._start, seconds
        if left > 0 and self._first:
            done = self._step - self._first[0]
            elapsed = seconds - (self._first[1] - self._began)
        if done > 0 and elapsed > 0:
            rate = done / elapsed
            parts.append(f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each")
            if left > 0:
                parts.append(f"{_clock(left / rate)} left")
            else:
                parts.append(f"took {_clock(seconds)}")
        if self._text:
            parts.append(self._text)
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# The one rich display of the process, while at least one bar is open.
_display: Any = None
_bars: int = 0


def _open_bar(description: str, total: int | None, start: int) -> Any:
    global _display, _bars
    from rich import console, progress

    if _display is None:
        _display = progress.Progress(
            # A name of a file may look like rich's markup.
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}", markup=False),
            console=console.Console(stderr=True),
        )
        _display.start()
    _bars += 1
    return _display.add_task(description, total=total, completed=start, text="")


def _close_bar(task: Any) -> None:
    global _display, _bars
    _bars -= 1
    if _bars:
        _display.remove_task(task)  # An inner bar leaves no trace.
    else:
        _display.stop()
        _display = None
