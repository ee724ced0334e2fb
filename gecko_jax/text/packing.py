"""Packing: which texts share a row of tokens, and which rows share a call.

In encoding, where texts come in any number, rows have a few widths, each a power of
two, and calls a few numbers of rows, so that hardly any padding is computed and hardly
any shape compiled. The rows of a batch of training have one width, and their number is
rounded by `round_up` (`data.features`).
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Narrowest row, in tokens. A narrower one would save a lone query some milliseconds
# and cost everything else a compilation.
MIN_WIDTH = 128

# A row of width W holds at most W / MIN_TEXT texts; shorter texts leave it emptier.
MIN_TEXT = 8


class Row(NamedTuple):
    """Texts that lie side by side in one row of tokens."""

    width: int
    positions: list[int]


class Call(NamedTuple):
    """Rows of one width that are computed together, padded to `num_rows`."""

    num_rows: int
    rows: list[Row]


def pack(
    lengths: Sequence[int], width: int = 0, max_texts: int | None = None
) -> list[Row]:
    """Puts texts into rows, longest first, each into the row it fills best.

    A text opens a row of the next power of two above its length, and later, shorter
    texts fill what it leaves. Widths of the rows never grow along the list.

        pack([100, 20, 200]) == [Row(256, [2]), Row(128, [0, 1])]

    Args:
        lengths: Tokens of each text.
        width: Of all rows, no less than the longest text; 0 for the widths above.
        max_texts: Most texts of a row; by default its width over `MIN_TEXT`.
    """
    rows: list[Row] = []
    # Open rows by the tokens they have left. Bit n of `free` says that open[n] has
    # one, so that the tightest row is found without a search.
    open_rows: dict[int, list[Row]] = collections.defaultdict(list)
    free = 0
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    for position in order.tolist():
        length = lengths[position]
        fitting = free >> length
        if fitting:
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


def round_up(number: int, multiple: int = 1) -> int:
    """Returns the next product of `multiple` and a step, about the number's root.

    The rows that random texts fill vary by about the root of their number, so numbers
    of like batches become one or two, at a sixteenth more for 256 rows and on.
    """
    root = 1 << (max(number, 1).bit_length() - 1) // 2
    parts = -(-number // multiple)
    step = max(root // multiple, 1 << max(parts.bit_length() - 5, 0))
    return -(-parts // step) * step * multiple


def plan_calls(
    rows: Sequence[Row], tokens_per_call: int, row_multiple: int = 1
) -> list[Call]:
    """Groups rows of one width into calls of about `tokens_per_call` tokens.

    A call that is not full is padded to a quarter of the full number of rows, or a
    sixteenth and so on, so that few shapes are compiled.
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
