"""seqio preprocessors: a record of raw texts becomes a record of tokens.

    {"query": "how to sort", "positive": "sorted() returns ...", "title": "Sorting",
     "negatives": ["reverse() ..."], "negative_titles": [""]}

    format_texts ->
    {"query": "task: search result | query: how to sort",
     "positive": "title: Sorting | text: sorted() returns ...",
     "negatives": ["title: none | text: reverse() ..."]}

    seqio's tokenize and append_eos ->
    {"query": [9, 350, ..., 1], "positive": [...], "negatives": [[...]]}

The strings of the format are `gecko_jax.text`'s; they are taken from it by writing
markers, so that text read through TensorFlow and text encoded later cannot differ.
"""

import dataclasses
from typing import Any

from gecko_jax import text

# Private-use characters: no real text holds them, and `text.clean` leaves them alone.
_TEXT_MARK = "\ue000"
_TITLE_MARK = "\ue001"


@dataclasses.dataclass(frozen=True)
class Templates:
    """The written forms of one task, with markers for what an example fills in."""

    query: str
    passage: str
    titled_passage: str


def templates(text_format: text.TextFormat, task: str) -> Templates:
    """Returns the written forms of `task`; a symmetric task has one for both sides."""
    query = text_format.format_query(_TEXT_MARK, task)
    if text_format.is_symmetric(task):
        return Templates(query, query, query)
    return Templates(
        query,
        text_format.format_passage(_TEXT_MARK),
        text_format.format_passage(_TEXT_MARK, title=_TITLE_MARK),
    )


def format_texts(dataset: Any, forms: Templates) -> Any:
    """Writes queries and passages as the encoder reads them.

    Args:
        dataset: A `tf.data.Dataset` of cleaned texts; a title may be empty.
        forms: The written forms of the task.
    """
    import tensorflow as tf

    def passage(content: Any, title: Any) -> Any:
        return tf.where(
            tf.strings.length(title) > 0,
            _fill(forms.titled_passage, content, title),
            _fill(forms.passage, content, title),
        )

    def format_record(record: dict[str, Any]) -> dict[str, Any]:
        formatted = dict(record)
        title = formatted.pop("title")
        negative_titles = formatted.pop("negative_titles")
        return formatted | {
            "query": _fill(forms.query, record["query"], title),
            "positive": passage(record["positive"], title),
            "negatives": passage(record["negatives"], negative_titles),
        }

    return dataset.map(format_record, num_parallel_calls=tf.data.AUTOTUNE)


def _fill(template: str, content: Any, title: Any) -> Any:
    """Replaces the markers; works on scalars and vectors of strings alike."""
    import tensorflow as tf

    parts = []
    before, _, after = template.partition(_TEXT_MARK)
    for part in (before, None, after):
        if part is None:
            parts.append(content)
            continue
        head, mark, tail = part.partition(_TITLE_MARK)
        parts.extend([head, title, tail] if mark else [part])
    return tf.strings.join(parts)
