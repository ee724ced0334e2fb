"""What the parsers of all verbs share: errors, common options, kinds of values."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gecko_jax.io import wording


class UsageError(Exception):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and offers the nearest names."""

    _arguments: Sequence[str] = ()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (overloads)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parses as argparse does, and keeps the arguments for what `error` tells."""
        self._arguments = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises what `cli` tells: the fault, and where to read on."""
        if "arguments are required" in message:
            # A misspelt option is missing too, but the spelling is what to tell.
            self.refuse_unknown(self._arguments)
        told = wording.message(message)
        raise UsageError(f"{self.prog}: error: {told}\nSee {self.prog} --help")

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raises for the first option that this parser does not have."""
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if re.match(r"--(no)?config\.", name):
                self.error(f"{name}: this verb takes no config")
            if name.startswith("-") and name not in self._option_string_actions:
                options = list(self._option_string_actions)
                self.error(f"unknown option {name}{_nearest(name, options)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            what = action.metavar or "/".join(action.option_strings) or action.dest
            self.error(
                f"{what} {value!r}: must be one of {', '.join(names)}"
                f"{_nearest(str(value), names)}"
            )


def _nearest(name: str, names: Sequence[str]) -> str:
    from gecko_jax.cli import flags

    return flags.nearest(name, names)


def add_verb(
    verbs: Any,
    name: str,
    description: str,
    run: Callable[[argparse.Namespace], None] | None = None,
) -> argparse.ArgumentParser:
    """Adds the parser of a verb.

    Args:
        verbs: What the parser above it has for its verbs.
        name: All words of the command, such as "gecko data show".
        description: The help, with examples.
        run: What the verb does; None for one that has verbs of its own.
    """
    parser = verbs.add_parser(name.split()[-1], prog=name, **texts(description))
    parser.set_defaults(parser=parser, run=run)
    add_debug(parser)
    return parser


def texts(description: str) -> dict[str, Any]:
    """Returns what makes a parser print its help as it is written."""
    return {
        "description": description,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds `--debug`, which every verb has."""
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and every log line"
    )


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--config` and, for its help, the options that set its keys."""
    parser.add_argument(
        "--config", required=required, metavar="FILE.py:ARG", help="the config file"
    )
    # Never stored: `flags.split` has taken these. Here for the help.
    parser.add_argument(
        "--config.GROUP.KEY", dest="_key", metavar="VALUE", help="sets one of its keys"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`."""
    parser.add_argument(
        "--model",
        required=True,
        type=path,
        metavar="DIR",
        help="workdir of a run, an export, or mini, which comes along",
    )


def add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """Adds `--output`, a file or folder that the verb writes."""
    parser.add_argument(
        "--output", required=True, type=path, metavar=metavar, help=text
    )


def add_prepared_dir(parser: argparse.ArgumentParser) -> None:
    """Adds `--prepared-dir`."""
    parser.add_argument(
        "--prepared-dir",
        default="~/.cache/gecko_jax/prepared",
        metavar="DIR",
        help="where prepared sets lie (~/.cache/gecko_jax/prepared)",
    )


def say(text: object = "") -> None:
    """Prints what a verb has done, with a mark in place of each escape code."""
    print(wording.lines(str(text)))


def path(text: str) -> str:
    """Reads a path."""
    if not text.strip():  # Such as "$UNSET": it would mean the current folder.
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def count(text: str) -> int:
    """Reads a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Reads a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def length(text: str) -> int:
    """Reads a number of tokens: a word and the end of the text, at least."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 2")
    return int(text)


def words(text: str) -> tuple[str, ...]:
    """Reads words with commas between them, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def dims(text: str) -> tuple[int, ...]:
    """Reads dims with commas between them, in their order."""
    return tuple(sorted({positive(part.strip()) for part in text.split(",")}))
