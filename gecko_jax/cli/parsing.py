"""Argument parser, common options and value types that all verbs share."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from gecko_jax.io import wording


class UsageError(Exception):
    """The command line is invalid."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints descriptions as written, and appends its default to each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of exiting, and suggests similar names."""

    _arguments: Sequence[str] = ()

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)
        self.option("--debug", "show tracebacks and all log messages", bool)

    def option(
        self,
        name: str,
        text: str,
        kind: str | type | Callable[[str], Any] | tuple[str, ...],
        default: Any = None,
        **settings: Any,
    ) -> None:
        """Adds an option, or a positional argument, whose name has no dashes.

        `kind` is the placeholder of a nonempty text, such as "DIR"; a tuple of choices;
        `bool` for a flag; or a function that converts the text, and a default that is a
        string. `settings` are others of `add_argument`.
        """
        if kind is bool:
            self.add_argument(name, action="store_true", help=text)
            return
        if isinstance(kind, str):
            settings |= {"metavar": kind, "type": _not_empty}
        elif isinstance(kind, tuple):
            settings["choices"] = kind
        else:
            settings = {"metavar": "N", "type": kind} | settings
        self.add_argument(name, help=text, default=default, **settings)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (overloads)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parses as argparse does, and stores the arguments for `error`."""
        self._arguments = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` with the message and a pointer to the help."""
        if "arguments are required" in message:
            # A misspelled option also counts as missing. Report the misspelling.
            self.refuse_unknown(self._arguments)
        message = wording.message(message)
        raise UsageError(f"{self.prog}: error: {message}\nSee {self.prog} --help")

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raises `UsageError` for the first option that this parser does not define."""
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if re.match(r"--(no)?config\.", name):
                self.error(f"{name}: this verb takes no config")
            if name.startswith("-") and name not in self._option_string_actions:
                similar = _similar(name, self._option_string_actions)
                self.error(f"unknown option {name}{similar}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            option = action.metavar or "/".join(action.option_strings) or action.dest
            self.error(
                f"{option} {value!r}: must be one of {', '.join(names)}"
                f"{_similar(str(value), names)}"
            )


def add_verb(
    verbs: Any,
    name: str,
    description: str,
    run: Callable[[argparse.Namespace], None] | None = None,
) -> Parser:
    """Adds the parser of a verb, whose name is the full command.

    `verbs` are those of the parent parser. `run` is None for a verb with verbs.
    """
    parser = verbs.add_parser(name.split()[-1], prog=name, description=description)
    parser.set_defaults(parser=parser, run=run)
    return parser


def add_config(parser: Parser, required: bool = True) -> None:
    """Adds `--config` and documents the options that set its keys."""
    parser.option("--config", "config file", "FILE.py:ARG", required=required)
    # Never stored: `flags.split` has already taken these options out of the arguments.
    parser.option("--config.GROUP.KEY", "set a config key", "VALUE", dest="_key")


def add_model(parser: Parser, default: str | None = None) -> None:
    """Adds `--model`, which is required unless it has a default."""
    text = "workdir of a run, exported folder, or mini (the bundled model)"
    parser.option("--model", text, "DIR", default, required=not default)


def add_prepared_dir(parser: Parser) -> None:
    """Adds `--prepared-dir`."""
    default = "~/.cache/gecko_jax/prepared"
    parser.option("--prepared-dir", "folder of prepared data sets", "DIR", default)


def _similar(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def say(text: object = "") -> None:
    """Prints the result of a verb to stdout, with control characters replaced."""
    print(wording.lines(str(text)))


def _not_empty(text: str) -> str:
    # The shell passes an empty text for "$UNSET". As a path it would mean the current
    # folder.
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def _whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number, at least {least}"
            )
        return int(text)

    return read


count = _whole_number(0)
positive = _whole_number(1)
length = _whole_number(2)  # in tokens: one token of text and the end token


def words(text: str) -> tuple[str, ...]:
    """Reads a comma-separated list without duplicates."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def positives(text: str) -> tuple[int, ...]:
    """Reads a comma-separated list of positive whole numbers; sorts them."""
    return tuple(sorted({positive(part.strip()) for part in text.split(",")}))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints aligned columns: the first to the left, the others to the right."""
    lines = [header, *([wording.printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)]
        print("  ".join(["", *cells]).rstrip())
