"""seqio preprocessors: a record of raw texts becomes a record of tokens.

    {"query": "how to sort", "task_description": "", "positive": "sorted() returns ...",
     "title": "Sorting", "negatives": ["reverse() ..."], "negative_titles": [""]}

    format_texts ->
    {"query": "task: search result | query: how to sort",
     "positive": "title: Sorting | text: sorted() returns ...",
     "negatives": ["title: none | text: reverse() ..."]}

    seqio's tokenize and append_eos ->
    {"query": [9, 350, ..., 1], "positive": [...], "negatives": [[...]]}

`templates` derives the strings from a `TextFormat` by formatting markers, so TensorFlow
writes exactly what the encoder's own formatting writes.
"""

import dataclasses
import re
from typing import Any

from gecko_jax.data import jsonl
from gecko_jax.text import text_formats

# Private-use characters: real text does not contain them, and cleaning keeps them.
_TEXT_MARK = "\ue000"
_TITLE_MARK = "\ue001"
_TASK_MARK = "\ue002"
_MARKS = re.compile(f"([{_TEXT_MARK}{_TITLE_MARK}{_TASK_MARK}])")


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates of one task, with markers for the texts of an example.

    `task_description` applies to examples without a description of their own.
    """

    task_description: str
    query: str
    passage: str
    titled_passage: str


def templates(text_format: text_formats.TextFormat, task: str) -> Templates:
    """Returns the templates of `task`; a symmetric task has one for both sides."""
    description = text_format.describe(task)
    query = text_format.format_query(_TEXT_MARK, task, _TASK_MARK)
    if text_format.is_symmetric(task):
        return Templates(description, query, query, query)
    return Templates(
        description,
        query,
        text_format.format_passage(_TEXT_MARK),
        text_format.format_passage(_TEXT_MARK, title=_TITLE_MARK),
    )


def format_texts(dataset: Any, forms: Templates) -> Any:
    """Writes queries and passages as the encoder reads them.

    Args:
        dataset: A `tf.data.Dataset` of cleaned texts; titles and task descriptions may
            be empty.
        forms: The templates of the task.
    """
    import tensorflow as tf

    def fill(template: str, content: Any, title: Any, task: Any) -> Any:
        """Replaces the markers; takes scalars and vectors of strings."""
        values = {_TEXT_MARK: content, _TITLE_MARK: title, _TASK_MARK: task}
        return tf.strings.join([values.get(p, p) for p in _MARKS.split(template)])

    def passage(content: Any, title: Any, task: Any) -> Any:
        return tf.where(
            tf.strings.length(title) > 0,
            fill(forms.titled_passage, content, title, task),
            fill(forms.passage, content, title, task),
        )

    def format_record(record: dict[str, Any]) -> dict[str, Any]:
        formatted = dict(record)
        title = formatted.pop("title")
        negative_titles = formatted.pop("negative_titles")
        own = formatted.pop("task_description")
        task = tf.where(tf.strings.length(own) > 0, own, forms.task_description)
        return formatted | {
            "query": fill(forms.query, record["query"], title, task),
            "positive": passage(record["positive"], title, task),
            "negatives": passage(record["negatives"], negative_titles, task),
        }

    return dataset.map(format_record, num_parallel_calls=tf.data.AUTOTUNE)


def write(
    text_format: text_formats.TextFormat, task: str, pair: jsonl.Pair
) -> tuple[str, str, tuple[str, ...]]:
    """Returns query, positive and negatives of one example, without TensorFlow.

    The texts equal those of `format_texts`.
    """
    own = pair.task_description
    # A line's description is literal, even if it equals the name of a task.
    description = text_formats.clean(own) if own.strip() else text_format.describe(task)

    def passage(content: str, title: str) -> str:
        if text_format.is_symmetric(task):
            return text_format.format_query(content, task, description)
        return text_format.format_passage(content, title)

    return (
        text_format.format_query(pair.query, task, description),
        passage(pair.positive, pair.title),
        tuple(map(passage, pair.negatives, pair.negative_titles)),
    )
