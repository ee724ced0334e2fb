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
_NAMED = ("source", "source_id", "licence")
ORIGIN = (*_NAMED, "license", "src", "url")
# Fields of a line that describe its negatives, or scores of its candidates.
_NEGATIVES = (
    *("negative", "negatives", "negative_titles", "negative_ids", "scores"),
    *("negative_sources", "negative_source_ids", "negative_licences", "candidates"),
)


def read_passages(files: Sequence[pathlib.Path]) -> Iterator[dict[str, Any]]:
    """Yields the positives of all lines, then the negatives, as passages."""
    num_lines = 0
    for place, record, pair in read_lines(files):
        num_lines += 1
        origin = {n: record[n] for n in ORIGIN if isinstance(record.get(n), str)}
        yield _passage(place, origin, pair.title, pair.positive, pair.given_ids[0])
    if files and not num_lines:
        raise ValueError(
            f"{', '.join(map(str, files))}: no lines; give lines with task, query and "
            "positive"
        )
    for place, record, pair in read_lines(files):
        columns = (pair.negatives, pair.negative_titles, pair.given_ids[1:])
        for position, (body, title, passage_id) in enumerate(
            zip(*columns, strict=True)
        ):
            # The export of `gecko fret` has the origin of each negative.
            origin = {}
            for name in _NAMED:
                values = record.get(f"negative_{name}s")
                if isinstance(values, list) and len(values) == len(pair.negatives):
                    value = values[position]
                    origin |= {name: value} if isinstance(value, str) and value else {}
            yield _passage(place, origin, title, body, passage_id)


def _passage(
    place: str,
    origin: dict[str, Any],
    title: str,
    body: str,
    passage_id: str | int | None,
) -> dict[str, Any]:
    source, number = place.rsplit(":", 1)
    number = number if passage_id is None else f"{passage_id}"
    known: dict[str, Any] = {"source": source, "source_id": number}
    known |= origin
    if passage_id is not None:
        known["passage_id"] = passage_id
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
    ids = [text_formats.content_id(body) for _, body in store.texts]
    numbers = {content: number for number, content in enumerate(ids)}
    answers = mining.Answers(pair for *_, pair in read_lines(files))
    seen = set()
    rows = []
    for place, _, pair in read_lines(files):
        row: stages.Record = {"id": len(rows), "line": place}
        rows.append(row)
        query = text_formats.clean(pair.query)
        positive = numbers.get(text_formats.content_id(pair.positive))
        key = (pair.task, query, positive)
        if positive is None:
            row[records.DROPPED] = "no_passage"
        elif contamination.holds(query):
            row[records.DROPPED] = "evaluation_set"
        elif key in seen:
            row[records.DROPPED] = "duplicate"
        else:
            seen.add(key)
            known = sorted(numbers[a] for a in answers.of(pair) if a in numbers)
            given = [numbers.get(text_formats.content_id(n)) for n in pair.negatives]
            negatives = [n for n in dict.fromkeys(given) if n not in (None, *known)]
            row["task"] = pair.task_description or pair.task
            row |= {"query": query, "positive": positive}
            row |= {"negatives": negatives, "answers": known}
    return rows


def relabel(
    line: Mapping[str, Any],
    row: stages.Record,
    positive: int,
    negatives: Sequence[int],
    passages: Mapping[int, stages.Record],
) -> dict[str, Any]:
    """Returns a line with the chosen positive and negatives.

    Other fields stay as they are. A positive that moved brings its title, id, source
    and licence; the fields `seed_...` then have the origin of the line's own positive.
    `passages` are the records of the stage.
    """
    result = {name: line[name] for name in line if name not in _NEGATIVES}
    result["moved"] = positive != row["positive"]
    if result["moved"]:
        chosen, own = passages[positive], passages[row["positive"]]
        for name in ("passage", "passage_id", *ORIGIN):
            result.pop(name, None)
        result |= {"positive": chosen["text"], "title": chosen["title"]}
        names = ("passage_id", *ORIGIN)
        result |= {name: chosen[name] for name in names if name in chosen}
        result |= {f"seed_{name}": own[name] for name in _NAMED if name in own}
    if negatives:
        chosen = [passages[number] for number in negatives]
        result["negatives"] = [passage["text"] for passage in chosen]
        result["negative_titles"] = [passage["title"] for passage in chosen]
        if any("passage_id" in passage for passage in chosen):
            result["negative_ids"] = [passage.get("passage_id") for passage in chosen]
        for name in _NAMED:
            result[f"negative_{name}s"] = [passage.get(name, "") for passage in chosen]
    return result
