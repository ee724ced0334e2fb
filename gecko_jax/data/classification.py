"""Classification sets as triples: x, another text of its label, one of another label.

    {"text": "loved it", "label": 1}  {"text": "great fun", "label": 1}
    {"text": "dull", "label": 0}
 -> {"query": "loved it", "positive": "great fun", "negatives": ["dull"],
     "negative_group": 1}

Two texts of a batch that share a label must not be each other's negatives. The paper
appends a unique id to the three texts of a triple, which makes the in-batch negatives
trivial (section 3.3). A prepared set has the texts unchanged and a `negative_group` for
each triple, by which the loss masks; with `data.unique_ids=True`, `append_id` turns the
group into the paper's id when the examples are read.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gecko_jax.data import jsonl, preprocessors
from gecko_jax.io import wording
from gecko_jax.text import text_formats


def triples(
    records: Iterable[preprocessors.Record],
    *,
    text: str = "text",
    label: str = "label",
    num_labels: int | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any] | preprocessors.Drop]:
    """Draws a positive and a negative for every text.

    Labels are whole numbers below `num_labels`, and -1 for "no label"; None allows
    labels of any type. Raises ValueError if a label is out of range, or there are fewer
    than two labels.
    """
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
                    f"label {value} is out of range: there are {num_labels} labels; "
                    "check that it is the right set and version"
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
        # Draw among all but the last text, and replace the text itself by the last.
        positive = same[draw.randrange(len(same) - 1)]
        positive = same[-1] if positive == number else positive
        while labelled[negative := draw.randrange(len(labelled))][1] == value:
            pass
        yield {
            "query": content,
            "positive": labelled[positive][0],
            "negatives": [labelled[negative][0]],
            # Group 0 is the group of all other examples.
            "negative_group": number + 1,
        }


def append_id(pair: jsonl.Pair) -> jsonl.Pair:
    """Appends the negative group of an example to its texts (section 3.3).

    {"query": "loved it", "positive": "great fun", "negatives": ["dull"],
     "negative_group": 7}
    -> {"query": "loved it 7", "positive": "great fun 7", "negatives": ["dull 7"]}

    The example joins group 0, whose examples are each other's in-batch negatives, and
    gets the content ids of the new texts. An example of group 0 does not change.
    """
    number = pair.negative_group
    if not number:
        return pair
    query, positive = f"{pair.query} {number}", f"{pair.positive} {number}"
    negatives = tuple(f"{negative} {number}" for negative in pair.negatives)
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
    """Labels a text by its only true column; other texts get no label.

    {"comment_text": "thanks!", "gratitude": True, "anger": False}
    -> {"text": "thanks!", "label": "gratitude"}
    """
    for record in records:
        true = [name for name in columns if preprocessors.field(record, name)]
        label = true[0] if len(true) == 1 else None
        yield {"text": preprocessors.field(record, text), "label": label}


def threshold(
    records: Iterable[preprocessors.Record],
    *,
    text: str,
    score: str,
    low: float,
    high: float,
) -> Iterator[Mapping[str, Any]]:
    """Labels scores up to `low` and from `high` on; scores between get no label.

    {"text": "go away", "toxicity": 0.9} -> {"text": "go away", "label": "high"}
    """
    for record in records:
        value = preprocessors.number(record, score)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"{score} {value} is out of range: it must be in [0, 1]; check that it "
                "is the right set and version"
            )
        label = None
        if value is not None:
            label = "high" if value >= high else "low" if value <= low else None
        yield {"text": preprocessors.field(record, text), "label": label}
