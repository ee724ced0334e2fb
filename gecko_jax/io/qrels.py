r"""Relevance judgements: which passages answer a query, and how well.

    query-id\tcorpus-id\tscore      BEIR, in any order and with other columns between
    q1\tp1\t2
    q1\tp1\t2                       the same without a header
    q1 0 p1 2                       TREC: query, 0 or Q0, passage, grade; tabs or spaces
    {"query-id": "q1", "corpus-id": "p1", "score": 2}        JSON lines
 -> {"q1": {"p1": Judgement("qrels.tsv:2", 2)}}

Four columns without a header are TREC only if the second is 0 or Q0 in every line.
Others could be BEIR with an additional column, and are refused.
"""

import os
import re
from collections.abc import Collection
from typing import NamedTuple

from gecko_jax.io import columns, inputs, wording

NAMES = ("query-id", "corpus-id", "score")
_OTHER_NAMES = {
    "qid": "query-id",
    **dict.fromkeys(("doc-id", "passage-id", "pid"), "corpus-id"),
    **dict.fromkeys(("grade", "relevance"), "score"),
}
# Values of TREC's second column, which is unused.
_ITERATIONS = ("0", "Q0")


class Judgement(NamedTuple):
    """Grade of a passage for a query, and its place in the file."""

    place: str
    grade: int | float


def load(path: str | os.PathLike) -> dict[str, dict[str, Judgement]]:
    """Returns query id -> passage id -> judgement, in the order of the file.

    Raises ValueError if a line is not a judgement, or repeats one.
    """
    judgements: dict[str, dict[str, Judgement]] = {}
    rows = columns.read(path, NAMES, other_names=_OTHER_NAMES, layout=_build_layout())
    for number, (place, row) in enumerate(rows):
        query, passage = (inputs.id_field(place, row, name) for name in NAMES[:2])
        try:
            grade = inputs.number_field(place, row, NAMES[2])
        except ValueError as error:
            if number or columns.is_json_lines(path):
                raise
            raise ValueError(
                f"{error}; if this line names the columns, call them {', '.join(NAMES)}"
            ) from None
        judged = judgements.setdefault(query, {})
        if passage in judged:
            raise ValueError(
                f"{place}: query {query!r} and passage {passage!r} were judged before, "
                f"at {judged[passage].place}; keep one line"
            )
        judged[passage] = Judgement(place, grade)
    return judgements


def _build_layout() -> columns.Layout:
    """Returns a reader of rows without a header, which must all have one form."""
    width = 0

    def pick_columns(place: str, cells: list[str]) -> list[str]:
        nonlocal width
        if len(cells) < 3:  # TREC separates by spaces, which BEIR's ids may contain.
            words = re.split(r"[ \t]+", "\t".join(cells).strip())
            cells = words if len(words) == 4 and words[1] in _ITERATIONS else cells
        if len(cells) == 4 and cells[1].strip() not in _ITERATIONS:
            raise ValueError(
                f"{place}: 4 columns, of which the second is {cells[1]!r}; TREC has 0 "
                f"there. Name the columns in the first line ({', '.join(NAMES)}), or "
                "write only these three"
            )
        width = width or len(cells)
        if len(cells) != width:
            raise ValueError(
                f"{place}: {wording.counted(len(cells), 'column')}, and the first line "
                f"has {width}; write all lines in one form"
            )
        return [cells[0], *cells[2:]] if width == 4 else cells

    return pick_columns


def other_spelling(identity: str) -> str:
    """Returns "1" for "1.0", "1.0" for "1", and "" for an id that is not a number."""
    if re.fullmatch(r"[0-9]+\.0", identity):
        return identity[:-2]
    return f"{identity}.0" if re.fullmatch(r"[0-9]+", identity) else ""


def check_spelling(place: str, identity: str, known: Collection[str]) -> None:
    """Refuses an unknown id if its other spelling is known.

    pandas turns a column of integers with gaps into floats, and writes the id 1 as
    "1.0" into a TSV file.
    """
    alternative = other_spelling(identity)
    if alternative in known:
        raise ValueError(
            f"{place}: id {identity!r} is not in the other files, and {alternative!r} "
            "is; write ids the same everywhere, integers without '.0'"
        )
