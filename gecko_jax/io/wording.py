"""Wording of counts in messages, and escaping of untrusted text.

Names, texts and settings in a file come from whoever wrote it. Terminals interpret
escape codes in them, and Markdown readers markup and HTML. Pass text through
`printable`, `message` or `json_line` before printing it, and through `markdown` or
`markdown_code` before writing it into a card.
"""

import json
import os
import re
from typing import Any

# Control characters, line separators, characters that change the text direction, and
# lone surrogates, except those by which Python represents the bytes of a file name.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]"
)
# Maximum characters per line of a message.
_LONGEST = 4_000
# Characters that can start Markdown or HTML markup within a line.
_MARKUP = re.compile(r"[\\`*_<>\[\]#|~&]")
# Entities instead of backslashes, which simple HTML and link parsers ignore.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "[": "&#91;", "]": "&#93;"}
# Text that would end a code span, or is markup for parsers that ignore code spans.
_NO_CODE = re.compile(r"[`<\x00-\x1f]|\]\(")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 pair", "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def file_name(name: str) -> str:
    """Returns a file name with U+FFFD for each byte that is not UTF-8.

    Python represents these bytes as lone surrogates, which UTF-8 cannot encode.
    """
    return os.fsencode(name).decode("utf-8", errors="replace")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error message, shortened to 300 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TensorStore appends its whole spec.
    return lines[0].partition(" [tensorstore_spec")[0][:300]


def printable(text: str) -> str:
    """Returns a text on one line, with U+FFFD for each control character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def lines(text: str) -> str:
    """Returns a text with each of its lines made printable."""
    return "\n".join(map(printable, text.split("\n")))


def message(text: str) -> str:
    """Returns a message for the terminal, with all lines but the first indented.

    A name in it may contain line breaks; without indentation, the text after them could
    look like a separate message.
    """
    first, *others = map(_shortened, text.rstrip().split("\n"))
    indented = (line if line.startswith("  ") else f"  {line}" for line in others)
    return "\n".join([first, *indented])


def _shortened(line: str) -> str:
    shown = printable(line)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} [...]"


def json_line(value: Any) -> str:
    """Returns a value as one line of JSON, with escaped control characters."""
    encoded = json.dumps(value, ensure_ascii=False)
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded)


def markdown(text: str) -> str:
    """Returns Markdown, for a line or a table cell, that displays the text verbatim."""
    return _MARKUP.sub(
        lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), printable(text)
    )


def markdown_code(text: str, *, in_table: bool = False) -> str:
    """Returns a Markdown code span, or plain Markdown if the text allows no code span.

    In a table, "|" is escaped.
    """
    if _NO_CODE.search(text) or not text.strip():
        return markdown(text)
    text = printable(text)
    return f"`{text.replace('|', chr(92) + '|') if in_table else text}`"
