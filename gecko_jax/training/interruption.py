"""A request to stop: SIGTERM, which a preempted machine gets before its end."""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run stopped because it was asked to; everything is saved."""


class Flag:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self, *_: int | types.FrameType | None) -> None:
        """Takes note of the signal."""
        self._is_set = True

    def is_raised(self, step: int) -> bool:
        """Returns whether to stop after this step: the same on every process.

        Machines get their signals at different moments, so that processes of one run
        agree on a step that none of them has passed.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_set


@contextmanager
def watch() -> Iterator[Flag]:
    """Keeps SIGTERM from ending the process while the context is open."""
    flag = Flag()
    if jax.process_count() > 1:
        # JAX has its own handler there, which tells the other processes too.
        yield flag
        return
    try:
        before = signal.signal(signal.SIGTERM, flag.set)
    except ValueError:
        # Only a main thread can have handlers: in another, such as a notebook's, the
        # signal does what it did.
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
