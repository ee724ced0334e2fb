r"""Reading pairs and triples from JSON lines.

One line is one training example:

    {"task": "docs", "query": "how to sort a list",
     "positive": "sorted() returns a new list ...", "title": "Sorting",
     "negatives": ["list.reverse() ..."], "negative_titles": ["Lists"]}

Fields:
    task: Name of the task the line belongs to.
    task_description: The paper's *t* for this query, as `gecko fret` writes it;
        defaults to the task's.
    query, positive: Texts; `passage` is an alias of `positive`.
    title: Title of the positive, optional.
    positives: List of passages that answer the query, in place of `positive`. Each
        makes an example of its own (`split`); `titles` and `passage_ids` have one item
        for each.
    negatives: List of hard negatives, optional; `negative` holds a single string.
    negative_titles: Their titles, one for each negative.
    query_id, passage_id: Strings or integers that are equal for equal queries and
        equal passages, across all files and tasks; default to hashes of the texts.
    negative_ids: Passage ids of the negatives.
    negative_group: Number, 0 by default. Only examples of the same group are each
        other's in-batch negatives.
    scores: Relevance of the candidates according to a judge such as `gecko fret`, for
        `loss.kl_weight`: a number for the positive (or for each of `positives`), then
        one for each negative; null for a candidate without one.

Other fields, such as a source or a licence, are ignored. A value of null or NaN is
missing, as in every file that this package reads (`inputs`).
"""

import collections
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from gecko_jax.io import inputs, reading, wording
from gecko_jax.text import text_formats

_POSITIVE = ("positive", "passage")
_ALIASES = (_POSITIVE, ("negatives", "negative"))
# Fields of one positive, and of several.
_SEVERAL = {"positive": "positives", "title": "titles", "passage_id": "passage_ids"}
_INT32 = range(-(2**31), 2**31)
_MOST = 2.0**127  # Scores are stored in float32.


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query, its positive passage and any number of hard negatives.

    A missing title or task description is "". An id is two uint32 words: the hash of
    an id in the file, or else `text_formats.content_id`. `given_ids` are the passage
    ids in the file, of the positive and of each negative. `scores` are in the same
    order, minus infinity where a candidate has none; empty if no candidate has one.
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
    scores: tuple[float, ...] = ()

    @property
    def passages(self) -> Iterator[tuple[str, str, tuple[int, int]]]:
        """Text, title and id of the positive and of each negative."""
        return zip(
            (self.positive, *self.negatives),
            (self.title, *self.negative_titles),
            (self.passage_id, *self.negative_ids),
            strict=True,
        )


def read_pairs(path: str | os.PathLike, task: str | None = None) -> Iterator[Pair]:
    """Yields the examples of a file, of one task or of all.

    Raises ValueError if the file or a line of it is invalid.
    """
    for _, _, pair in read_lines(path):
        if task is None or pair.task == task:
            yield pair


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    """Yields (place, record with one positive, example) of every example."""
    for place, line in reading.read_records(path):
        for record in split(place, line):
            yield place, record, parse(place, record)


def count_examples(path: str | os.PathLike) -> dict[str, int]:
    """Checks every line of a file, and returns the number of examples of each task.

    Raises ValueError if the file or a line of it is invalid, or the file has no lines.
    """
    examples = collections.Counter(pair.task for pair in read_pairs(path))
    if not examples:
        raise ValueError(
            f"{path}: the file is empty; give it lines with task, query and positive"
        )
    return dict(examples)


def split(place: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a record for each of several positives; other records as they are.

    {"positives": ["a", "b"], "negatives": ["n"], "scores": [3, 2, 0], ...}
    -> {"positive": "a", "negatives": ["n"], "scores": [3, 0], ...}
       {"positive": "b", "negatives": ["n"], "scores": [2, 0], ...}

    The examples have the same query, so `loss.mask_duplicates` masks the positive of
    one as a negative of the other.
    """
    if record.get("positives") is None:
        yield record
        return
    for name in (*_SEVERAL, "passage"):
        if record.get(name) is not None:
            raise ValueError(
                f"{place}: field {name!r} is for one positive; with 'positives', use "
                f"{_SEVERAL.get(name, 'positives')!r}"
            )
    items = _list(place, record, "positives")
    positives = [_text(place, {name: value}, name) for name, value in items]
    if not positives:
        raise ValueError(f"{place}: field 'positives' is empty; give at least one")
    several = {
        singular: _list(place, record, name, len(positives), "positive")
        for singular, name in _SEVERAL.items()
    }
    negatives = _negatives(place, record)
    for name, negative in negatives:
        if negative in positives:
            raise ValueError(
                f"{place}: field {name!r} is one of 'positives', too; remove one of "
                "them"
            )
    scores = _scores(place, record, len(positives), len(negatives))
    shared = {name: record[name] for name in record if name not in _SEVERAL.values()}
    for number in range(len(positives)):
        own = {name: items[number][1] for name, items in several.items()}
        example = shared | {
            name: value for name, value in own.items() if value is not None
        }
        if scores:
            example["scores"] = [scores[number], *scores[len(positives) :]]
        yield example


def parse(place: str, record: dict[str, Any]) -> Pair:
    """Checks one record with one positive; `place` (file:line) starts every error."""
    for name, alias in _ALIASES:
        if record.get(name) is not None and record.get(alias) is not None:
            names = f"{name!r} and {alias!r}"
            raise ValueError(f"{place}: fields {names} mean the same; keep one")
    if isinstance(record.get("positive"), list):
        raise ValueError(f"{place}: field 'positive' is a list; name it 'positives'")
    query = _text(place, record, "query")
    positive = _text(place, record, *_POSITIVE)
    title = _text(place, record, "title", default="")
    negatives = [text for _, text in _negatives(place, record)]
    titles = [
        _text(place, {name: value}, name, default="")
        for name, value in _list(place, record, "negative_titles", len(negatives))
    ]
    ids = _list(place, record, "negative_ids", len(negatives))
    given_ids = (
        _given_id(place, "passage_id", record.get("passage_id")),
        *(_given_id(place, "negative_ids", value) for _, value in ids),
    )
    query_id = _given_id(place, "query_id", record.get("query_id"))
    texts = zip((positive, *negatives), (title, *titles), given_ids, strict=True)
    # Hashes of query ids and of passage ids never collide.
    passage_ids = [
        text_formats.content_id(text, text_title)
        if given_id is None
        else text_formats.hash_words(f"passage_id:{given_id}")
        for text, text_title, given_id in texts
    ]
    scores = _scores(place, record, 1, len(negatives))
    return Pair(
        task=_text(place, record, "task"),
        task_description=_text(place, record, "task_description", default=""),
        query=query,
        positive=positive,
        title=title,
        negatives=tuple(negatives),
        negative_titles=tuple(titles),
        query_id=text_formats.content_id(query)
        if query_id is None
        else text_formats.hash_words(f"query_id:{query_id}"),
        passage_id=passage_ids[0],
        negative_ids=tuple(passage_ids[1:]),
        negative_group=_group(place, record.get("negative_group")),
        given_ids=given_ids,
        scores=tuple(-math.inf if score is None else score for score in scores),
    )


def _negatives(place: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name in errors, text) of each hard negative."""
    if record.get("negative") is not None:
        return [("negative", _text(place, record, "negative"))]
    return [
        (name, _text(place, {name: value}, name))
        for name, value in _list(place, record, "negatives")
    ]


def _scores(
    place: str, record: dict[str, Any], num_positives: int, num_negatives: int
) -> list[float | None]:
    """Returns the candidates' scores, None for a missing one; [] if there are none."""
    if record.get("scores") is None:
        return []
    scores: list[float | None] = []
    length = num_positives + num_negatives
    for name, value in _list(place, record, "scores", length, "positive and negative"):
        is_number = type(value) in (int, float)
        if value is not None and not (is_number and abs(value) < _MOST):
            raise ValueError(
                f"{place}: field {name!r} is {value!r}; it must be a finite number, or "
                "null for none"
            )
        scores.append(None if value is None else float(value))
    return scores if any(score is not None for score in scores) else []


def _text(
    place: str, record: dict[str, Any], *names: str, default: str | None = None
) -> str:
    """Returns the first of the named fields with a value, checked."""
    value = inputs.string_field(place, record, *names, default=default)
    if value.isascii() and len(value) <= text_formats.MAX_CHARACTERS:
        return value
    name = next(name for name in names if record.get(name) is not None)
    if len(value) > text_formats.MAX_CHARACTERS:
        raise ValueError(
            f"{place}: field {name!r} has {len(value):,} characters; at most "
            f"{text_formats.MAX_CHARACTERS:,} are allowed, split it into passages"
        )
    inputs.check_characters(place, {name: value})
    return value


def _list(
    place: str,
    record: dict[str, Any],
    name: str,
    length: int | None = None,
    each: str = "negative",
) -> list[tuple[str, Any]]:
    """Returns the items of a list field, named "field[0]", "field[1]", ...

    A missing field is a list of nulls.
    """
    values = record.get(name)
    if values is None:
        values = [None] * (length or 0)
    is_list = isinstance(values, list)
    if not is_list or length not in (None, len(values)):
        shown = wording.counted(len(values), "item") if is_list else repr(values)[:80]
        rule = "of strings" if length is None else f"of {length}, one for each {each}"
        raise ValueError(
            f"{place}: field {name!r} is {shown}; it must be a list {rule}"
        )
    return [(f"{name}[{number}]", value) for number, value in enumerate(values)]


def _group(place: str, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value not in _INT32:
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
