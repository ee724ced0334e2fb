"""Contamination: finds texts of evaluation sets in training data.

    query of a set    "which small lizard runs along ceilings at night"
    training text     "Ask: which small lizard runs along ceilings at night?"
                   -> Match(set="geckos", side="query", id="7", is_same=False,
                            shared="which small lizard runs along ceilings at night")

A training text matches if it has the same words as an evaluation text, in any case, or
shares a run of `COMMON_WORDS` words with one. An evaluation text shorter than that is
one run, if it has at least `LEAST_WORDS` words; shorter texts recur by chance.

The rule is GPT-3's (Brown et al. 2020, appendix C: from 8 to 13 words, and 13 for long
sets). In scripts without spaces a run has the number of characters that make up that
many words (`word_rule.count`): 13 in Chinese, 26 of Japanese kana, 39 in Thai.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt64

from gecko_jax.text import word_rule

COMMON_WORDS = 13
LEAST_WORDS = 6

# The hash of a run is a polynomial in this number, with the hashes of the words as
# coefficients. An odd number has an inverse modulo 2^64, so a difference of two prefix
# sums, times a power of the inverse, does not depend on where the run begins.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 1 << 64)
# The run length that stands for whole texts.
_WHOLE = 0


@dataclasses.dataclass(frozen=True)
class Match:
    """A text of an evaluation set that occurs in a training text."""

    set: str  # name of the set
    side: str  # role of the text: query, passage, sentence or text
    id: str  # id of the text in its set, or its number
    is_same: bool  # the two texts have the same words; otherwise they share a run
    shared: str  # the shared words


def content_hash(content: str) -> int:
    """Returns a 64-bit hash that is equal for texts with the same words."""
    return _hash(" ".join(word_rule.words(content)) or content)


class Contamination:
    """The texts of evaluation sets.

    Memory is 12 bytes for each run of the sets, plus the ids of their texts.
    """

    def __init__(self):
        # Of each text: number of its set, side, id.
        self._texts: list[tuple[int, str, str]] = []
        self._sets: list[str] = []
        # Length of a run in `word_rule.units` -> (hashes of runs, index of their text).
        self._added: dict[int, list[tuple[np.ndarray, int]]] = {}
        # The same as sorted arrays; None until the next search.
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets, in the order of `add`."""
        return tuple(self._sets)

    def add(self, name: str, side: str, texts: Iterable[tuple[str, str]]) -> None:
        """Adds (id, text) pairs of a set; see `Match` for its name and side."""
        if name not in self._sets:
            self._sets.append(name)
        self._tables = None
        for identity, content in texts:
            words = word_rule.words(content)
            if not words:
                continue
            number = len(self._texts)
            self._texts.append((self._sets.index(name), side, identity))
            self._added.setdefault(_WHOLE, []).append((_hash_whole(words), number))
            runs = _Runs(words)
            if runs.length >= LEAST_WORDS * word_rule.UNITS_PER_WORD:
                length = min(runs.length, COMMON_WORDS * word_rule.UNITS_PER_WORD)
                self._added.setdefault(length, []).append((runs.hashes(length), number))

    def holds(self, content: str) -> bool:
        """Returns whether `content` matches a text of any set."""
        return next(self._matches(content), None) is not None

    def find(self, content: str) -> list[Match]:
        """Returns the best match of `content` in each set.

        An equal text comes before a shared run, and a longer run before a shorter one.
        """
        matches: dict[str, Match] = {}
        for match in self._matches(content):
            matches.setdefault(match.set, match)
        return list(matches.values())

    def _matches(self, content: str) -> Iterator[Match]:
        if self._tables is None:
            self._tables = {n: self._sort(added) for n, added in self._added.items()}
        words = word_rule.words(content)
        if not words or not self._tables:
            return
        runs = _Runs(words)
        for length in (_WHOLE, *sorted(self._tables.keys() - {_WHOLE}, reverse=True)):
            hashes = runs.hashes(length) if length else _hash_whole(words)
            known, numbers = self._tables[length]
            places = np.searchsorted(known, hashes)
            inside = np.minimum(places, len(known) - 1)
            for begin in np.flatnonzero(known[inside] == hashes).tolist():
                place = int(places[begin])
                end = runs.ends(length)[begin] if length else len(words)
                shared = " ".join(words[begin:end])
                # The table has one entry of each set for a hash.
                while place < len(known) and known[place] == hashes[begin]:
                    number, side, identity = self._texts[numbers[place]]
                    name = self._sets[number]
                    yield Match(name, side, identity, length == _WHOLE, shared)
                    place += 1

    def _sort(
        self, added: Sequence[tuple[np.ndarray, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns sorted hashes and the text of each, one for each hash and set."""
        hashes = np.concatenate([hashes for hashes, _ in added])
        numbers = np.repeat(
            np.array([number for _, number in added], np.int32),
            [len(hashes) for hashes, _ in added],
        )
        sets = np.array([text[0] for text in self._texts], np.int32)[numbers]
        order = np.lexsort((sets, hashes))
        hashes, numbers, sets = hashes[order], numbers[order], sets[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (sets[1:] != sets[:-1])
        return hashes[is_new], numbers[is_new]


def _hash(content: str) -> int:
    data = content.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_hash_word = functools.lru_cache(maxsize=1 << 20)(_hash)


def _hash_whole(words: Sequence[str]) -> UInt64[np.ndarray, " 1"]:
    return np.array([_hash(" ".join(words))], np.uint64)


class _Runs:
    """The runs of a text that have at least a given length, one from each word on."""

    def __init__(self, words: Sequence[str]):
        size = len(words)
        # numpy multiplies modulo 2^64.
        powers, self._inverses = (
            np.multiply.accumulate(np.array([1] + [factor] * size, np.uint64))
            for factor in (_FACTOR, _INVERSE)
        )
        hashes = np.array(list(map(_hash_word, words)), np.uint64)
        self._sums = np.append(np.uint64(0), np.cumsum(hashes * powers[:size]))
        self._lengths = np.append(0, np.cumsum(list(map(word_rule.units, words))))

    @property
    def length(self) -> int:
        """Length of the text, in `word_rule.units`."""
        return int(self._lengths[-1])

    def ends(self, length: int) -> Int[np.ndarray, " S"]:
        """Returns the end of each run: the first word at which it has the length."""
        ends = np.searchsorted(self._lengths, self._lengths + length)
        return ends[ends < len(self._lengths)]

    def hashes(self, length: int) -> UInt64[np.ndarray, " S"]:
        """Returns the hash of each run, equal for runs of the same words."""
        ends = self.ends(length)
        begins = np.arange(len(ends))
        return (self._sums[ends] - self._sums[begins]) * self._inverses[begins]
