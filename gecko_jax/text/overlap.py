"""Contamination: texts of evaluation sets, known again in training data.

    query of a set    "which small lizard runs along ceilings at night"
    training text     "Ask: which small lizard runs along ceilings at night?"
                   -> Match(set="geckos", side="query", id="7", is_same=False,
                            shared="which small lizard runs along ceilings at night")

A text is known when its words are those of one of a set, whatever their case; or when
it shares a run of `COMMON_WORDS` words with one. Evaluation texts shorter than that
count as one run, from `LEAST_WORDS` words on: shorter ones are shared by chance.

The run is GPT-3's (Brown et al. 2020, appendix C: from 8 to 13 words, and 13 for long
sets). In scripts without spaces a run has as many characters as make that many words
(`words.count`): 13 in Chinese, 26 of Japanese kana, 39 in Thai.
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

# A run is known by the sum of its words' hashes, each times a power of this number by
# its place. An odd number has an inverse modulo 2^64, so that a difference of two sums
# over the text is that of a run wherever it begins.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 1 << 64)
# The "length" under which whole texts are kept.
_WHOLE = 0


@dataclasses.dataclass(frozen=True)
class Match:
    """A text of an evaluation set that a training text holds.

    Attributes:
        set: Name of the set.
        side: What it is there: query, passage, sentence or text.
        id: Its id there, or its number.
        is_same: The two are the same; else they share a run of words.
        shared: The words that they share.
    """

    set: str
    side: str
    id: str
    is_same: bool
    shared: str


def content_hash(content: str) -> int:
    """Returns 64 bits by which texts of the same words are known."""
    return _hash(" ".join(word_rule.words(content)) or content)


class Contamination:
    """The texts of evaluation sets.

    Memory is 12 bytes for each run of words of the sets, and the ids of their texts.
    """

    def __init__(self):
        """Starts without a set; `find` then finds nothing."""
        self._texts: list[tuple[int, str, str]] = []
        self._sets: list[str] = []
        # Length of a run in `words.units` -> (hashes of runs, the text they are of).
        self._added: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets, in the order they were added."""
        return tuple(self._sets)

    def add(self, name: str, side: str, texts: Iterable[tuple[str, str]]) -> None:
        """Adds (id, text) of a set; see `Match` for its name and side."""
        if name not in self._sets:
            self._sets.append(name)
        self._tables = None
        for identity, content in texts:
            found = word_rule.words(content)
            if not found:
                continue
            number = len(self._texts)
            self._texts.append((self._sets.index(name), side, identity))
            self._keep(_WHOLE, _whole(found), number)
            runs = _Runs(found)
            if runs.length >= LEAST_WORDS * word_rule.UNITS_PER_WORD:
                length = min(runs.length, COMMON_WORDS * word_rule.UNITS_PER_WORD)
                self._keep(length, runs.hashes(length), number)

    def holds(self, content: str) -> bool:
        """Whether `content` is or shares a text of any set."""
        return next(self._matches(content), None) is not None

    def find(self, content: str) -> list[Match]:
        """Returns one match for each set that `content` is or shares a text of.

        An equal text goes before a shared run, and a longer run before a shorter one.
        """
        found: dict[str, Match] = {}
        for match in self._matches(content):
            found.setdefault(match.set, match)
        return list(found.values())

    def _keep(self, length: int, hashes: UInt64[np.ndarray, " S"], number: int) -> None:
        self._added.setdefault(length, []).append((hashes, number))

    def _matches(self, content: str) -> Iterator[Match]:
        if self._tables is None:
            self._tables = {n: self._sort(added) for n, added in self._added.items()}
        found = word_rule.words(content)
        if not found or not self._tables:
            return
        runs = _Runs(found)
        for length in (_WHOLE, *sorted(self._tables.keys() - {_WHOLE}, reverse=True)):
            hashes = runs.hashes(length) if length else _whole(found)
            known, numbers = self._tables[length]
            places = np.searchsorted(known, hashes)
            inside = np.minimum(places, len(known) - 1)
            for begin in np.flatnonzero(known[inside] == hashes).tolist():
                place = int(places[begin])
                end = runs.ends(length)[begin] if length else len(found)
                shared = " ".join(found[begin:end])
                while place < len(known) and known[place] == hashes[begin]:
                    number, side, identity = self._texts[numbers[place]]
                    name = self._sets[number]
                    yield Match(name, side, identity, length == _WHOLE, shared)
                    place += 1

    def _sort(
        self, added: Sequence[tuple[np.ndarray, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns hashes in order and the text of each, one for each set."""
        hashes = np.concatenate([hashes for hashes, _ in added])
        numbers = np.repeat(
            np.array([number for _, number in added], np.int32),
            [len(hashes) for hashes, _ in added],
        )
        of_set = np.array([text[0] for text in self._texts], np.int32)[numbers]
        order = np.lexsort((of_set, hashes))
        hashes, numbers, of_set = hashes[order], numbers[order], of_set[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (of_set[1:] != of_set[:-1])
        return hashes[is_new], numbers[is_new]


@functools.lru_cache(maxsize=1 << 20)
def _hash_word(word: str) -> int:
    return _hash(word)


def _hash(content: str) -> int:
    data = content.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _whole(found: Sequence[str]) -> UInt64[np.ndarray, " 1"]:
    return np.array([_hash(" ".join(found))], np.uint64)


class _Runs:
    """The runs of a text that have at least some length, one from each word on."""

    def __init__(self, found: Sequence[str]):
        size = len(found)
        # Numpy multiplies modulo 2^64.
        powers, inverses = (
            np.multiply.accumulate(np.array([1] + [factor] * size, np.uint64))
            for factor in (_FACTOR, _INVERSE)
        )
        hashes = np.array([_hash_word(word) for word in found], np.uint64)
        self._inverses = inverses
        self._sums = np.append(np.uint64(0), np.cumsum(hashes * powers[:size]))
        self._lengths = np.append(
            0, np.cumsum([word_rule.units(word) for word in found])
        )

    @property
    def length(self) -> int:
        """Length of the text, in `words.units`."""
        return int(self._lengths[-1])

    def ends(self, length: int) -> Int[np.ndarray, " S"]:
        """Returns where the runs end, each at the first word that makes it so long."""
        ends = np.searchsorted(self._lengths, self._lengths + length)
        return ends[ends < len(self._lengths)]

    def hashes(self, length: int) -> UInt64[np.ndarray, " S"]:
        """Returns the hashes of the runs, equal for runs of the same words."""
        ends = self.ends(length)
        begins = np.arange(len(ends))
        return (self._sums[ends] - self._sums[begins]) * self._inverses[begins]
