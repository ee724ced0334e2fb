"""Progress bars with the time left on a terminal, log lines elsewhere.

Bars go to stderr. Nested bars (evaluation inside training) share one display, with the
innermost at the bottom.
"""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from absl import logging

from gecko_jax.io import wording

T = TypeVar("T")

# Seconds between log lines if stderr is not a terminal.
LOG_EVERY_SECONDS = 10.0


def track(
    iterable: Iterable[T], description: str, total: int | None = None
) -> Iterator[T]:
    """Yields the items of `iterable`, `total` in all, and shows the progress."""
    total = total or operator.length_hint(iterable) or None
    with Progress(description, total) as progress:
        for step, item in enumerate(iterable, start=1):
            yield item
            progress.update(step)


class Progress:
    """Progress of a loop; a context manager that closes the bar."""

    def __init__(
        self,
        description: str,
        total: int | None = None,
        start: int = 0,
        enabled: bool = True,
    ):
        """Opens the bar, or the log, at `start` of `total` steps.

        Steps before `start` do not count for the rate. `total` is None if unknown.
        """
        self._description = description = wording.printable(description)
        self._total = total
        self._start = self._step = start
        self._text = ""
        self._began = self._logged = time.monotonic()
        self._logged_step: int | None = None
        # Step and time of the first update. What happens before it, such as compiling,
        # happens once, so it does not count for the time left.
        self._first: tuple[int, float] | None = None
        self._open = enabled
        self._task: Any = None
        # sys.stderr is None if it was closed.
        if enabled and sys.stderr is not None and sys.stderr.isatty():
            self._task = _open_bar(description, total, start)

    def update(self, step: int, text: str = "") -> None:
        """Moves to `step` finished steps, and shows `text` next to them."""
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
        """Moves to `step` past work of an earlier run, which the rate leaves out."""
        skipped = step - self._step
        self._start += skipped
        if self._first:
            self._first = (self._first[0] + skipped, self._first[1])
        self.update(step)

    def close(self) -> None:
        """Ends the bar, or logs the last line. Further calls do nothing."""
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
        self._logged = now = time.monotonic()
        self._logged_step = self._step
        parts = [f"{self._description}: {self._step:,}"]
        if self._total:
            parts[0] += f"/{self._total:,} ({self._step / self._total:.0%})"
        left = (self._total or 0) - self._step
        start = self._first if left > 0 and self._first else (self._start, self._began)
        done, elapsed = self._step - start[0], now - start[1]
        if done > 0 and elapsed > 0:
            rate = done / elapsed
            parts.append(f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each")
            remaining = f"{_clock(left / rate)} left" if left > 0 else ""
            parts.append(remaining or f"took {_clock(elapsed)}")
        if self._text:
            parts.append(self._text)
        logging.info("%s", ", ".join(parts))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# The rich display of the process, while a bar is open.
_display: Any = None


def _open_bar(description: str, total: int | None, start: int) -> Any:
    global _display
    from rich import console, progress

    if _display is None:
        _display = progress.Progress(
            # File names may contain the markup of rich.
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
    return _display.add_task(description, total=total, completed=start, text="")


def _close_bar(task: Any) -> None:
    global _display
    if len(_display.tasks) > 1:
        _display.remove_task(task)  # Only the outermost bar stays visible.
    else:
        _display.stop()
        _display = None
