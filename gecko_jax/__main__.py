"""The process of `gecko`, or `python -m gecko_jax`, from its first moment on."""

import os
import signal
import sys
import types
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command as a process of its own, which ends here."""
    _prepare_streams()
    # A shell's job in the background has Ctrl-C ignored, and keeps it so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # Only now: this takes a tenth of a second, in which Ctrl-C may come.
    from gecko_jax.cli import entry

    entry.run()


def _prepare_streams() -> None:
    """Opens the standard streams that the caller has closed, on the null device."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next file to be opened would get this number, and with it all that
            # compiled libraries write to their error output.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # print() would take None for the standard output.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is not None:
        # A path that is not UTF-8 is printed as the bytes that it is.
        sys.stdout.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt, or ends the process at once while it imports.

    Compiled modules that are being imported take the exception for a fault of their
    own, or crash.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\ngecko: interrupted\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()
