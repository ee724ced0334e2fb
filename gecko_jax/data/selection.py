"""Selection: a config's data settings become tasks, their sources and cache keys.

select(mixture="gecko_academic", files=(), ...).tasks    rows of the table
select(mixture="", files=("pairs.jsonl",), ...).tasks    tasks made from the files
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from gecko_jax.data import cache, formatting, mixtures, task_table
from gecko_jax.text import text_formats, vocabularies


@dataclasses.dataclass(frozen=True)
class Selection:
    """Tasks, and everything their tokens depend on."""

    tasks: tuple[task_table.Task, ...]  # rows of the table or of files, with sizes
    mixture: mixtures.Mixture
    text_format: text_formats.TextFormat  # completed with the tasks' descriptions
    vocabulary: vocabularies.Vocabulary
    cache_dir: pathlib.Path
    sources: tuple[tuple[str, ...], ...]  # checksums of each task's files
    keys: tuple[str, ...]  # key of each task's cache


def select(
    *,
    mixture: str,
    files: Sequence[str | os.PathLike],
    vocabulary: vocabularies.Vocabulary,
    text_format: text_formats.TextFormat,
    cache_dir: str | os.PathLike,
    prepared_dir: str | os.PathLike = mixtures.PREPARED,
    unique_ids: bool = False,
    scores: bool = False,
) -> Selection:
    """Returns the tasks of a mixture or of files; reads new source files once.

    A user's own `files` replace the mixture, which may be a single task of the table;
    each of their tasks is drawn by its size. The descriptions of `text_format` override
    the tasks'. The vocabulary is from `vocabularies.load`, because seqio reads the file
    again. Runs may share `cache_dir`. Raises ValueError if the mixture is unknown, a
    file or line is invalid, or a task has no line.
    """
    folder = pathlib.Path(cache_dir)
    if files:
        tasks, drawn = tasks_of_files(files, text_format, folder)
    else:
        tasks, drawn = mixtures.resolve(mixture, prepared_dir)
    text_format = formatting.complete_text_format(text_format, tasks, vocabulary)
    sized, sources, keys = [], [], []
    for task in tasks:
        summaries = [cache.summarize_source(path, folder) for path in task.files]
        size = sum(counts.get(task.source_task, 0) for _, counts in summaries)
        if not size:
            raise task_table.no_lines(task)
        task = dataclasses.replace(
            task, unique_ids=unique_ids, scores=scores, num_examples=size
        )
        sized.append(task)
        sources.append(tuple(digest for digest, _ in summaries))
        keys.append(cache.key(task, sources[-1], text_format, vocabulary))
    tasks = tuple(sized)
    return Selection(
        tasks, drawn, text_format, vocabulary, folder, tuple(sources), tuple(keys)
    )


def tasks_of_files(
    files: Sequence[str | os.PathLike],
    text_format: text_formats.TextFormat,
    cache_dir: pathlib.Path,
) -> tuple[tuple[task_table.Task, ...], mixtures.Mixture]:
    """Returns the tasks of a user's own files, and their mixture by size.

    Raises ValueError if a file is missing, empty or has an invalid line.
    """
    counts = [cache.summarize_source(str(path), cache_dir)[1] for path in files]
    tasks = task_table.from_files(files, counts, text_format)
    return tasks, mixtures.Mixture(tuple(task.name for task in tasks))
