"""How messages word what they count, and show the texts of others.

The names, texts and settings in a file come from whoever wrote the file. A terminal
obeys escape codes in them, and a Markdown reader obeys markup and HTML. Text passes
through `printable`, `message` or `json_line` before it is printed, and through
`markdown` or `markdown_code` before it enters a card.
"""

import json
import os
import re
from typing import Any

# What a terminal obeys or cannot show: control characters, separators of lines,
# characters that turn the direction of the text around them, and halves of surrogate
# pairs. The halves by which Python spells the bytes of a file name are printed as those
# bytes.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]"
)
# Characters of a line of a message.
_LONGEST = 4_000
# What can begin markup of Markdown, or HTML, within a line.
_MARKUP = re.compile(r"[\\`*_<>\[\]#|~&]")
# Without a backslash: simple readers of HTML and of links pass over those.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "[": "&#91;", "]": "&#93;"}
# Text that would end a code span, or is markup for a reader that ignores code spans.
_NO_CODE = re.compile(r"[`<\x00-\x1f]|\]\(")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 pair", "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def file_name(name: str) -> str:
    """Returns the name of a file with a mark for each byte that is not UTF-8.

    Python has halves of surrogate pairs in their places, which no JSON or table holds.
    """
    return os.fsencode(name).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """Returns a text on one line, with a mark in place of each control character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def lines(text: str) -> str:
    """Returns a text of several lines, each of them printable."""
    return "\n".join(map(printable, text.split("\n")))


def message(text: str) -> str:
    """Returns an error or a note for the terminal, its other lines indented.

    A name in it may hold line breaks. The indentation keeps what follows them from
    looking like a message of its own.
    """
    first, *others = map(_shortened, text.rstrip().split("\n"))
    indented = (line if line.startswith("  ") else f"  {line}" for line in others)
    return "\n".join([first, *indented])


def _shortened(line: str) -> str:
    shown = printable(line)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} [...]"


def json_line(value: Any) -> str:
    """Returns a value as one line of JSON, with escapes for control characters."""
    encoded = json.dumps(value, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded)


def markdown(text: str) -> str:
    """Returns a text for one line of Markdown, or a cell, that shows as it is."""
    return _MARKUP.sub(
        lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), printable(text)
    )


def markdown_code(text: str, *, in_table: bool = False) -> str:
    """Returns a text as a code span of Markdown, or as plain text where it cannot be.

    Args:
        text: Any text.
        in_table: Whether it goes into a cell, where "|" needs an escape.
    """
    if _NO_CODE.search(text) or not text.strip():
        return markdown(text)
    text = printable(text)
    return f"`{text.replace('|', chr(92) + '|') if in_table else text}`"
