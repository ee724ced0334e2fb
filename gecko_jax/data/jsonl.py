r"""Reading pairs and triples from JSON lines.

One line is one training example:

    {"task": "docs", "query": "how to sort a list",
     "positive": "sorted() returns a new list ...", "title": "Sorting",
     "negatives": ["list.reverse() ..."], "negative_titles": ["Lists"]}

Fields:
    task: Name by which lines are chosen; looked up in the table of task descriptions.
    task_description: The paper's *t* of this query alone, as `gecko fret` writes it;
        by default that of the task.
    query, positive: Texts; `passage` is another name of `positive`.
    title: Title of the positive, or none.
    negatives: List of hard negatives, or none; `negative` for one string.
    negative_titles: Their titles, as many as there are negatives.
    query_id, passage_id: Strings or integers that say which queries and which positives
        are the same; by default, equal texts are. An id holds over all files and tasks.
    negative_ids: The same for the negatives, in the ids of the passages.
    negative_group: Number, 0 by default; examples are each other's in-batch negatives
        only within a group.

Other fields, such as a source or a licence, are for people and are passed over. A value
of null or NaN is missing, as in every file that this package reads (`inputs`).
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from gecko_jax.io import inputs, reading, wording
from gecko_jax.text import text_formats

_ONE_POSITIVE = ("positive", "passage")
_INT32 = range(-(2**31), 2**31)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query, its positive passage and any number of hard negatives.

    A title or task description that is not given is "". Ids are the two uint32 words
    of `text.content_id`; for those of the file they hash the id instead of the text.
    `given_ids` are those of the file, of the positive and then of each negative.
    """

    task: str
    task_description: str
    query: str
    positive: str
    title: str
    negatives: tuple[str, ...]
    negative_titles: tuple[str, ...]
    query_id: tuple[int, int]
    passage_id: tuple[int, int]
    negative_ids: tuple[tuple[int, int], ...]
    negative_group: int
    given_ids: tuple[str | int | None, ...]


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """What a file holds.

    Attributes:
        sha256: Checksum of the bytes.
        examples: Number of examples of each task, in order of first appearance.
    """

    sha256: str
    examples: dict[str, int]


def read_pairs(path: str | os.PathLike, task: str | None = None) -> Iterator[Pair]:
    """Yields the examples of a file, those of one task or all.

    Raises:
        ValueError: The file or a line of it is bad; names the line, rule and remedy.
    """
    for _, _, pair in read_lines(path):
        if task is None or pair.task == task:
            yield pair


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    """Yields (place, record as read, example) of every line."""
    for place, record in reading.read_records(path):
        yield place, record, parse(place, record)


def summarize(path: str | os.PathLike) -> FileSummary:
    """Reads a file through, checking every line.

    Raises:
        ValueError: The file or a line of it is bad, or it holds no examples.
    """
    examples = collections.Counter(pair.task for pair in read_pairs(path))
    if not examples:
        raise ValueError(
            f"{path}: the file is empty; give it lines with task, query and positive"
        )
    return FileSummary(reading.sha256(path), dict(examples))


def parse(place: str, record: dict[str, Any]) -> Pair:
    """Checks one record; `place` (file:line) starts every error."""
    _one_of(place, record, *_ONE_POSITIVE)
    query = _text(place, record, "query")
    positive = _text(place, record, *_ONE_POSITIVE)
    title = _optional_text(place, record, "title")
    negatives = _negatives(place, record)
    titles = _list(place, record, "negative_titles", len(negatives))
    ids = _list(place, record, "negative_ids", len(negatives))
    query_id = _given_id(place, "query_id", record.get("query_id"))
    given = (
        _given_id(place, "passage_id", record.get("passage_id")),
        *(_given_id(place, "negative_ids", value) for value in ids),
        *([None] * (len(negatives) - len(ids))),
    )
    group = _group(place, record.get("negative_group"))
    for number, value in enumerate(titles):
        if value is not None:
            _check_text(place, f"negative_titles[{number}]", value, may_be_empty=True)
    return Pair(
        task=_text(place, record, "task"),
        task_description=_optional_text(place, record, "task_description"),
        query=query,
        positive=positive,
        title=title,
        negatives=negatives,
        negative_titles=tuple(t or "" for t in titles) or ("",) * len(negatives),
        query_id=_hash("query_id", query_id) or text_formats.content_id(query),
        passage_id=_hash("passage_id", given[0])
        or text_formats.content_id(positive, title),
        negative_ids=tuple(
            _hash("passage_id", given[number + 1])
            or text_formats.content_id(negative, titles[number] if titles else None)
            for number, negative in enumerate(negatives)
        ),
        negative_group=group,
        given_ids=given,
    )


def _one_of(place: str, record: dict[str, Any], *names: str) -> None:
    present = [name for name in names if record.get(name) is not None]
    if len(present) > 1:
        both = " and ".join(map(repr, present))
        raise ValueError(f"{place}: fields {both} mean the same; keep one")


def _check_text(place: str, name: str, value: Any, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: field {name!r} is {inputs.kind(value)}; it must be a string"
        )
    if not may_be_empty and not value.strip():
        raise ValueError(
            f"{place}: field {name!r} is empty; give it text or drop the line"
        )
    if len(value) > text_formats.MAX_CHARACTERS:
        raise ValueError(
            f"{place}: field {name!r} has {len(value):,} characters; at most "
            f"{text_formats.MAX_CHARACTERS:,} are allowed: split it into passages"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}: field {name!r} holds a lone surrogate, which is no character; "
            "write the text again as UTF-8"
        ) from None
    return value


def _text(place: str, record: dict[str, Any], *names: str) -> str:
    for name in names:
        if record.get(name) is not None:
            return _check_text(place, name, record[name])
    raise inputs.no_value(place, record, *names)


def _optional_text(place: str, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return "" if value is None else _check_text(place, name, value, may_be_empty=True)


def _negatives(place: str, record: dict[str, Any]) -> tuple[str, ...]:
    _one_of(place, record, "negatives", "negative")
    if record.get("negative") is not None:
        return (_check_text(place, "negative", record["negative"]),)
    negatives = record.get("negatives")
    if negatives is None:
        return ()
    if not isinstance(negatives, list):
        raise ValueError(
            f"{place}: field 'negatives' is {inputs.kind(negatives)}; it must be a "
            "list of strings (or use 'negative' for one string)"
        )
    return tuple(
        _check_text(place, f"negatives[{number}]", negative)
        for number, negative in enumerate(negatives)
    )


def _list(place: str, record: dict[str, Any], name: str, length: int) -> list[Any]:
    """Returns the field as a list with one item for each negative, or empty."""
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) != length:
        shown = (
            wording.counted(len(value), "item")
            if isinstance(value, list)
            else repr(value)
        )
        raise ValueError(
            f"{place}: field {name!r} is {shown}; it must be a list with one item for "
            f"each negative, {length} in all"
        )
    return value


def _group(place: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT32:
        raise ValueError(
            f"{place}: field 'negative_group' is {value!r}; it must be a whole number "
            "of at most 32 bits"
        )
    return value


def _given_id(place: str, name: str, value: Any) -> str | int | None:
    try:
        return None if value is None else inputs.check_id(name, value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _hash(kind: str, value: str | int | None) -> tuple[int, int] | None:
    """Hashes an id of the file; query and passage ids never meet by chance."""
    if value is None:
        return None
    digest = hashlib.blake2b(f"{kind}:{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
