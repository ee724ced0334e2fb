"""Formatting: an example becomes the texts that the encoder reads.

query "how to sort", positive "sorted() returns ..." with the title "Sorting",
negative "reverse() ..." without a title

write ->
("task: search result | query: how to sort",
 "title: Sorting | text: sorted() returns ...",
 ("title: none | text: reverse() ...",))
"""

import dataclasses
from collections.abc import Sequence

from gecko_jax.data import jsonl, task_table
from gecko_jax.text import text_formats, vocabularies

# Private-use characters that stand for the texts of an example.
_TEXT_MARK = "\ue000"
_TITLE_MARK = "\ue001"
_TASK_MARK = "\ue002"


def complete_text_format(
    text_format: text_formats.TextFormat,
    tasks: Sequence[task_table.Task],
    vocabulary: vocabularies.Vocabulary | None = None,
) -> text_formats.TextFormat:
    """Adds the descriptions of tasks to a format, which keeps those it has.

    Each task is listed by its name and by its `source_task`, because held-out queries
    in the layout of the files use the latter. A format of only prompts cannot write
    descriptions and gets none. The kind of the vocabulary decides whether texts are
    cleaned, so its fingerprint identifies this in keys of caches, too.
    """
    descriptions: dict[str, str] = {}
    for task in tasks:
        descriptions.setdefault(task.source_task, task.task_description)
    descriptions |= {task.name: task.task_description for task in tasks}
    symmetric = dict.fromkeys(text_format.symmetric_tasks)
    symmetric |= dict.fromkeys(task.name for task in tasks if task.symmetric)
    if text_format.has_only_prompts:
        descriptions = {}
    return dataclasses.replace(
        text_format,
        task_descriptions=descriptions | dict(text_format.task_descriptions),
        symmetric_tasks=tuple(symmetric),
        verbatim=vocabulary is not None and vocabulary.verbatim,
    )


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

    def body(content: str) -> str:
        return content if text_format.verbatim else text_formats.clean(content)

    def query(content: str) -> str:
        return text_format.format_query(body(content), task.name, description)

    def passage(content: str, title: str) -> str:
        if text_format.is_symmetric(task.name):
            return query(content)
        return text_format.format_passage(body(content), title)

    return (
        query(pair.query),
        passage(pair.positive, pair.title),
        tuple(map(passage, pair.negatives, pair.negative_titles)),
    )
