"""Work that is done ahead, in a thread of its own, while its results are used."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# Results that wait for their consumer.
_WAITING = 4


def ahead(make: Callable[[int], T], start: int, stop: int | None = None) -> Iterator[T]:
    """Yields `make(start)`, ..., before `stop`, made ahead; without end if it is None.

    An exception of the thread is raised here, in its place. Closing the generator ends
    the thread.
    """
    ready: queue.Queue[Any] = queue.Queue(_WAITING)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def prepare() -> None:
        step = start
        try:
            while not closed.is_set() and (stop is None or step < stop):
                put(make(step))
                step += 1
            put(None)
        except BaseException as error:  # Raised by the consumer.
            put(error)

    thread = threading.Thread(target=prepare, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
