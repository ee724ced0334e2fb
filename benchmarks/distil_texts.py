"""Texts and tokens for `distil.py`."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import pathlib
import re
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

if typing.TYPE_CHECKING:
    from jaxtyping import Int

# Longest text that the student reads, in tokens.
LENGTH = 256
EOS = 1
# Longest part of a passage that the teacher reads, in characters.
OPENING = 400
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(“‘]?[A-Z0-9])")
# Signs around a word, and at the end of a text, in `other_form`.
_SIGNS = ('"{}"', "'{}'", "({})", "#{}", "“{}”", "`{}`")
_ENDS = ("", "", ".", "!", "?", ":", "...")
_START = time.monotonic()


def say(*words: object) -> None:
    """Prints with the seconds since the start."""
    print(f"[{time.monotonic() - _START:6.1f}]", *words, flush=True)


def load_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of `text.py`: a passage (`t`), often a query (`q`)."""
    with lzma.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def texts_of(rows: Iterable[dict[str, str]], spans: int) -> list[str]:
    """Returns distinct texts for the teacher: any first part of the list is a sample.

    They are queries, the openings of passages, sentences, and spans of 1 to 12 words of
    a sentence, as short as the queries of a search. The order is random, but short
    texts tend to come first, because the teacher needs less time for them. Two keep
    their order if more rows are added.

    Args:
        rows: Rows of `text.py`.
        spans: Number of spans of a sentence.
    """
    texts: set[str] = set()
    for row in rows:
        texts.add(row.get("q", "."))
        texts.add(opening(row["t"]))
        for sentence in _SENTENCE.split(row["t"]):
            if len(sentence) > 12:
                texts.add(opening(sentence))
                texts.update(spans_of(sentence, spans))

    def place(text: str) -> tuple[float, str]:
        return random_number(text) * (80 + len(text)), text

    return sorted(texts, key=place)


def opening(text: str) -> str:
    """Returns the first sentences of a text, at least a part of the first."""
    part = ""
    for sentence in _SENTENCE.split(text):
        if part and len(part) + len(sentence) >= OPENING:
            break
        part = f"{part} {sentence}".strip()
    return part if len(part) <= OPENING else part[:OPENING].rpartition(" ")[0]


def spans_of(sentence: str, number: int) -> Iterator[str]:
    """Yields random runs of the words of a sentence, the same ones in every run."""
    words = sentence.split()
    for one in range(number):
        length = 1 + int(12 * random_number(f"{one} length {sentence}"))
        free = max(0, len(words) - length) + 1
        start = int(free * random_number(f"{one} start {sentence}"))
        yield " ".join(words[start : start + length])


def other_form(text: str) -> str:
    """Returns a text in another letter case, with other punctuation.

    It is in title case, lower case or, seldom, upper case. In half of the texts, a word
    of eight gets quotes, brackets or a hash sign: the vocabulary spells a word that
    follows a sign with other pieces than a word that follows a space. The last sign
    changes or goes.
    """
    number = random_number(f"case {text}")
    if number < 0.4:
        text = " ".join(word[:1].upper() + word[1:] for word in text.split(" "))
    else:
        text = text.lower() if number < 0.9 else text.upper()
    number = random_number(f"signs {text}")
    if number < 0.5:
        return text
    words = text.rstrip(".!?:").split(" ")
    for place in range(0, len(words), 8):
        place += int(random_number(f"word {place} {text}") * min(8, len(words) - place))
        if words[place].isalnum():
            sign = _SIGNS[int(random_number(f"sign {place} {text}") * len(_SIGNS))]
            words[place] = sign.format(words[place])
    return " ".join(words) + _ENDS[int((number - 0.5) * 2 * len(_ENDS))]


def random_number(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48
    )


def tokenize(vocabulary: Any, texts: Sequence[str]) -> list[Int[np.ndarray, " L"]]:
    """Returns the token ids of each text, cut to `LENGTH`, with EOS last."""
    rows = []
    for place in range(0, len(texts), 100_000):
        block = texts[place : place + 100_000]
        ids = vocabulary.EncodeAsIds(list(block), num_threads=os.cpu_count() or 1)
        rows += [np.array([*row[: LENGTH - 1], EOS], np.uint16) for row in ids]
    return rows
