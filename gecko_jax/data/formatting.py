"""Formatting: an example becomes the texts that the encoder reads.

query "how to sort", positive "sorted() returns ..." with the title "Sorting",
negative "reverse() ..." without a title

write ->
("task: search result | query: how to sort",
 "title: Sorting | text: sorted() returns ...",
 ("title: none | text: reverse() ...",))
"""

import dataclasses

from gecko_jax.data import jsonl, task_table
from gecko_jax.text import text_formats

# Private-use characters that stand for the texts of an example.
_TEXT_MARK = "\ue000"
_TITLE_MARK = "\ue001"
_TASK_MARK = "\ue002"


@dataclasses.dataclass(frozen=True)
class Templates:
    """The written forms of a task with markers for texts, for hashes and comparisons.

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


def write(
    text_format: text_formats.TextFormat, task: task_table.Task, pair: jsonl.Pair
) -> tuple[str, str, tuple[str, ...]]:
    """Returns query, positive and negatives of one example as the encoder reads them.

    A line's own task description is literal, even if it equals the name of a task.
    """
    own = pair.task_description
    description = (
        text_formats.clean(own) if own.strip() else text_format.describe(task.name)
    )

    def query(content: str) -> str:
        content = text_formats.clean(content)
        return text_format.format_query(content, task.name, description)

    def passage(content: str, title: str) -> str:
        if text_format.is_symmetric(task.name):
            return query(content)
        return text_format.format_passage(text_formats.clean(content), title)

    return (
        query(pair.query),
        passage(pair.positive, pair.title),
        tuple(map(passage, pair.negatives, pair.negative_titles)),
    )
