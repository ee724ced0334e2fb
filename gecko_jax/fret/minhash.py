"""MinHash, which finds near-duplicate texts without comparing all pairs.

The *resemblance* of two texts is the Jaccard similarity of their sets of shingles, runs
of `SHINGLE_WORDS` words. A signature holds, for each of `SIZE` hash functions, the
smallest hash of a text's shingles. The share of equal entries estimates the resemblance
with a standard error of at most 1 / (2 sqrt(SIZE)). Only texts that agree in a whole
band of entries are compared, which misses hardly any pair above 0.75.

This is not a library's MinHash because signatures must never change between versions:
which passages are dropped decides all later records.
"""

import hashlib

import numpy as np
from jaxtyping import UInt32, UInt64

from gecko_jax.text import word_rule

SHINGLE_WORDS = 3
SIZE = 128
_BANDS, _ROWS = 16, 8

_rng = np.random.Generator(np.random.PCG64(20240329))
_FACTORS = _rng.integers(1, 1 << 32, SIZE, dtype=np.uint64)
_OFFSETS = _rng.integers(0, 1 << 32, SIZE, dtype=np.uint64)


def shingles(words: list[str]) -> UInt64[np.ndarray, " S"]:
    """Returns the hashes of a text's shingles; a shorter text is one shingle."""
    count = max(len(words) - SHINGLE_WORDS + 1, 1)
    runs = {" ".join(words[begin : begin + SHINGLE_WORDS]) for begin in range(count)}
    digests = b"".join(
        hashlib.blake2b(run.encode(), digest_size=8).digest() for run in sorted(runs)
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def signature(hashes: UInt64[np.ndarray, " S"]) -> UInt32[np.ndarray, " H"]:
    """Returns the smallest value of each hash function over the shingles."""
    low = hashes & np.uint64(0xFFFFFFFF)
    # Multiply and shift, modulo 2^64: the high half is the hash.
    mixed = low[:, None] * _FACTORS[None, :] * np.uint64(0x9E3779B97F4A7C15)
    mixed += _OFFSETS[None, :] * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)


def text_signature(text: str) -> UInt32[np.ndarray, " H"]:
    """Returns the signature of a text."""
    return signature(shingles(word_rule.words(text)))


def resemblance(
    first: UInt32[np.ndarray, " H"], second: UInt32[np.ndarray, " H"]
) -> float:
    """Returns the share of equal entries."""
    return float(np.mean(first == second))


def bands(entries: UInt32[np.ndarray, " H"]) -> list[bytes]:
    """Returns the keys of a signature; texts that share no key are not compared."""
    rows = entries.reshape(_BANDS, _ROWS)
    return [bytes([band]) + rows[band].tobytes() for band in range(_BANDS)]


class NearDuplicates:
    """An index of signatures; duplicates have at least the resemblance `threshold`."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._signatures: list[UInt32[np.ndarray, " H"]] = []
        self._bands: dict[bytes, list[int]] = {}

    def add(self, text: str) -> int | None:
        """Returns the number of a text that resembles this one, or adds this one."""
        seen: set[int] = set()
        entries = text_signature(text)
        for key in bands(entries):
            for number in self._bands.get(key, ()):
                if number not in seen:
                    seen.add(number)
                    same = resemblance(self._signatures[number], entries)
                    if same >= self._threshold:
                        return number
        for key in bands(entries):
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(entries)
        return None
