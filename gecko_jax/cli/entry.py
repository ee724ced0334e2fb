"""Entry point of `gecko`: parses the command line, runs a verb, reports errors."""

import argparse
import contextlib
import logging as standard_logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import logging

import gecko_jax
from gecko_jax.cli import (
    average_command,
    compile_command,
    convert_command,
    data_command,
    embed_command,
    evaluate_command,
    flags,
    fret_command,
    parsing,
    search_command,
    train_command,
)
from gecko_jax.io import wording

_COMMANDS = (
    *(train_command, compile_command, data_command, evaluate_command, embed_command),
    *(search_command, convert_command, average_command, fret_command),
)

# Errors of the input or of the machine: reported in one line, without a traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError)

# Exit status that a shell reports for a process that Ctrl-C has ended.
_INTERRUPTED = 130

# XLA's threads may still use objects of the interrupted frames and crash when Python
# frees them. References from here keep those frames until the process ends.
_interrupts: list[KeyboardInterrupt] = []

_DESCRIPTION = """\
Gecko text embeddings in JAX: train a dual encoder, evaluate it, and search with it.

  gecko train       train a model from a config file
  gecko compile     compile a config for a TPU slice on a CPU: memory and time per step
  gecko data        inspect and prepare training data
  gecko evaluate    evaluate a model on retrieval, similarity and classification
  gecko embed       embed a file of texts
  gecko index       build a search index from embeddings
  gecko search      search an index
  gecko import      convert a T5X, Hugging Face or sentence-transformers checkpoint
  gecko export      convert a trained model for other libraries
  gecko average     average checkpoints or models
  gecko fret        generate training data with a language model (FRet)

`gecko VERB --help` explains a verb and shows examples.
"""


def run() -> NoReturn:
    """Runs the command line of this process, then exits."""
    sys.unraisablehook = _handle_unraisable
    status = main()
    if status == _INTERRUPTED:
        # Skip Python's finalization: running XLA threads would crash during it.
        with contextlib.suppress(OSError, AttributeError):  # stdout is closed or None
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _handle_unraisable(lost: Any) -> None:
    """Handles an exception in a callback, which Python would print and drop."""
    if str(lost.exc_value) == "Event loop is closed":
        # When an Orbax save fails, it closes the event loop that TensorStore's writers
        # still report to. Orbax raises the error of the save itself.
        return
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    # Send Ctrl-C again, so that it also reaches the main program.
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status, unless the verb exits with its own.

    0 is success, 1 a reported error, 2 an invalid command line, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("GECKO_DEBUG", "") not in ("", "0")
    # Hides the log messages of TensorFlow's C++ code, which reads this at import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    command = "gecko"
    try:
        options = _parse(arguments)
        options.arguments = arguments
        command = options.parser.prog
        _set_up_logging(debug)
        options.run(options)
    except parsing.UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        _interrupts.append(interrupt)
        message = str(interrupt) or "interrupted; run the same command to resume"
        print(f"\n{command}: {message}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has exited. This is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*_EXPECTED, RuntimeError) as error:
        message = _describe(error)
        if debug or message is None:
            raise
        print(f"{command}: error: {wording.message(message)}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    # The parser cannot know the keys of a config, so their options are split off first.
    overrides, arguments = flags.split(arguments)
    options, unknown = parser.parse_known_args(arguments)
    options.overrides = overrides
    if "config" not in options:
        unknown = overrides + unknown
    if unknown:
        options.parser.refuse_unknown(unknown)
        options.parser.error(f"unexpected argument {unknown[0]!r}")
    return options


def _describe(error: Exception) -> str | None:
    """Returns the message of an expected error; None for an error of the program."""
    message = str(error) or type(error).__name__
    if isinstance(error, RuntimeError):
        # XLA raises this when a device or the host runs out of memory.
        if "RESOURCE_EXHAUSTED" not in message:
            return None
        first_line = message.strip().splitlines()[0][:300]
        return (
            f"out of memory ({first_line}); use a smaller model, batch or "
            "train.microbatch_size"
        )
    if isinstance(error, MemoryError):
        return f"out of memory ({message}); use a smaller model, batch or file"
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return f"{error.filename}: is a file, not a folder; choose another path"
    # "[Errno 2] No such file or directory: 'x'" -> "x: no such file or directory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ModuleNotFoundError) and "gecko-jax[" not in message:
        return f"{message}; install it with pip"
    return message


class _LogHandler(standard_logging.Handler):
    """Prints our log messages and the warnings of all libraries to stderr."""

    debug = False

    def filter(self, record: standard_logging.LogRecord) -> bool:
        if self.debug or f"{os.sep}gecko_jax{os.sep}" in record.pathname:
            return True
        # Each thread of Orbax logs the error of a failed save, which is also raised.
        is_repeated = f"{os.sep}orbax{os.sep}" in record.pathname and (
            record.levelno >= standard_logging.ERROR
        )
        return record.levelno >= standard_logging.WARNING and not is_repeated

    def emit(self, record: standard_logging.LogRecord) -> None:
        time = standard_logging.Formatter().formatTime(record, "%H:%M:%S")
        is_info = record.levelno == standard_logging.INFO
        level = "" if is_info else f"{record.levelname.lower()}: "
        message = wording.message(record.getMessage())
        # Looked up at each call, because an open progress bar replaces sys.stderr.
        print(f"{time} {level}{message}", file=sys.stderr)


_LOG_HANDLER = _LogHandler()


def _set_up_logging(debug: bool) -> None:
    _LOG_HANDLER.debug = debug
    root = standard_logging.getLogger()
    if _LOG_HANDLER not in root.handlers:
        root.addHandler(_LOG_HANDLER)
    logging.set_verbosity(logging.INFO)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `gecko` with the parsers of all verbs."""
    parser = parsing.Parser(prog="gecko", description=_DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"gecko-jax {gecko_jax.__version__}"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, help="see above")
    for command in _COMMANDS:
        command.add_parser(verbs)
    return parser
