r"""Relabelling: pairs that exist already take the place of generated queries.

    {"task": "docs", "query": "sort a list", "positive": "sorted() returns ...",
     "negatives": ["list.reverse() ..."]}
 -> {"id": 7, "task": "docs", "query": "sort a list", "positive": 12,
     "negatives": [31], "answers": [12], "line": "train.jsonl:8"}

The numbers are those of passages. `answers` are the positives that any line gives for
the query, none of which becomes a hard negative. Relabelling lines of people's data is
the paper's largest effect (table 3), and RLHN (Thakur et al. 2025, arXiv 2505.16967)
shows how much wrong hard negatives cost.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.data import jsonl, mining
from gecko_jax.fret import records, stages
from gecko_jax.io import wording
from gecko_jax.text import overlap, text_formats

# Fields of a line about the origin of its positive.
ORIGIN = ("source", "source_id", "licence", "license", "src", "url")
# Fields of a line that describe its negatives, or scores of its candidates.
_NEGATIVES = (
    *("negative", "negatives", "negative_titles", "negative_ids", "scores"),
    *("negative_sources", "negative_source_ids", "negative_licences", "candidates"),
)


def read_passages(files: Sequence[pathlib.Path]) -> Iterator[dict[str, Any]]:
    """Yields the positives of all lines, then the negatives, as `passages.read_file`.

    Raises:
        ValueError: A file or line is invalid, or there are no lines.
    """
    num_lines = 0
    for place, record, pair in read_lines(files):
        num_lines += 1
        given, (source, number) = pair.given_ids[0], place.rsplit(":", 1)
        known = {"source": source, "source_id": number if given is None else f"{given}"}
        known |= {n: record[n] for n in ORIGIN if isinstance(record.get(n), str)}
        yield _passage(known, pair.title, pair.positive, given)
    if files and not num_lines:
        raise ValueError(
            f"{', '.join(map(str, files))}: no lines; give lines with task, query and "
            "positive"
        )
    for place, record, pair in read_lines(files):
        passages = zip(
            pair.negatives, pair.negative_titles, pair.given_ids[1:], strict=True
        )
        for position, (body, title, given) in enumerate(passages):
            source, number = place.rsplit(":", 1)
            if given is not None:
                number = str(given)
            known = {"source": source, "source_id": number}
            # The export of `gecko fret` has the origin of each negative.
            for name in ("source", "source_id", "licence"):
                values = record.get(f"negative_{name}s")
                if isinstance(values, list) and len(values) == len(pair.negatives):
                    if isinstance(values[position], str) and values[position]:
                        known[name] = values[position]
            yield _passage(known, title, body, given)


def _passage(
    known: dict[str, Any], title: str, body: str, given: str | int | None
) -> dict[str, Any]:
    if given is not None:
        known = known | {"passage_id": given}
    return {**known, "title": title, "text": body}


def read_lines(
    files: Sequence[pathlib.Path],
) -> Iterator[tuple[str, dict[str, Any], jsonl.Pair]]:
    """Yields ("file:line", record, pair) of every example; the file has no folder."""
    for path in files:
        for place, record, pair in jsonl.read_lines(path):
            number = place.rpartition(":")[2]
            yield f"{wording.file_name(path.name)}:{number}", record, pair


def read_pairs(
    files: Sequence[pathlib.Path],
    store: stages.Passages,
    contamination: overlap.Contamination,
) -> list[stages.Record]:
    """Returns the record of every line, in order; see the module's docstring.

    A line is dropped if its positive is no passage (`no_passage`), its query is one of
    an evaluation set, or an earlier line has the same task, query and positive.
    """
    numbers = {
        text_formats.content_id(body): number
        for number, (_, body) in enumerate(store.texts)
    }

    def find(texts: Sequence[str]) -> list[int]:
        found = (numbers.get(text_formats.content_id(text)) for text in texts)
        return list(dict.fromkeys(number for number in found if number is not None))

    answers = mining.Answers(pair for *_, pair in read_lines(files))
    seen: set[tuple[str, str, int]] = set()
    rows = []
    for place, _, pair in read_lines(files):
        row: stages.Record = {"id": len(rows), "line": place}
        rows.append(row)
        query = text_formats.clean(pair.query)
        positive = find([pair.positive])
        if not positive:
            row[records.DROPPED] = "no_passage"
            continue
        if contamination.holds(query):
            row[records.DROPPED] = "evaluation_set"
            continue
        if (key := (pair.task, query, positive[0])) in seen:
            row[records.DROPPED] = "duplicate"
            continue
        seen.add(key)
        known = sorted(numbers[one] for one in answers.of(pair) if one in numbers)
        row["task"] = pair.task_description or pair.task
        row |= {"query": query, "positive": positive[0]}
        row["negatives"] = [n for n in find(pair.negatives) if n not in known]
        row["answers"] = known
    return rows
