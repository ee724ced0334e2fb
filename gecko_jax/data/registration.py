"""Registration of tasks and mixtures with seqio, and reading JSONL for it.

seqio.get_mixture_or_task("quickstart")     after `register("quickstart")`

A task's files are its shards, so that a cache job shares them among its workers.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gecko_jax.data import (
    classification,
    formatting,
    jsonl,
    load_seqio,
    mixtures,
    task_table,
)
from gecko_jax.text import text_formats, vocabularies

# Examples read at once.
_BLOCK = 256

TEXTS = ("query", "positive", "negatives")
_IDS = ("query_id", "passage_id", "negative_ids")


def register(
    mixture: str = "quickstart",
    *,
    vocabulary_path: str | os.PathLike = task_table.QUICKSTART_VOCABULARY,
    extra_ids: int = 0,
    text_format: text_formats.TextFormat | None = None,
    prepared_dir: str | os.PathLike = mixtures.PREPARED,
) -> Any:
    """Registers a mixture of the table under its own name, for use through seqio.

    Training does not need this: it registers the tasks it reads under names that hold
    the format and the vocabulary too. Calling it again with the same name does nothing.

    Returns:
        The seqio Mixture, or the Task when `mixture` names one.
    """
    seqio = load_seqio()
    tasks, weights = mixtures.resolve(mixture, prepared_dir)
    text_format = task_table.complete_text_format(
        text_format or text_formats.TextFormat(), tasks
    )
    for task in tasks:
        register_task(task, text_format, vocabulary_path, extra_ids, task.name)
    if mixture in mixtures.MIXTURES and mixture not in seqio.MixtureRegistry.names():
        sizes = [task.num_examples or 1 for task in tasks]
        rates = weights.rates([task.name for task in tasks], sizes)
        seqio.MixtureRegistry.add(
            mixture, list(zip((task.name for task in tasks), rates, strict=True))
        )
    return seqio.get_mixture_or_task(mixture)


@dataclasses.dataclass(frozen=True)
class Registered:
    """What a checkpoint that was trained on registered tasks must keep of them.

    Attributes:
        text_format: How queries and passages are written, every task described.
        vocabulary_proto: The serialized SentencePiece model, without sentinels.
        extra_ids: Sentinels after its pieces.
    """

    text_format: text_formats.TextFormat
    vocabulary_proto: bytes
    extra_ids: int


def describe(provider: Any) -> Registered:
    """Returns what tasks were registered with.

    Args:
        provider: A seqio Task or Mixture that `register` returns, or its name.

    Raises:
        ValueError: A task was registered elsewhere, or two of them do not agree.
    """
    seqio = load_seqio()
    if isinstance(provider, str):
        provider = seqio.get_mixture_or_task(provider)
    tasks = seqio.get_subtasks(provider)
    foreign = [t.name for t in tasks if not isinstance(t.source, _source_class())]
    if foreign:
        raise ValueError(
            f"{provider.name}: the task {foreign[0]} is not one of gecko_jax; register "
            "it with gecko_jax.data.registration.register_task"
        )
    formats = [task.source.text_format for task in tasks]
    pieces = [task.output_features["query"].vocabulary for task in tasks]
    descriptions: dict[str, str] = {}
    symmetric: dict[str, None] = {}
    for text_format in formats:
        descriptions |= text_format.task_descriptions
        symmetric |= dict.fromkeys(text_format.symmetric_tasks)
    merged = [
        dataclasses.replace(
            text_format,
            task_descriptions=descriptions,
            symmetric_tasks=tuple(symmetric),
        )
        for text_format in formats
    ]
    if any(other != merged[0] for other in merged) or any(
        other != pieces[0] for other in pieces
    ):
        raise ValueError(
            f"{provider.name}: its tasks were registered with different text formats "
            "or vocabularies; register all of them with the same"
        )
    path, extra_ids = pieces[0].sentencepiece_model_file, pieces[0].extra_ids
    proto = vocabularies.load(path, extra_ids).model_proto
    return Registered(merged[0], proto, extra_ids)


def register_task(
    task: task_table.Task,
    text_format: text_formats.TextFormat,
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
    model = vocabularies.load(vocabulary_path, extra_ids)
    forms = formatting.templates(text_format, task.name)
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
        source=_source_class()(task, text_format),
        preprocessors=[
            functools.partial(formatting.format_texts, forms=forms),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
            flatten,
            seqio.CacheDatasetPlaceholder(),
            restore,
        ],
        output_features=_output_features(pieces),
        metric_fns=[],
    )


def _output_features(pieces: Any) -> dict[str, Any]:
    """Returns the features of every task: a mixture drops all others."""
    seqio = load_seqio()
    import tensorflow as tf

    def text_feature(rank: int) -> Any:
        return seqio.Feature(pieces, add_eos=True, rank=rank)

    def number_feature(rank: int, dtype: Any) -> Any:
        # Not tokens: the vocabulary hands them through, and its size is not used.
        passed = seqio.PassThroughVocabulary(size=0)
        return seqio.Feature(passed, add_eos=False, rank=rank, dtype=dtype)

    return {
        "query": text_feature(1),
        "positive": text_feature(1),
        "negatives": text_feature(2),
        "query_id": number_feature(1, tf.uint32),
        "passage_id": number_feature(1, tf.uint32),
        "negative_ids": number_feature(2, tf.uint32),
        "negative_group": number_feature(0, tf.int32),
    }


def flatten(dataset: Any) -> Any:
    """Writes examples as a tf.Example can hold them; `restore` reads them again.

    {"negatives": [[5, 6, 1], [7, 1]], ...}
    -> {"negatives": [5, 6, 1, 7, 1], "negative_lengths": [3, 2], ...}

    Ids become int64, the one kind of whole number that there is.
    """
    import tensorflow as tf

    def flatten_record(record: dict[str, Any]) -> dict[str, Any]:
        negatives = record["negatives"]
        return (
            record
            | {name: tf.cast(record[name], tf.int64) for name in _IDS}
            | {
                "negatives": negatives.flat_values,
                "negative_lengths": negatives.row_lengths(),
            }
        )

    return dataset.map(flatten_record, num_parallel_calls=tf.data.AUTOTUNE)


def restore(dataset: Any) -> Any:
    """Inverse of `flatten`."""
    import tensorflow as tf

    ragged: Any = tf.RaggedTensor  # Its types do not name its methods.

    def restore_record(record: dict[str, Any]) -> dict[str, Any]:
        restored = record | {
            name: tf.cast(record[name], tf.int32)
            for name in ("query", "positive", "negative_group")
        }
        lengths = restored.pop("negative_lengths")
        negatives = tf.cast(record["negatives"], tf.int32)
        return (
            restored
            | {name: tf.cast(record[name], tf.uint32) for name in _IDS}
            | {"negatives": ragged.from_row_lengths(negatives, lengths)}
        )

    return dataset.map(restore_record, num_parallel_calls=tf.data.AUTOTUNE)


@functools.cache
def _source_class() -> Any:
    seqio = load_seqio()

    class JsonlSource(seqio.DataSource):
        """The examples of a task, in the order of its files and their lines.

        Attributes:
            text_format: How the task writes texts.
        """

        def __init__(self, task: task_table.Task, text_format: text_formats.TextFormat):
            self.text_format = text_format
            self._task = task
            self._files = {"train": task.files}
            if task.validation_files:
                self._files["validation"] = task.validation_files
            super().__init__(splits=tuple(self._files))

        @property
        def supports_arbitrary_sharding(self) -> bool:
            return False

        def num_input_examples(self, split: str) -> int | None:
            return self._task.num_examples if split == "train" else None

        def list_shards(self, split: str) -> Sequence[str]:
            return self._files[split]

        def get_dataset(
            self,
            split: str = "train",
            shuffle: bool = False,
            seed: int | None = None,
            shard_info: Any = None,
            **options: Any,
        ) -> Any:
            # The order is that of the lines, whatever is asked for: what training
            # shuffles are the numbers of the examples.
            del shuffle, seed, options
            paths = self._files[split]
            chosen = range(len(paths))
            if shard_info is not None:
                chosen = chosen[shard_info.index :: shard_info.num_shards]
            return _dataset(paths, self._task, chosen)

    return JsonlSource


def _dataset(paths: Sequence[str], task: task_table.Task, chosen: Sequence[int]) -> Any:
    """Reads some of a split's files into a `tf.data.Dataset`."""
    import tensorflow as tf

    strings = tf.TensorSpec((None,), tf.string)
    words = tf.TensorSpec((None, 2), tf.uint32)
    numbers = tf.TensorSpec((None,), tf.int32)
    columns = {
        "query": strings,
        "task_description": strings,
        "positive": strings,
        "title": strings,
        "negatives": tf.TensorSpec((None, None), tf.string),
        "negative_titles": tf.TensorSpec((None, None), tf.string),
        "query_id": words,
        "passage_id": words,
        "negative_ids": tf.TensorSpec((None, None, 2), tf.uint32),
        "negative_group": numbers,
        "num_negatives": numbers,
        "place": tf.TensorSpec((None, 2), tf.int64),
    }

    def drop_padding(record: dict[str, Any]) -> dict[str, Any]:
        kept = dict(record)
        count = kept.pop("num_negatives")
        for name in ("negatives", "negative_titles", "negative_ids"):
            kept[name] = kept[name][:count]
        return kept

    # One record at a time, a generator costs 2 ms of TensorFlow's for each.
    dataset = tf.data.Dataset.from_generator(
        functools.partial(_column_blocks, paths, task, chosen),
        output_signature=columns,
    )
    return dataset.unbatch().map(drop_padding)


def _column_blocks(
    paths: Sequence[str], task: task_table.Task, chosen: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yields the cleaned examples of some of a split's files, `_BLOCK` at a time.

    The place of an example is the number of its file, and its own among the task's
    examples there.
    """
    pairs = (
        ((file, number), pair)
        for file in chosen
        for number, pair in enumerate(jsonl.read_pairs(paths[file], task.source_task))
    )
    while placed := list(itertools.islice(pairs, _BLOCK)):
        places, block = zip(*placed, strict=True)
        if task.unique_ids:
            block = tuple(map(classification.append_id, block))
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
            "task_description": [_clean(pair.task_description) for pair in block],
            "positive": [_clean(pair.positive) for pair in block],
            "title": [_clean(pair.title) for pair in block],
            "negatives": [pad(pair.negatives) for pair in block],
            "negative_titles": [pad(pair.negative_titles) for pair in block],
            "query_id": np.array([pair.query_id for pair in block], np.uint32),
            "passage_id": np.array([pair.passage_id for pair in block], np.uint32),
            "negative_ids": negative_ids,
            "negative_group": [pair.negative_group for pair in block],
            "num_negatives": [len(pair.negatives) for pair in block],
            "place": np.array(places, np.int64),
        }


def _clean(content: str) -> str:
    return text_formats.clean(content) if content.strip() else ""
