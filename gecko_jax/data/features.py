"""Feature conversion: the examples of a step become the arrays of the model.

Two examples with one negative each and `query_length=passage_length=8`, where 1 is the
end of a text:

    query 5 6 1   positive 7 8 9 1   negative 4 1
    query 2 1     positive 3 3 1     negative 8 8 8 1

    unpacked                              packed
    query_tokens   5 6 1 0 0 0 0 0        query_tokens   5 6 1 2 1 0 0 0
                   2 1 0 0 0 0 0 0
    passage_tokens 7 8 9 1 0 0 0 0        passage_tokens 7 8 9 1 8 8 8 1
                   3 3 1 0 0 0 0 0                       3 3 1 4 1 0 0 0
                   4 1 0 0 0 0 0 0
                   8 8 8 1 0 0 0 0

`*_segment_ids` numbers the texts of a row from 1, with 0 for padding. `*_index` gives
the row and the segment (from 0) of each text: first of the positives, then of the
negatives, example by example. Packing moves texts; it never cuts or drops one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from gecko_jax.text import packing, vocabularies

# Number of texts that may share even a short row. The model pools every segment of
# every row, so a larger number would cost memory in rows with few texts.
_LEAST_SEGMENTS = 16


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized example; its token arrays end in EOS and are not truncated."""

    query: np.ndarray
    positive: np.ndarray
    negatives: tuple[np.ndarray, ...]
    query_id: np.ndarray
    passage_id: np.ndarray
    negative_ids: np.ndarray
    negative_group: int
    # Of the positive and of each negative, minus infinity for none; may be empty.
    scores: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.float32)
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a batch.

    With `packing`, rows hold several texts, and rows of both sides have the longer of
    the two lengths.
    """

    query_length: int  # maximum tokens of a query, including EOS
    passage_length: int  # maximum tokens of a passage, including EOS
    num_negatives: int = 0  # hard negatives per query (G)
    packing: bool = False
    row_multiple: int = 1  # devices that split a batch; divides the numbers of rows
    microbatch_rows: int = 0  # divides numbers of rows above it; 0 for no microbatches
    teacher_dim: int = 0  # width of a teacher's vectors (T); 0 for no teacher
    scores: bool = False  # whether the batch has scores of the candidates

    @property
    def num_segments(self) -> int:
        """Maximum number of texts in a row."""
        if not self.packing:
            return 1
        longest = max(self.query_length, self.passage_length)
        return max(_LEAST_SEGMENTS, longest // packing.MIN_TEXT)

    def row_length(self, side: str) -> int:
        """Returns the number of tokens in a row of "query" or "passage"."""
        lengths = {"query": self.query_length, "passage": self.passage_length}
        return max(lengths.values()) if self.packing else lengths[side]

    def round_rows(self, rows: int) -> int:
        """Rounds up the number of rows of a batch.

        Packed rows vary in number from step to step. Rounding them further lets a run
        compile a few shapes instead of one for each step.
        """
        fits = rows <= self.microbatch_rows
        multiple = self.row_multiple if fits else self.microbatch_rows
        multiple = multiple or self.row_multiple
        rounded = -(-rows // multiple) * multiple
        if self.packing:
            rounded = packing.round_up(rows, multiple)
        return min(rounded, self.microbatch_rows) if fits else rounded


def trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """Returns the first `length` tokens, the last of them EOS, as in `tokens`."""
    if len(tokens) <= length:
        return tokens
    trimmed = np.array(tokens[:length])
    trimmed[-1] = tokens[-1]
    return trimmed


def convert(
    examples: Sequence[Example],
    shape: Shape,
    choices: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Builds the features of a batch that `pipeline` lists, but no task or teacher.

    `choices` has the indices of the negatives that each example uses, at most G; by
    default the first G. Missing negatives are masked.
    """
    size, num = len(examples), shape.num_negatives
    if choices is None:
        choices = [range(min(num, len(example.negatives))) for example in examples]
    queries = [trim(example.query, shape.query_length) for example in examples]
    positives = [trim(example.positive, shape.passage_length) for example in examples]
    negatives: list[np.ndarray | None] = [None] * (size * num)
    negative_id = np.zeros((size, num, 2), np.uint32)
    negative_mask = np.zeros((size, num), bool)
    scores = np.full((size, 1 + num), -np.inf, np.float32)
    for row, (example, chosen) in enumerate(zip(examples, choices, strict=True)):
        for column, choice in enumerate(chosen):
            tokens = trim(example.negatives[choice], shape.passage_length)
            negatives[row * num + column] = tokens
            negative_id[row, column] = example.negative_ids[choice]
            negative_mask[row, column] = True
        if len(example.scores):
            picked = [0, *(1 + choice for choice in chosen)]
            scores[row, : len(picked)] = example.scores[picked]
    query_rows, query_segments, query_index = _lay_out(queries, "query", shape)
    passage_rows, passage_segments, passage_index = _lay_out(
        [*positives, *negatives], "passage", shape
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
        **({"scores": scores} if shape.scores else {}),
    }


def largest(batch_size: int, shape: Shape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns the shapes and dtypes of a batch whose texts all have full length.

    These allow compiling a step without data.
    """
    sides = {}
    for side, texts, length in (
        ("query", batch_size, shape.query_length),
        ("passage", batch_size * (1 + shape.num_negatives), shape.passage_length),
    ):
        row_length = shape.row_length(side)
        rows = -(-texts // min(row_length // length, shape.num_segments))
        rows = shape.round_rows(rows)
        sides |= {
            f"{side}_tokens": ((rows, row_length), np.int32),
            f"{side}_segment_ids": ((rows, row_length), np.int32),
            f"{side}_index": ((texts, 2), np.int32),
        }
    examples, negatives = (batch_size,), (batch_size, shape.num_negatives)
    if width := shape.teacher_dim:
        vectors = ((*examples, width), np.float16)
        sides["query_teacher"] = sides["passage_teacher"] = vectors
        sides["negative_teacher"] = ((*negatives, width), np.float16)
    if shape.scores:
        sides["scores"] = ((*examples, 1 + shape.num_negatives), np.float32)
    return sides | {
        "query_id": ((*examples, 2), np.uint32),
        "passage_id": ((*examples, 2), np.uint32),
        "negative_id": ((*negatives, 2), np.uint32),
        "negative_mask": (negatives, np.bool_),
        "example_mask": (examples, np.bool_),
        "negative_group": (examples, np.int32),
        "task_index": (examples, np.int32),
    }


_Rows = tuple[
    Int32[np.ndarray, "R L"], Int32[np.ndarray, "R L"], Int32[np.ndarray, "N 2"]
]


def _lay_out(texts: Sequence[np.ndarray | None], side: str, shape: Shape) -> _Rows:
    """Lays out the texts of a side in rows.

    With packing, a missing text has the index of the first text of row 0. Without, it
    is a row with a single EOS. Either way its embedding is finite.
    """
    length = shape.row_length(side)
    if shape.packing:
        present = [(n, len(text)) for n, text in enumerate(texts) if text is not None]
        sizes = [size for _, size in present]
        members = [
            [present[position][0] for position in row.positions]
            for row in packing.pack(sizes, length, shape.num_segments)
        ]
    else:
        members = [[number] for number in range(len(texts))]
    index = np.zeros((len(texts), 2), np.int32)
    for row, numbers in enumerate(members):
        index[numbers] = [(row, segment) for segment in range(len(numbers))]
    lone_eos = np.array([vocabularies.EOS_ID], np.int32)
    filled = [lone_eos if text is None else text for text in texts]
    size = (shape.round_rows(len(members)), length)
    return *packing.lay_out(filled, members, size), index
