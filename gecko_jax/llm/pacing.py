"""Pacing: spreads the requests of all threads over time."""

import threading
import time


class Stopped(Exception):
    """The run was stopped while a request waited."""


class Pace:
    """The rate limits of a server; 0 is no limit."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int):
        self.stop = threading.Event()  # Ends every wait with `Stopped`.
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._lock = threading.Lock()
        self._next_send = 0.0  # In seconds of `time.monotonic`.

    def wait_for_turn(self) -> None:
        """Waits until a request may be sent."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next_send, now)
            if self._requests_per_minute:
                self._next_send = turn + 60.0 / self._requests_per_minute
        if turn > now:
            self.wait(turn - now)

    def wait(self, seconds: float) -> None:
        """Waits, or raises `Stopped`."""
        if self.stop.wait(seconds):
            raise Stopped

    def delay_by(self, seconds: float) -> None:
        """Sends no request in the next seconds."""
        with self._lock:
            self._next_send = max(self._next_send, time.monotonic() + seconds)

    def delay_by_tokens(self, tokens: int) -> None:
        """Delays the next requests by the time that these tokens stand for."""
        if self._tokens_per_minute:
            with self._lock:
                start = max(self._next_send, time.monotonic())
                self._next_send = start + 60.0 * tokens / self._tokens_per_minute
