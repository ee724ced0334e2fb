"""How messages word what they count, and show the texts of others."""

import os
import re

# What a terminal would take for a command.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 pair", "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def file_name(name: str) -> str:
    """Returns the name of a file with a mark for each byte that is not UTF-8.

    Python has halves of surrogate pairs in their places, which no JSON or table holds.
    """
    return os.fsencode(name).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """Returns a text with a mark in the place of each control character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
