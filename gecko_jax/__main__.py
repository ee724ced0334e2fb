"""The process of `gecko`, or `python -m gecko_jax`, from its first moment on."""

import os
import signal
import types
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command as a process of its own, which ends here."""
    # A shell's job in the background has Ctrl-C ignored, and keeps it so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # Only now: this takes a tenth of a second, in which Ctrl-C may come.
    from gecko_jax import cli

    cli.run()


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
