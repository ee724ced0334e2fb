"""Starts `gecko`, also as `python -m gecko_jax`: standard streams and Ctrl-C."""

import os
import signal
import sys
import types
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command line of this process, then exits."""
    _prepare_streams()
    # The shell ignores Ctrl-C for a background job; keep it ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # Imported after the handler is set: Ctrl-C may come during this import.
    from gecko_jax.cli import entry

    entry.run()


def _prepare_streams() -> None:
    """Opens standard streams that the caller has closed on the null device."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened would get this number, and
            # compiled libraries would write their error output into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # print(file=None) would write to the standard output.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is not None:
        # Prints a path that is not UTF-8 as its original bytes.
        sys.stdout.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt, or exits at once during an import.

    A compiled module that is being imported would report the exception as its own
    error, or crash.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\ngecko: interrupted\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()
