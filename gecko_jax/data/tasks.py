"""The one table of tasks and mixtures, and their registration with seqio.

A data set is a row of `TASKS`; a mixture names tasks and their rates. A user's own
files need no row: each value of the field `task` in them becomes a task.

    seqio.get_mixture_or_task("quickstart")     after `register("quickstart")`
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax import text, vocabulary
from gecko_jax.data import jsonl, load_seqio, preprocessors

# Examples read at once.
_BLOCK = 256

QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart"
QUICKSTART_VOCABULARY = QUICKSTART / "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the table.

    Attributes:
        name: Known to configs, metrics and seqio.
        files: JSONL files, see `gecko_jax.data.jsonl`.
        source_task: Value of the field `task` that chooses the lines.
        task_description: The paper's *t*, written before every query.
        symmetric: Passages are written in the query form.
        licence: Of the texts.
        num_examples: Lines chosen; None when it is only known by reading.
        touches: Evaluation sets whose texts or near duplicates the data may hold.
    """

    name: str
    files: tuple[str, ...]
    source_task: str
    task_description: str
    symmetric: bool = False
    licence: str = "unknown"
    num_examples: int | None = None
    touches: tuple[str, ...] = ()


_QUICKSTART_TRAIN = (str(QUICKSTART / "train.jsonl"),)

TASKS: tuple[Task, ...] = (
    Task(
        name="quickstart_docs",
        files=_QUICKSTART_TRAIN,
        source_task="docs",
        task_description="search result",
        licence="PostgreSQL, PSF-2.0, public domain",
        num_examples=1374,
    ),
    Task(
        name="quickstart_wordnet",
        files=_QUICKSTART_TRAIN,
        source_task="wordnet",
        task_description="dictionary definition",
        licence="WordNet-3.0",
        num_examples=1170,
    ),
    Task(
        name="quickstart_code",
        files=_QUICKSTART_TRAIN,
        source_task="code",
        task_description="code retrieval",
        licence="BSD-3-Clause, Apache-2.0",
        num_examples=776,
        touches=("CodeSearchNet",),
    ),
    Task(
        name="quickstart_term",
        files=_QUICKSTART_TRAIN,
        source_task="term",
        task_description="question answering",
        licence="public domain",
        num_examples=508,
    ),
)

# Mixture -> task -> rate; None is the number of examples, so that every example is
# equally likely.
MIXTURES: Mapping[str, Mapping[str, float | None]] = {
    "quickstart": {
        "quickstart_docs": None,
        "quickstart_wordnet": None,
        "quickstart_code": None,
        "quickstart_term": None,
    },
}


def vocabulary_path(name: str) -> str:
    """Returns the file of `data.vocabulary`: a path, or the bundled "quickstart"."""
    return str(QUICKSTART_VOCABULARY) if name == "quickstart" else name


def resolve(mixture: str) -> tuple[tuple[Task, ...], tuple[float | None, ...]]:
    """Returns the tasks of a mixture, or of one task's name, and their rates.

    Raises:
        ValueError: Neither table knows the name.
    """
    table = {task.name: task for task in TASKS}
    if mixture in MIXTURES:
        rates = MIXTURES[mixture]
        return tuple(table[name] for name in rates), tuple(rates.values())
    if mixture in table:
        return (table[mixture],), (None,)
    known = ", ".join([*MIXTURES, *table])
    raise ValueError(
        f"mixture {mixture!r} is unknown: choose one of {known}, or give files of your "
        "own as data.files"
    )


def from_files(
    files: Sequence[str | os.PathLike],
    examples: Sequence[Mapping[str, int]],
    text_format: text.TextFormat,
) -> tuple[Task, ...]:
    """Returns a task for each value of the field `task` in the files.

    Args:
        files: JSONL files.
        examples: Number of examples of each task, file by file.
        text_format: Gives the descriptions; a task without one describes itself.
    """
    sizes: dict[str, int] = {}
    for counts in examples:
        for name, count in counts.items():
            sizes[name] = sizes.get(name, 0) + count
    return tuple(
        Task(
            name=name,
            files=tuple(
                os.fspath(file)
                for file, counts in zip(files, examples, strict=True)
                if name in counts
            ),
            source_task=name,
            task_description=text_format.describe(name),
            symmetric=text_format.is_symmetric(name),
            num_examples=size,
        )
        for name, size in sizes.items()
    )


def complete_text_format(
    text_format: text.TextFormat, tasks: Sequence[Task]
) -> text.TextFormat:
    """Adds the tasks' descriptions to the format that goes with the checkpoint.

    A task is known both by its name and by the word its files use for it, as held-out
    queries in the same layout do. Descriptions that are there already stay.
    """
    descriptions: dict[str, str] = {}
    for task in tasks:
        descriptions.setdefault(task.source_task, task.task_description)
    descriptions |= {task.name: task.task_description for task in tasks}
    symmetric = dict.fromkeys(text_format.symmetric_tasks)
    symmetric |= dict.fromkeys(task.name for task in tasks if task.symmetric)
    return dataclasses.replace(
        text_format,
        task_descriptions=descriptions | dict(text_format.task_descriptions),
        symmetric_tasks=tuple(symmetric),
    )


def register(
    mixture: str = "quickstart",
    *,
    vocabulary_path: str | os.PathLike = QUICKSTART_VOCABULARY,
    extra_ids: int = 0,
    text_format: text.TextFormat | None = None,
) -> Any:
    """Registers a mixture of the table under its own name, for use through seqio.

    Training does not need this: it registers the tasks it reads under names that hold
    the format and the vocabulary too. Calling it again with the same name does nothing.

    Returns:
        The seqio Mixture, or the Task when `mixture` names one.
    """
    seqio = load_seqio()
    tasks, rates = resolve(mixture)
    text_format = complete_text_format(text_format or text.TextFormat(), tasks)
    for task in tasks:
        register_task(task, text_format, vocabulary_path, extra_ids, task.name)
    if mixture in MIXTURES and mixture not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(
            mixture,
            [
                (task.name, float(rate or task.num_examples or 1))
                for task, rate in zip(tasks, rates, strict=True)
            ],
        )
    return seqio.get_mixture_or_task(mixture)


def register_task(
    task: Task,
    text_format: text.TextFormat,
    vocabulary_path: str | os.PathLike,
    extra_ids: int = 0,
    name: str | None = None,
) -> Any:
    """Registers one seqio Task, unless there is one of that name, and returns it.

    Args:
        task: A row of the table, or one made by `from_files`.
        text_format: Already completed with the task's description.
        vocabulary_path: A SentencePiece `.model` file.
        extra_ids: Sentinels to add to it.
        name: In seqio's registry; by default the task's and a hash of the rest.
    """
    seqio = load_seqio()
    model = vocabulary.load(vocabulary_path, extra_ids)
    forms = preprocessors.templates(text_format, task.name)
    if name is None:
        facts = json.dumps([dataclasses.asdict(task), dataclasses.asdict(forms)])
        digest = hashlib.sha256(f"{facts}{model.fingerprint}".encode()).hexdigest()
        name = f"{re.sub(r'[^A-Za-z0-9_.]', '_', task.name)}:{digest[:16]}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    pieces = seqio.SentencePieceVocabulary(os.fspath(vocabulary_path), extra_ids)
    # seqio reads a path once in a process, whatever happens to the file later.
    if pieces.tokenizer.serialized_model_proto() != model.full_proto:
        raise ValueError(
            f"{vocabulary_path}: has changed since this process first read it; start "
            "again, or give the new vocabulary another name"
        )
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, task=task),
            splits=("train",),
            num_input_examples=(
                None if task.num_examples is None else {"train": task.num_examples}
            ),
        ),
        preprocessors=[
            functools.partial(preprocessors.format_texts, forms=forms),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "query": seqio.Feature(pieces, add_eos=True),
            "positive": seqio.Feature(pieces, add_eos=True),
            "negatives": seqio.Feature(pieces, add_eos=True, rank=2),
        },
        metric_fns=[],
    )


def _dataset(
    split: str, shuffle_files: bool, seed: int | None = None, *, task: Task
) -> Any:
    """Reads a task's files into a `tf.data.Dataset`, in the order of the lines."""
    import tensorflow as tf

    del split, shuffle_files, seed
    strings = tf.TensorSpec((None,), tf.string)
    words = tf.TensorSpec((None, 2), tf.uint32)
    numbers = tf.TensorSpec((None,), tf.int32)
    columns = {
        "query": strings,
        "positive": strings,
        "title": strings,
        "negatives": tf.TensorSpec((None, None), tf.string),
        "negative_titles": tf.TensorSpec((None, None), tf.string),
        "query_id": words,
        "passage_id": words,
        "negative_ids": tf.TensorSpec((None, None, 2), tf.uint32),
        "negative_group": numbers,
        "num_negatives": numbers,
    }

    def drop_padding(record: dict[str, Any]) -> dict[str, Any]:
        kept = dict(record)
        count = kept.pop("num_negatives")
        for name in ("negatives", "negative_titles", "negative_ids"):
            kept[name] = kept[name][:count]
        return kept

    # One record at a time, a generator costs 2 ms of TensorFlow's for each.
    dataset = tf.data.Dataset.from_generator(
        functools.partial(_column_blocks, task), output_signature=columns
    )
    return dataset.unbatch().map(drop_padding)


def _column_blocks(task: Task) -> Iterator[dict[str, Any]]:
    """Yields the task's cleaned examples in columns, `_BLOCK` at a time."""
    pairs = itertools.chain.from_iterable(
        jsonl.read_pairs(file, task.source_task) for file in task.files
    )
    while block := list(itertools.islice(pairs, _BLOCK)):
        # At least one column: TensorFlow 2.21 crashes when it unbatches none.
        widest = max(1, *(len(pair.negatives) for pair in block))

        def pad(texts: Sequence[str], widest: int = widest) -> list[str]:
            return [_clean(t) for t in texts] + [""] * (widest - len(texts))

        negative_ids = np.zeros((len(block), widest, 2), np.uint32)
        for row, pair in enumerate(block):
            if pair.negatives:
                negative_ids[row, : len(pair.negatives)] = pair.negative_ids
        yield {
            "query": [_clean(pair.query) for pair in block],
            "positive": [_clean(pair.positive) for pair in block],
            "title": [_clean(pair.title) for pair in block],
            "negatives": [pad(pair.negatives) for pair in block],
            "negative_titles": [pad(pair.negative_titles) for pair in block],
            "query_id": np.array([pair.query_id for pair in block], np.uint32),
            "passage_id": np.array([pair.passage_id for pair in block], np.uint32),
            "negative_ids": negative_ids,
            "negative_group": [pair.negative_group for pair in block],
            "num_negatives": [len(pair.negatives) for pair in block],
        }


def _clean(content: str) -> str:
    return text.clean(content) if content.strip() else ""
