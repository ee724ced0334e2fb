"""What a config's data names: tasks with their sources, and the keys of their caches.

select(mixture="gecko_academic", files=(), ...).tasks    rows of the table
select(mixture="", files=("pairs.jsonl",), ...).tasks    made for the files
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from gecko_jax.data import cache, mixtures, task_table
from gecko_jax.text import text_formats, vocabularies


@dataclasses.dataclass(frozen=True)
class Selection:
    """Tasks, and what their tokens depend on.

    Attributes:
        tasks: Rows of the table, or those made for the files, with their sizes.
        mixture: How often each is drawn.
        text_format: As given, completed with the descriptions of these tasks.
        sources: Checksums of each task's files.
        keys: Of each task's cache.
    """

    tasks: tuple[task_table.Task, ...]
    mixture: mixtures.Mixture
    text_format: text_formats.TextFormat
    sources: tuple[tuple[str, ...], ...]
    keys: tuple[str, ...]


def select(
    *,
    mixture: str,
    files: Sequence[str | os.PathLike],
    vocabulary: vocabularies.Vocabulary,
    text_format: text_formats.TextFormat,
    cache_dir: str | os.PathLike,
    prepared_dir: str | os.PathLike = mixtures.PREPARED,
    unique_ids: bool = False,
) -> Selection:
    """Finds the tasks of a mixture or of files, reading new sources through once.

    With `unique_ids` the texts of classification triples end with an id, see
    `classification.append_id`.

    Raises:
        ValueError: An unknown mixture, a bad file or line, a task without a line.
    """
    folder = pathlib.Path(cache_dir)
    if files:
        tasks, drawn = tasks_of_files(files, text_format, folder)
    else:
        tasks, drawn = mixtures.resolve(mixture, prepared_dir)
    text_format = task_table.complete_text_format(text_format, tasks)
    sized, sources, keys = [], [], []
    for task in tasks:
        task = dataclasses.replace(task, unique_ids=unique_ids)
        found = [cache.summarize_source(path, folder) for path in task.files]
        size = sum(source.examples.get(task.source_task, 0) for source in found)
        if not size:
            raise ValueError(
                f"task {task.name}: no line of {', '.join(task.files)} has the "
                f"task {task.source_task!r}"
            )
        sized.append(dataclasses.replace(task, num_examples=size))
        sources.append(tuple(source.sha256 for source in found))
        keys.append(cache.key(task, found, text_format, vocabulary))
    return Selection(tuple(sized), drawn, text_format, tuple(sources), tuple(keys))


def tasks_of_files(
    files: Sequence[str | os.PathLike],
    text_format: text_formats.TextFormat,
    cache_dir: pathlib.Path,
) -> tuple[tuple[task_table.Task, ...], mixtures.Mixture]:
    """Returns the tasks of a user's own files, and their mixture by size.

    Raises:
        ValueError: A file is missing, empty or holds a bad line.
    """
    paths = [os.fspath(path) for path in files]
    summaries = [cache.summarize_source(path, cache_dir) for path in paths]
    tasks = task_table.from_files(
        paths, [summary.examples for summary in summaries], text_format
    )
    return tasks, mixtures.Mixture(tuple(task.name for task in tasks))
