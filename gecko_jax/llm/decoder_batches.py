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

from gecko_jax.models import transformer

# Prompts that begin with the same so many tokens are a family, if it is large enough
# to pay for a call of its own.
FAMILY_TOKENS = 16
FAMILY_SIZE = 4

# The least length; above it a fifth is padding at worst.
SHORTEST = 16

PREFIX_MULTIPLE = 64


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
    """Returns the next of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ..."""
    if length <= SHORTEST:
        return SHORTEST
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def round_up_prefix(length: int) -> int:
    """Returns the next multiple of 64: prefixes are few, and read by all."""
    return -(-length // PREFIX_MULTIPLE) * PREFIX_MULTIPLE


def split(
    requests: Sequence[Request],
    families: Mapping[tuple[int, ...], Sequence[int]],
    tokens_per_call: int,
    row_multiple: int,
    call_cost: int,
) -> Iterator[Batch]:
    """Yields batches of like length within a family, the longest first.

    Of all ways to cut the sorted requests it is the one that costs least, padding
    counted like text.

    Args:
        requests: All of a call.
        families: Of the prompts.
        tokens_per_call: Rows times length, at most, unless a row is longer.
        row_multiple: Divides the number of rows: devices they are split over.
        call_cost: What a batch costs beside its rows times length, in tokens.
    """
    for prefix, members in families.items():
        lengths = {
            number: len(requests[number].prompt)
            + len(requests[number].fed)
            - len(prefix)
            for number in members
        }
        order = sorted(members, key=lambda number: (-lengths[number], number))
        rounded = [round_up(lengths[number]) for number in order]
        start = 0
        for num_rows in _cut(rounded, tokens_per_call, row_multiple, call_cost):
            taken = order[start : start + num_rows]
            yield Batch(taken, prefix, rounded[start], num_rows)
            start += len(taken)


def _cut(
    lengths: Sequence[int], tokens_per_call: int, row_multiple: int, call_cost: int
) -> Iterator[int]:
    """Yields the rows of one batch after the other, at the least cost of all.

    Args:
        lengths: Of the rows, the longest first; a batch has that of its first.
        tokens_per_call: As in `split`.
        row_multiple: As in `split`.
        call_cost: As in `split`.
    """
    count = len(lengths)
    # From each row on: the least cost, and the rows of the batch that begins there.
    best = [(0, 0)] * (count + 1)
    for start in range(count - 1, -1, -1):
        choices = []
        num_rows = row_multiple
        while True:
            cost = num_rows * lengths[start] + call_cost
            choices.append((cost + best[min(start + num_rows, count)][0], num_rows))
            num_rows *= 2
            is_full = num_rows * lengths[start] > tokens_per_call
            if is_full or start + num_rows // 2 >= count:
                break
        best[start] = min(choices)
    start = 0
    while start < count:
        num_rows = best[start][1]
        yield num_rows
        start += num_rows


def rows(
    batch: Batch, requests: Sequence[Request]
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Returns tokens and positions of the rows, behind their prefix."""
    tokens = np.zeros((batch.num_rows, batch.length), np.int32)
    positions = np.full_like(tokens, transformer.PAD_POSITION)
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
