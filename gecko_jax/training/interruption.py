"""SIGTERM, which a machine receives before it is preempted."""

import contextlib
import signal
import types
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run stopped on SIGTERM, after saving a checkpoint."""


class Flag:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self, *_: int | types.FrameType | None) -> None:
        """Handles the signal."""
        self._is_set = True

    def is_raised(self, step: int) -> bool:
        """Returns whether to stop after this step: the same on every process.

        Machines receive their signals at different times, so the processes of a run
        agree on a step that none of them has passed.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_set


@contextlib.contextmanager
def watch() -> Iterator[Flag]:
    """Keeps SIGTERM from ending the process while the context is open."""
    flag = Flag()
    if jax.process_count() > 1:
        # JAX's own handler notifies the other processes; it must stay.
        yield flag
        return
    try:
        before = signal.signal(signal.SIGTERM, flag.set)
    except ValueError:
        # Only the main thread can set handlers. In another thread, such as a
        # notebook's, SIGTERM keeps its effect.
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
