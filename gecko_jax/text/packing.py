"""Packing: which texts share a row of tokens, and which rows share a call.

Encoding takes any number of texts. To keep padding and the number of compiled shapes
small, rows have a few widths (powers of two) and calls a few numbers of rows. Rows of a
training batch have one width, and `round_up` rounds their number (`data.features`).
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

# Smallest row width, in tokens. Narrower rows would save a single query a few
# milliseconds, and cost every process one more compilation.
MIN_WIDTH = 128

# A row of width W holds at most W / MIN_TEXT texts.
MIN_TEXT = 8


class Row(NamedTuple):
    """Positions of the texts that share one row of tokens."""

    width: int
    positions: list[int]


class Call(NamedTuple):
    """Rows of one width that are computed together, padded to `num_rows`."""

    num_rows: int
    rows: list[Row]


def pack(
    lengths: Sequence[int], width: int = 0, max_texts: int | None = None
) -> list[Row]:
    """Packs texts into rows by best fit, longest text first.

    A text that fits no open row opens one, whose width is the next power of two. Widths
    never grow along the returned list.

        pack([100, 20, 200]) == [Row(256, [2]), Row(128, [0, 1])]

    Args:
        lengths: Tokens of each text.
        width: Width of every row, at least the longest text; 0 for powers of two.
        max_texts: Maximum number of texts in a row; by default its width / `MIN_TEXT`.
    """
    rows: list[Row] = []
    # Open rows by the tokens they have left. Bit n of `free` is set if open_rows[n] is
    # not empty, so the tightest row is found without a search.
    open_rows: dict[int, list[Row]] = collections.defaultdict(list)
    free = 0
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    for position in order.tolist():
        length = lengths[position]
        fitting = free >> length
        if fitting:
            # The lowest set bit is the smallest sufficient space.
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                free &= ~(1 << left)
        else:
            left = width or max(MIN_WIDTH, 1 << (length - 1).bit_length())
            row = Row(left, [])
            rows.append(row)
        row.positions.append(position)
        left -= length
        most = max_texts or row.width // MIN_TEXT
        if left and len(row.positions) < most:
            open_rows[left].append(row)
            free |= 1 << left
    return rows


def lay_out(
    texts: Sequence[Any], rows: Sequence[Sequence[int]], shape: tuple[int, int]
) -> tuple[Int32[np.ndarray, "R L"], Int32[np.ndarray, "R L"]]:
    """Returns the tokens and segment ids of rows, given the positions of their texts.

    Segment ids number the texts of a row from 1. Padding is 0 in both.
    """
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, positions in enumerate(rows):
        begin = 0
        for segment, position in enumerate(positions, start=1):
            end = begin + len(texts[position])
            tokens[row, begin:end] = texts[position]
            segment_ids[row, begin:end] = segment
            begin = end
    return tokens, segment_ids


def round_up(number: int, multiple: int = 1) -> int:
    """Rounds up a number of rows, so that the batches of a run have one or two shapes.

    The result is a multiple of `multiple`, in coarse steps: the number of rows that
    random texts fill varies by about its square root, so a step has about that size (a
    sixteenth of the number from 256 rows on).
    """
    root = 1 << (max(number, 1).bit_length() - 1) // 2
    parts = -(-number // multiple)
    step = max(root // multiple, 1 << max(parts.bit_length() - 5, 0))
    return -(-parts // step) * step * multiple


def plan_calls(
    rows: Sequence[Row], tokens_per_call: int, row_multiple: int = 1
) -> list[Call]:
    """Groups rows of one width into calls of about `tokens_per_call` tokens.

    A call with fewer rows is padded to a quarter, a sixteenth, ... of the full number
    of rows, so that few shapes are compiled.
    """
    calls = []
    for width, group in itertools.groupby(rows, key=lambda row: row.width):
        full = max(tokens_per_call // width // row_multiple, 1)
        group = list(group)
        for start in range(0, len(group), full * row_multiple):
            part = group[start : start + full * row_multiple]
            num_rows = full
            while num_rows > 1 and -(-num_rows // 4) * row_multiple >= len(part):
                num_rows = -(-num_rows // 4)
            calls.append(Call(num_rows * row_multiple, part))
    return calls
