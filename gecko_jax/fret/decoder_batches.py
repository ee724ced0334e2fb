"""Batches of requests: what they share, their lengths and their shapes.

Requests whose prompts begin alike are a *family*; what all of it begins with is the
*prefix*, which is read once. What is left is cut into batches of like length, padded to
one of a few lengths and a power of two of rows, so that few shapes are compiled.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gecko_jax.fret import decoder

# Prompts that begin with the same so many tokens are a family, if it is large enough
# to pay for a call of its own.
FAMILY_TOKENS = 16
FAMILY_SIZE = 4

# The least length; above it a third is padding at worst.
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, what is fed after it, and what is asked at the last of these tokens."""

    prompt: list[int]
    fed: list[int]
    targets: list[list[int]]


class Batch(NamedTuple):
    """Requests by number, and how many of their first tokens are in the prefix."""

    requests: list[int]
    prefix: tuple[int, ...]
    length: int
    num_rows: int


def families(prompts: Sequence[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Groups prompts by the tokens they begin with: what they share -> their numbers.

    Of every prompt at least one token is left, whose hidden state is needed. Those
    without a family share nothing, `()`.
    """
    heads: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        heads.setdefault(tuple(prompt[:FAMILY_TOKENS]), []).append(number)
    found: dict[tuple[int, ...], list[int]] = {}
    for members in heads.values():
        # What the first and the last in order share, all between them share.
        first = min(prompts[n] for n in members)
        last = max(prompts[n] for n in members)
        pairs = zip(first, last, strict=False)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        shared = [token for token, _ in alike]
        shared = shared[: min(len(prompts[n]) for n in members) - 1]
        pays = len(members) >= FAMILY_SIZE and len(shared) >= FAMILY_TOKENS // 2
        found.setdefault(tuple(shared) if pays else (), []).extend(members)
    return found


def round_up(length: int) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ..."""
    if length <= SHORTEST:
        return SHORTEST
    power = 1 << (length - 1).bit_length()
    return 3 * power // 4 if length <= 3 * power // 4 else power


def split(
    requests: Sequence[Request],
    families: Mapping[tuple[int, ...], Sequence[int]],
    tokens_per_call: int,
    row_multiple: int,
) -> Iterator[Batch]:
    """Yields batches of like length within a family, the longest first.

    Args:
        requests: All of a call.
        families: Of the prompts.
        tokens_per_call: Rows times length, at most, unless a row is longer.
        row_multiple: Divides the number of rows: devices they are split over.
    """
    for prefix, members in families.items():
        lengths = {
            number: len(requests[number].prompt)
            + len(requests[number].fed)
            - len(prefix)
            for number in members
        }
        order = sorted(members, key=lambda number: (-lengths[number], number))
        while order:
            length = round_up(lengths[order[0]])
            most = max(tokens_per_call // length // row_multiple, 1)
            most = row_multiple << (most.bit_length() - 1)
            taken, order = order[:most], order[most:]
            parts = -(-len(taken) // row_multiple)
            num_rows = row_multiple << (parts - 1).bit_length()
            yield Batch(taken, prefix, length, num_rows)


def rows(
    batch: Batch, requests: Sequence[Request]
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Returns tokens and positions of the rows, behind their prefix."""
    tokens = np.zeros((batch.num_rows, batch.length), np.int32)
    positions = np.full_like(tokens, decoder.PAD_POSITION)
    # A row that only fills the batch has a token too.
    positions[:, 0] = len(batch.prefix)
    for row, number in enumerate(batch.requests):
        request = requests[number]
        rest = (request.prompt + request.fed)[len(batch.prefix) :]
        tokens[row, : len(rest)] = rest
        positions[row, : len(rest)] = len(batch.prefix) + np.arange(len(rest))
    return tokens, positions


def questions(
    batch: Batch, requests: Sequence[Request]
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"], Int[np.ndarray, "T Y"]]:
    """Returns row, column and targets of every position that is asked about.

    They are padded with the first.
    """
    places = [
        (row, len(request.prompt) + len(request.fed) - len(batch.prefix) - back)
        for row, request in enumerate(requests[n] for n in batch.requests)
        for back in range(len(request.targets), 0, -1)
    ]
    targets = [t for number in batch.requests for t in requests[number].targets]
    padding = round_up(len(places)) - len(places)
    row, column = np.array(places + [(0, 0)] * padding, np.int32).T
    targets = np.array(targets + targets[:1] * padding, np.int32)
    return row, column, targets
