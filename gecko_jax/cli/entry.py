"""The command `gecko`: its verbs, their options, and how errors are told.

The verbs are in `commands`, with their options and the help that teaches each.
"""

import argparse
import contextlib
import logging as standard_logging
import os
import re
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
    fret_command,
    parsing,
    search_command,
    train_command,
)
from gecko_jax.io import wording

# Faults of the input or of the machine: told in one line, without a traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError)

# What a shell reports of a process that Ctrl-C has ended.
_INTERRUPTED = 130

# What Ctrl-C ended. XLA's threads may still work for its frames, and crash when these
# are freed: they stay until the process ends.
_interrupts: list[KeyboardInterrupt] = []

_DESCRIPTION = """\
Gecko text embeddings in JAX: train a dual encoder, judge it, search with it.

  gecko train       trains a model from a config file
  gecko compile     proves a config for a TPU topology, on a CPU
  gecko data        shows data and prepares it: hard negatives, vocabularies
  gecko evaluate    judges a model on retrieval and similarity, beside BM25
  gecko embed       turns a file of texts into vectors
  gecko index       builds an index from vectors
  gecko search      answers queries from an index
  gecko import      turns a checkpoint of another library into a model folder
  gecko export      writes a trained model into a folder of its own
  gecko average     makes one model of the checkpoints of a run, or of several models
  gecko fret        makes training data with a language model

`gecko VERB --help` explains a verb with examples.
"""


def run() -> NoReturn:
    """Runs the command as a process of its own, which ends here."""
    sys.unraisablehook = _handle_lost_error
    status = main()
    if status == _INTERRUPTED:
        # XLA's threads are at work still, and crash when Python is taken down.
        with contextlib.suppress(OSError, AttributeError):  # Closed: it is None.
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _handle_lost_error(lost: Any) -> None:
    """Takes an error of a callback, which Python drops: raises Ctrl-C again."""
    if str(lost.exc_value) == "Event loop is closed":
        # A save of Orbax that fails closes the loop that TensorStore's writers still
        # report to, once for each array. The error of the save itself is raised.
        return
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status.

    Returns:
        0 when done, 1 for an error that was told, 2 for a command line that cannot be
        understood, 130 when interrupted; a verb may exit with its own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("GECKO_DEBUG", "") not in ("", "0")
    # TensorFlow's C++ notes would drown ours; it reads this when it is imported.
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
        message = (
            str(interrupt) or "interrupted; the same command goes on from what is saved"
        )
        print(f"\n{command}: {message}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone: no fault of anyone's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _EXPECTED as error:
        if debug:
            raise
        print(f"{command}: error: {wording.message(_describe(error))}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        # How XLA says that a device, or the host, has no memory left.
        if debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = wording.printable(str(error).strip().splitlines()[0])
        print(
            f"{command}: error: out of memory ({first[:300]}); choose a smaller model, "
            "batch or train.microbatch_size",
            file=sys.stderr,
        )
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    # Keys of configs cannot be known to a parser: they are set apart before.
    overrides = [a for a in arguments if re.match(r"--(no)?config\.", a)]
    if overrides:
        from gecko_jax.cli import flags

        overrides, arguments = flags.split(arguments)
    options, unknown = parser.parse_known_args(arguments)
    options.overrides = overrides
    if overrides and "config" not in options:
        unknown = overrides + unknown
    if unknown:
        options.parser.refuse_unknown(unknown)
        options.parser.error(
            f"argument {unknown[0]!r} is one too many, or apart from the others"
        )
    return options


def _describe(error: BaseException) -> str:
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory ({message}); choose a smaller model, batch or file"
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return f"{error.filename}: a file is where a folder should be; name another"
    # "[Errno 2] No such file or directory: 'x'" -> "x: no such file or directory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ModuleNotFoundError) and "gecko-jax[" not in message:
        return f"{message}; install it with pip"
    return message


class _LogHandler(standard_logging.Handler):
    """Our own notes and everyone's warnings, one clean line each, to stderr."""

    debug = False

    def filter(self, record: standard_logging.LogRecord) -> bool:
        is_ours = f"{os.sep}gecko_jax{os.sep}" in record.pathname
        # Each of its threads logs the error of a save, which is raised as well.
        is_repeated = f"{os.sep}orbax{os.sep}" in record.pathname and (
            record.levelno >= standard_logging.ERROR
        )
        is_shown = is_ours or (
            record.levelno >= standard_logging.WARNING and not is_repeated
        )
        return self.debug or is_shown

    def emit(self, record: standard_logging.LogRecord) -> None:
        time = standard_logging.Formatter().formatTime(record, "%H:%M:%S")
        level = record.levelname.lower() + ": "
        # sys.stderr is looked up now: an open progress bar puts its own in place.
        print(
            f"{time} {'' if level == 'info: ' else level}"
            f"{wording.message(record.getMessage())}",
            file=sys.stderr,
        )


_LOG_HANDLER = _LogHandler()


def _set_up_logging(debug: bool) -> None:
    _LOG_HANDLER.debug = debug
    root = standard_logging.getLogger()
    if _LOG_HANDLER not in root.handlers:
        root.addHandler(_LOG_HANDLER)
    logging.set_verbosity(logging.INFO)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `gecko`, with a parser for every verb."""
    parser = parsing.Parser(prog="gecko", **parsing.texts(_DESCRIPTION))
    parser.add_argument(
        "--version", action="version", version=f"gecko-jax {gecko_jax.__version__}"
    )
    parsing.add_debug(parser)
    verbs = parser.add_subparsers(metavar="VERB", required=True, help="see above")
    for command in (
        train_command,
        compile_command,
        data_command,
        evaluate_command,
        embed_command,
        search_command,
        convert_command,
        average_command,
        fret_command,
    ):
        command.add_parser(verbs)
    return parser
