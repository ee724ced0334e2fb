"""Batches of requests with few distinct shapes.

Requests whose prompts begin alike, with few-shot examples, form a *family*. Its common
*prefix* is read once. The rest is cut into batches of similar length, padded to one of
a few lengths and a power of two of rows, so that few shapes are compiled.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gecko_jax.models import transformer

# Prompts that share this many first tokens form a family if there are enough of them
# to pay for a call.
FAMILY_TOKENS = 16
FAMILY_SIZE = 4

# Shortest padded length; above it, at most a fifth of a row is padding.
SHORTEST = 16

PREFIX_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to score or continue, as tokens."""

    prompt: list[int]
    fed: list[int]  # read after the prompt
    targets: list[list[int]]  # to score after each of the last `len(targets)`

    @property
    def read(self) -> list[int]:
        """All tokens that are read."""
        return self.prompt + self.fed

    @property
    def ends(self) -> tuple[int, int]:
        """Start and stop of the tokens after which targets are scored."""
        return len(self.read) - len(self.targets), len(self.read)


class Answer(NamedTuple):
    """Place of an answer: host request, rows and columns of its targets."""

    host: int
    rows: slice
    columns: slice


def merge(requests: Sequence[Request]) -> tuple[list[Request], list[Answer]]:
    """Answers a request whose tokens begin those of another while reading the other.

    Returns the requests that remain, in their order, all with equally many targets per
    position; and where the answer to each of `requests` is.
    """
    reads = [request.read for request in requests]
    # All that begin with A follow A in sorted order, so A begins its successor or none.
    order = sorted(range(len(requests)), key=lambda number: (reads[number], -number))
    groups: dict[int, list[int]] = {}
    host = order[-1] if order else 0
    for number in reversed(order):
        if reads[host][: len(reads[number])] != reads[number]:
            host = number
        groups.setdefault(host, []).append(number)
    merged, answers = [], {}
    for position, (number, members) in enumerate(sorted(groups.items())):
        prompt = min((requests[member].prompt for member in members), key=len)
        first = min(requests[member].ends[0] for member in members)
        used = [0] * (len(reads[number]) - first)
        for member in members:
            # Members that score the same position have columns of their own.
            start, stop = (end - first for end in requests[member].ends)
            left = max(used[start:stop])
            right = left + len(requests[member].targets[0])
            used[start:stop] = [right] * (stop - start)
            answers[member] = Answer(position, slice(start, stop), slice(left, right))
        targets = np.zeros((len(used), max(used)), np.int32)
        for member in members:
            _, rows, columns = answers[member]
            targets[rows, columns] = requests[member].targets
        suffix = reads[number][len(prompt) :]
        merged.append(Request(prompt, suffix, targets.tolist()))
    width = max((len(request.targets[0]) for request in merged), default=0)
    for row in itertools.chain.from_iterable(request.targets for request in merged):
        row.extend([0] * (width - len(row)))
    return merged, [answers[number] for number in range(len(requests))]


class Batch(NamedTuple):
    """Indices of requests, their prefix, and the padded shape."""

    requests: list[int]
    prefix: tuple[int, ...]
    length: int
    num_rows: int


def families(prompts: Sequence[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Groups the indices of prompts by their common prefix; `()` holds the rest.

    A prefix leaves at least one token of every prompt, whose hidden state is needed.
    """
    heads: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        heads.setdefault(tuple(prompt[:FAMILY_TOKENS]), []).append(number)
    groups: dict[tuple[int, ...], list[int]] = {}
    for members in heads.values():
        # The first and last prompt in sorted order share what all of them share.
        alike = [prompts[n] for n in members]
        pairs = zip(min(alike), max(alike), strict=False)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        shared = [token for token, _ in equal][: min(map(len, alike)) - 1]
        pays = len(members) >= FAMILY_SIZE and len(shared) >= FAMILY_TOKENS // 2
        groups.setdefault(tuple(shared) if pays else (), []).extend(members)
    return groups


def round_up(length: int) -> int:
    """Returns the next of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ..."""
    if length <= SHORTEST:
        return SHORTEST
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def split(
    requests: Sequence[Request],
    families: Mapping[tuple[int, ...], Sequence[int]],
    tokens_per_call: int,
    row_multiple: int,
    call_cost: int,
) -> Iterator[Batch]:
    """Yields batches of similar length within each family, the longest first.

    The cut of the sorted requests is the one with the least total cost, where padding
    costs as much as text, and a batch `call_cost` tokens. A batch has at most
    `tokens_per_call`, unless one row is longer, and a multiple of `row_multiple` rows:
    of the devices that share them.
    """
    for prefix, members in families.items():
        lengths = {n: len(requests[n].read) - len(prefix) for n in members}
        order = sorted(members, key=lambda number: (-lengths[number], number))
        rounded = [round_up(lengths[number]) for number in order]
        start = 0
        for num_rows in _cut(rounded, tokens_per_call, row_multiple, call_cost):
            numbers = order[start : start + num_rows]
            yield Batch(numbers, prefix, rounded[start], num_rows)
            start += len(numbers)


def _cut(
    lengths: Sequence[int], tokens_per_call: int, row_multiple: int, call_cost: int
) -> Iterator[int]:
    """Yields the rows of each batch at the least total cost, by dynamic programming.

    `lengths` descend, and a batch has the length of its first row; see `split`.
    """
    count = len(lengths)
    # Per first row: the least cost of the rest, and the rows of the batch that begins.
    best = [(0, 0)] * (count + 1)
    for start in range(count - 1, -1, -1):
        choices = []
        num_rows = row_multiple
        while not choices or num_rows * lengths[start] <= tokens_per_call:
            cost = num_rows * lengths[start] + call_cost
            choices.append((cost + best[min(start + num_rows, count)][0], num_rows))
            if start + num_rows >= count:
                break
            num_rows *= 2
        best[start] = min(choices)
    start = 0
    while start < count:
        yield best[start][1]
        start += best[start][1]


def rows(
    batch: Batch, requests: Sequence[Request]
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Returns tokens and positions of the rows after their prefix."""
    tokens = np.zeros((batch.num_rows, batch.length), np.int32)
    positions = np.full_like(tokens, transformer.PAD_POSITION)
    positions[:, 0] = len(batch.prefix)  # Padding rows need a token, too.
    for row, number in enumerate(batch.requests):
        suffix = requests[number].read[len(batch.prefix) :]
        tokens[row, : len(suffix)] = suffix
        positions[row, : len(suffix)] = len(batch.prefix) + np.arange(len(suffix))
    return tokens, positions


def questions(
    batch: Batch, requests: Sequence[Request]
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"], Int[np.ndarray, "T Y"]]:
    """Returns row, column and targets of every scored position, padded by the first."""
    places = [
        (row, column - len(batch.prefix))
        for row, number in enumerate(batch.requests)
        for column in range(*requests[number].ends)
    ]
    targets = [t for number in batch.requests for t in requests[number].targets]
    padding = round_up(len(places)) - len(places)
    row, column = np.array(places + [(0, 0)] * padding, np.int32).T
    return row, column, np.array(targets + targets[:1] * padding, np.int32)
