"""Classification sets as triples: x, another text of its label, one of another label.

    {"text": "loved it", "label": 1}  {"text": "great fun", "label": 1}
    {"text": "dull", "label": 0}
 -> {"query": "loved it", "positive": "great fun", "negatives": ["dull"],
     "negative_group": 1}

Two texts of a batch that share a label must not be each other's negatives. The paper
appends one unique id to the three texts of a triple, which makes the in-batch negatives
trivial (section 3.3): `unique_ids="text"`. `unique_ids="mask"` leaves the texts as they
are and gives each triple a `negative_group` of its own, which the loss masks by.
Prepared sets have the mask; `data.unique_ids=True` turns it into the paper's text when
the examples are read (`append_id`).
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gecko_jax.data import jsonl, preprocessors
from gecko_jax.io import wording
from gecko_jax.text import text_formats

UNIQUE_IDS = ("mask", "text")


def triples(
    records: Iterable[preprocessors.Record],
    *,
    text: str = "text",
    label: str = "label",
    num_labels: int | None = None,
    unique_ids: str = "mask",
    seed: int = 0,
) -> Iterator[dict[str, Any] | preprocessors.Drop]:
    """Draws a positive and a negative for every text, by the seed and its number.

    Args:
        records: With a text and a label each.
        text: Name of the text's field.
        label: Name of the label's field.
        num_labels: Whole-number labels must be below it; -1 is "no label".
        unique_ids: "mask" or "text".
        seed: Of the draws.

    Raises:
        ValueError: A label is out of range, or there are fewer than two labels.
    """
    if unique_ids not in UNIQUE_IDS:
        raise ValueError(
            f"unique_ids={unique_ids!r}: must be one of {', '.join(UNIQUE_IDS)}"
        )
    labelled: list[tuple[str, Any]] = []
    by_label: dict[Any, list[int]] = {}
    seen: set[str] = set()
    for record in records:
        value = preprocessors.field(record, label)
        content = preprocessors.text(record, text)
        if num_labels is not None and value is not None:
            value = preprocessors.label(record, label)
            if value not in range(-1, num_labels):
                raise ValueError(
                    f"label {value} is out of range: there are {num_labels} labels"
                )
        if value is None or value == -1:
            yield preprocessors.Drop("no label")
        elif not content:
            yield preprocessors.Drop("empty text")
        elif content in seen:
            yield preprocessors.Drop("duplicate text")
        else:
            seen.add(content)
            by_label.setdefault(value, []).append(len(labelled))
            labelled.append((content, value))
    if labelled and len(by_label) < 2:
        raise ValueError(
            f"{wording.counted(len(labelled), 'text')} and one label, "
            f"{labelled[0][1]!r}; a classification set needs at least two labels"
        )
    for number, (content, value) in enumerate(labelled):
        draw = random.Random(f"{seed}/{number}")
        same = by_label[value]
        if len(same) < 2:
            yield preprocessors.Drop("only text of its label")
            continue
        # One fewer than there are, then past the text itself: never drawn twice.
        position = draw.randrange(len(same) - 1)
        positive = same[position] if same[position] != number else same[-1]
        while labelled[negative := draw.randrange(len(labelled))][1] == value:
            pass
        yield _triple(
            number, content, labelled[positive][0], labelled[negative][0], unique_ids
        )


def _triple(
    number: int, query: str, positive: str, negative: str, unique_ids: str
) -> dict[str, Any]:
    if unique_ids == "text":
        return {
            "query": _mark(query, number),
            "positive": _mark(positive, number),
            "negatives": [_mark(negative, number)],
        }
    return {
        "query": query,
        "positive": positive,
        "negatives": [negative],
        # Group 0 is everyone's, so the first triple has group 1.
        "negative_group": number + 1,
    }


def _mark(content: str, number: int) -> str:
    return f"{content} {number}"


def append_id(pair: jsonl.Pair) -> jsonl.Pair:
    """Writes the negative group of an example at the end of its texts (section 3.3).

    {"query": "loved it", "positive": "great fun", "negatives": ["dull"],
     "negative_group": 7}
    -> {"query": "loved it 7", "positive": "great fun 7", "negatives": ["dull 7"]}

    The example is then of group 0, whose examples are each other's in-batch negatives,
    and its texts have content ids of their own. An example of group 0 stays as it is.
    """
    number = pair.negative_group
    if not number:
        return pair
    query, positive = _mark(pair.query, number), _mark(pair.positive, number)
    negatives = tuple(_mark(negative, number) for negative in pair.negatives)
    return dataclasses.replace(
        pair,
        query=query,
        positive=positive,
        negatives=negatives,
        query_id=text_formats.content_id(query),
        passage_id=text_formats.content_id(positive),
        negative_ids=tuple(map(text_formats.content_id, negatives)),
        negative_group=0,
    )


def one_true_column(
    records: Iterable[preprocessors.Record], *, text: str, columns: tuple[str, ...]
) -> Iterator[Mapping[str, Any]]:
    """Gives texts with exactly one true column its name as label, others none.

    {"comment_text": "thanks!", "gratitude": True, "anger": False}
    -> {"text": "thanks!", "label": "gratitude"}
    """
    for record in records:
        true = [name for name in columns if preprocessors.field(record, name)]
        yield {
            "text": preprocessors.field(record, text),
            "label": true[0] if len(true) == 1 else None,
        }


def threshold(
    records: Iterable[preprocessors.Record],
    *,
    text: str,
    score: str,
    low: float,
    high: float,
) -> Iterator[Mapping[str, Any]]:
    """Gives scores a label at their two ends, and none between.

    {"text": "go away", "toxicity": 0.9} -> {"text": "go away", "label": "high"}
    """
    for record in records:
        value = preprocessors.number(record, score)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{score} {value} is out of range: it must be in [0, 1]")
        name = None
        if value is not None:
            name = "high" if value >= high else "low" if value <= low else None
        yield {"text": preprocessors.field(record, text), "label": name}
