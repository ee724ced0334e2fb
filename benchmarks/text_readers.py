"""Readers of the file formats of packages, for `text.py`.

Each reader yields rows: a query, or "" where the text has none, and a passage. The
query is a heading, the head of a dictionary entry, or the lemmas of a WordNet synset.
"""

from __future__ import annotations

import fnmatch
import gzip
import html
import json
import pathlib
import random
import re
import struct
import zlib
from collections.abc import Iterator, Sequence

# A passage: longer ones are cut at sentences, shorter ones say too little.
LONGEST = 900
SHORTEST = 20
# Larger files are indexes and tables, not prose; in bytes.
LARGEST = 3_000_000
_TAG = re.compile(r"<[^>]+>")
_BLOCK = re.compile(
    r"<(h[1-6]|p|li|dt|dd|figcaption|td)\b[^>]*>(.*?)"
    r"(?=</\1>|<(?:h[1-6]|p|li|dt|dd|ul|ol|div|table|pre|td)\b)",
    re.DOTALL | re.IGNORECASE,
)
_DROPPED = re.compile(
    r"<(script|style|pre|nav|head|footer|aside)\b.*?</\1>|<!--.*?-->",
    re.DOTALL | re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(“‘]?[A-Z0-9])")

Row = tuple[str, str]  # query (or ""), passage


def read_package(
    folder: pathlib.Path, reader: str, skip: Sequence[str]
) -> Iterator[Row]:
    """Yields the rows of an unpacked package.

    Args:
        folder: The package.
        reader: Format to read: html, json, rdb, wordnet or dictd.
        skip: Patterns of paths that are left out.
    """
    if reader == "html":
        for content in contents(folder, ("*.html", "*.xhtml", "*.htm"), skip):
            if len(content) <= LARGEST // 10:
                yield from html_rows(content)
    elif reader == "json":
        for content in contents(folder, ("*.json",), skip):
            try:
                yield from json_rows(json.loads(content))
            except ValueError:
                continue
    elif reader == "rdb":
        yield from r_rows(folder)
    elif reader == "wordnet":
        yield from wordnet_rows(folder)
    elif reader == "dictd":
        for content in contents(folder, ("*.dict.dz",), skip):
            yield from dictd_rows(content)
    else:
        raise ValueError(f"reader {reader!r}: unknown; use html, json, rdb, wordnet")


def contents(
    folder: pathlib.Path,
    patterns: Sequence[str],
    skip: Sequence[str] = (),
    most: int = 4_000,
    largest: int = LARGEST,
) -> Iterator[str]:
    """Yields the text of the files whose paths match a pattern, in random order.

    Args:
        folder: Folder that is searched.
        patterns: Patterns of paths that are read.
        skip: Patterns of paths that are left out.
        most: Largest number of files.
        largest: Size of the largest file, in bytes.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    selected = [n for n in names if matches(n, patterns) and not matches(n, skip)]
    random.Random(0).shuffle(selected)
    for name in selected[:most]:
        path = names[name]
        if path.stat().st_size > largest:
            continue
        content = path.read_bytes()
        if name.endswith((".gz", ".dz")):
            content = gzip.decompress(content)
        yield content.decode("utf-8", "replace")


def tidy(text: str) -> str:
    """Returns a text on one line, without markup."""
    return " ".join(html.unescape(_TAG.sub("", text)).replace("¶", "").split())


def is_prose(text: str) -> bool:
    """Whether a passage is English prose more than anything else."""
    words = text.split()
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return (
        len(text) >= SHORTEST
        and len(words) >= 4
        and letters >= 0.8 * len(text)
        and max(map(len, words)) <= 40
    )


def cut(text: str) -> Iterator[str]:
    """Yields a long passage in parts that end at sentences."""
    part = ""
    for sentence in _SENTENCE.split(text):
        if part and len(part) + len(sentence) > LONGEST:
            yield part
            part = ""
        part = f"{part} {sentence}".strip()[: 2 * LONGEST]
    if part:
        yield part


def passages(text: str) -> Iterator[str]:
    """Yields the passages of a text that are prose."""
    for part in cut(tidy(text)):
        if is_prose(part):
            yield part


def html_rows(content: str) -> Iterator[Row]:
    """Yields paragraphs; the first under a heading has it for its query."""
    content = _DROPPED.sub(" ", content)
    title = tidy((re.search(r"<h1[^>]*>(.*?)</h1>", content, re.DOTALL) or [""] * 2)[1])
    pending = title
    for match in _BLOCK.finditer(content):
        tag, text = match[1].lower(), tidy(match[2])
        if tag[0] == "h":
            pending = re.sub(r"^[\d.]+\s+", "", text)
            continue
        if tag == "dt":
            pending = text
            continue
        for part in passages(text):
            query = pending if 3 <= len(pending) <= 120 else ""
            yield query, part
            pending = ""


def paragraph_rows(content: str) -> Iterator[Row]:
    """Yields the paragraphs of plain text."""
    for block in re.split(r"\n\s*\n", content):
        for part in passages(block):
            yield "", part


def json_rows(value: object) -> Iterator[Row]:
    """Yields the longer strings of a JSON value."""
    if isinstance(value, str):
        yield from (("", part) for part in passages(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from json_rows(item)
    elif isinstance(value, list):
        for item in value:
            yield from json_rows(item)


def r_rows(folder: pathlib.Path) -> Iterator[Row]:
    """Yields paragraphs of the character vectors of an R package's lazy-load data."""
    for path in folder.rglob("Rdata.rdb"):
        content = path.read_bytes()
        start = 0
        while start + 5 <= len(content):
            inflate = zlib.decompressobj()
            # A chunk: its length in 4 bytes, big-endian, then a zlib stream.
            try:
                data = inflate.decompress(content[start + 4 :])
            except zlib.error:
                start += 1
                continue
            start = len(content) - len(inflate.unused_data)
            lines = []
            # CHARSXP: flags ending in 09, a length, the bytes.
            for match in re.finditer(rb"\x00\x04\x00\x09(....)", data, re.DOTALL):
                (length,) = struct.unpack(">i", match[1])
                text = data[match.end() : match.end() + max(length, 0)]
                lines.append(text.decode("utf-8", "replace"))
            yield from paragraph_rows("\n".join(lines))


def wordnet_rows(folder: pathlib.Path) -> Iterator[Row]:
    """Yields lemmas with their gloss, and the examples."""
    # The nouns and the adjectives are larger files than prose has.
    for content in contents(folder, ("*wordnet/data.*",), largest=30_000_000):
        for line in content.splitlines():
            if line.startswith(" ") or "|" not in line:
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            lemmas = [fields[4 + 2 * n].split("(")[0] for n in range(count)]
            query = ", ".join(lemma.replace("_", " ") for lemma in lemmas)
            parts = re.split(r";\s+(?=\")", gloss.strip())
            yield query, parts[0]
            for example in parts[1:]:
                example = example.strip('"; ')
                if len(example.split()) >= 3:
                    yield "", example


def dictd_rows(content: str) -> Iterator[Row]:
    """Yields the entries of a dictionary: a headword, then indented text."""
    for block in re.split(r"\n(?=\S)", content):
        head, _, body = block.partition("\n")
        match = re.match(r":?([^:,\n]{2,60})[:,](.*)", head)
        if match:
            for part in passages(f"{match[2]} {body}"):
                yield tidy(match[1]), part
                break
