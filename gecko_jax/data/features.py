"""Feature conversion: the examples of a step become the arrays the model reads.

Two examples with one negative each, `query_length=passage_length=8`, numbers being
tokens and `1` the end of a text:

    query 5 6 1   positive 7 8 9 1   negative 4 1
    query 2 1     positive 3 3 1     negative 8 8 8 1

    unpacked                              packed
    query_tokens   5 6 1 0 0 0 0 0        query_tokens   5 6 1 2 1 0 0 0
                   2 1 0 0 0 0 0 0
    passage_tokens 7 8 9 1 0 0 0 0        passage_tokens 7 8 9 1 8 8 8 1
                   3 3 1 0 0 0 0 0                       3 3 1 4 1 0 0 0
                   4 1 0 0 0 0 0 0
                   8 8 8 1 0 0 0 0

`*_segment_ids` numbers the texts of a row from 1, with 0 for padding, and `*_index`
says in which row and segment (from 0) each text lies: first the positives, then the
negatives, example by example. Packing moves texts only; it never cuts or drops one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from gecko_jax import vocabulary

# Texts that may share a row. The model pools each segment of every row, so a large
# number costs memory for rows that hold few texts.
MAX_SEGMENTS = 16

# Row counts are rounded up to this many parts of the unpacked count, so that a run
# compiles a few shapes and not one for each step.
_ROW_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized example; its token arrays end in EOS and are not yet trimmed."""

    query: np.ndarray
    positive: np.ndarray
    negatives: tuple[np.ndarray, ...]
    query_id: np.ndarray
    passage_id: np.ndarray
    negative_ids: np.ndarray
    negative_group: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a batch.

    Attributes:
        query_length: Tokens kept of a query, EOS included.
        passage_length: Tokens kept of a passage, EOS included.
        num_negatives: Hard negatives per query (G).
        packing: Several texts share a row; both sides then have rows of the longer
            of the two lengths.
        row_multiple: Row counts are multiples of it: the devices that share a batch.
        teacher_dim: Width of a teacher's vectors (T); 0 without.
    """

    query_length: int
    passage_length: int
    num_negatives: int = 0
    packing: bool = False
    row_multiple: int = 1
    teacher_dim: int = 0


def trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """Keeps the first `length` tokens; the last one kept is EOS."""
    if len(tokens) <= length:
        return tokens
    kept = np.array(tokens[:length])
    kept[-1] = vocabulary.EOS_ID
    return kept


def convert(
    examples: Sequence[Example],
    shape: Shape,
    choices: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Builds the model features of a batch.

    Args:
        examples: The examples of the step, in order.
        shape: Sizes of the batch.
        choices: Which of its negatives each example uses, at most G; by default the
            first G. Missing ones are masked.

    Returns:
        The features named in `gecko_jax.data.pipeline`, except `task_index`.
    """
    size, num = len(examples), shape.num_negatives
    if choices is None:
        choices = [range(min(num, len(example.negatives))) for example in examples]
    queries = [trim(example.query, shape.query_length) for example in examples]
    positives = [trim(example.positive, shape.passage_length) for example in examples]
    negatives: list[np.ndarray | None] = [None] * (size * num)
    negative_id = np.zeros((size, num, 2), np.uint32)
    negative_mask = np.zeros((size, num), bool)
    for row, (example, chosen) in enumerate(zip(examples, choices, strict=True)):
        for column, choice in enumerate(chosen):
            negatives[row * num + column] = trim(
                example.negatives[choice], shape.passage_length
            )
            negative_id[row, column] = example.negative_ids[choice]
            negative_mask[row, column] = True
    lay_out = _pack if shape.packing else _lay_out
    longest = max(shape.query_length, shape.passage_length)
    query_rows, query_segments, query_index = lay_out(
        queries,
        longest if shape.packing else shape.query_length,
        shape.row_multiple,
    )
    passage_rows, passage_segments, passage_index = lay_out(
        [*positives, *negatives],
        longest if shape.packing else shape.passage_length,
        shape.row_multiple,
    )
    return {
        "query_tokens": query_rows,
        "query_segment_ids": query_segments,
        "query_index": query_index,
        "passage_tokens": passage_rows,
        "passage_segment_ids": passage_segments,
        "passage_index": passage_index,
        "query_id": np.array([e.query_id for e in examples], np.uint32),
        "passage_id": np.array([e.passage_id for e in examples], np.uint32),
        "negative_id": negative_id,
        "negative_mask": negative_mask,
        "example_mask": np.ones(size, bool),
        "negative_group": np.array([e.negative_group for e in examples], np.int32),
    }


def largest(batch_size: int, shape: Shape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns the shapes and dtypes of a batch whose texts all have full length.

    For compiling a step without data; `task_index` is among them.
    """
    num = batch_size * (1 + shape.num_negatives)
    longest = max(shape.query_length, shape.passage_length)
    sides = {}
    for side, texts, length in (
        ("query", batch_size, shape.query_length),
        ("passage", num, shape.passage_length),
    ):
        rows, row_length = texts, length
        if shape.packing:
            used = -(-texts // min(longest // length, MAX_SEGMENTS))
            sizes = row_sizes(texts, shape.row_multiple)
            rows, row_length = next(size for size in sizes if size >= used), longest
        rows = shape.row_multiple * -(-rows // shape.row_multiple)
        sides |= {
            f"{side}_tokens": ((rows, row_length), np.int32),
            f"{side}_segment_ids": ((rows, row_length), np.int32),
            f"{side}_index": ((texts, 2), np.int32),
        }
    if shape.teacher_dim:
        width = shape.teacher_dim
        sides |= {
            "query_teacher": ((batch_size, width), np.float16),
            "passage_teacher": ((batch_size, width), np.float16),
            "negative_teacher": ((batch_size, shape.num_negatives, width), np.float16),
        }
    return sides | {
        "query_id": ((batch_size, 2), np.uint32),
        "passage_id": ((batch_size, 2), np.uint32),
        "negative_id": ((batch_size, shape.num_negatives, 2), np.uint32),
        "negative_mask": ((batch_size, shape.num_negatives), np.bool_),
        "example_mask": ((batch_size,), np.bool_),
        "negative_group": ((batch_size,), np.int32),
        "task_index": ((batch_size,), np.int32),
    }


def row_sizes(num_texts: int, row_multiple: int = 1) -> tuple[int, ...]:
    """Returns every row count that packing `num_texts` texts can give, ascending."""
    step = row_multiple * max(1, -(-num_texts // (_ROW_PARTS * row_multiple)))
    return tuple(range(step, num_texts + step, step))


def pack(lengths: Sequence[int], row_length: int) -> list[tuple[int, int]]:
    """Places texts into rows, the longest first, each into the first row it fits.

    Args:
        lengths: Tokens of each text, at most `row_length`.
        row_length: Tokens of a row.

    Returns:
        The row and the segment (from 0) of each text.
    """
    room = np.full(len(lengths), row_length)
    texts = np.zeros(len(lengths), np.int64)
    places = [(0, 0)] * len(lengths)
    for text in np.argsort(-np.asarray(lengths), kind="stable"):
        row = int(np.argmax((room >= lengths[text]) & (texts < MAX_SEGMENTS)))
        places[text] = (row, int(texts[row]))
        room[row] -= lengths[text]
        texts[row] += 1
    return places


_Rows = tuple[
    Int32[np.ndarray, "R L"], Int32[np.ndarray, "R L"], Int32[np.ndarray, "N 2"]
]


def _lay_out(
    texts: Sequence[np.ndarray | None], length: int, row_multiple: int
) -> _Rows:
    """One text a row. A missing text is a lone EOS, so that its embedding is finite."""
    rows = row_multiple * -(-len(texts) // row_multiple)
    tokens = np.zeros((rows, length), np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    for row, text in enumerate(texts):
        kept = (vocabulary.EOS_ID,) if text is None else text
        tokens[row, : len(kept)] = kept
        segment_ids[row, : len(kept)] = 1
    index = np.zeros((len(texts), 2), np.int32)
    index[:, 0] = np.arange(len(texts))
    return tokens, segment_ids, index


def _pack(texts: Sequence[np.ndarray | None], length: int, row_multiple: int) -> _Rows:
    """Several texts a row. A missing text points at the first text of row 0."""
    present = [(number, text) for number, text in enumerate(texts) if text is not None]
    places = pack([len(text) for _, text in present], length)
    used = 1 + max((row for row, _ in places), default=0)
    rows = next(size for size in row_sizes(len(texts), row_multiple) if size >= used)
    tokens = np.zeros((rows, length), np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    index = np.zeros((len(texts), 2), np.int32)
    filled = np.zeros(rows, np.int64)
    # In the order of the segments: a row is filled from the left.
    for place, (number, text) in sorted(
        zip(places, present, strict=True), key=lambda item: item[0]
    ):
        row, segment = place
        columns = slice(filled[row], filled[row] + len(text))
        tokens[row, columns] = text
        segment_ids[row, columns] = segment + 1
        index[number] = place
        filled[row] += len(text)
    return tokens, segment_ids, index
