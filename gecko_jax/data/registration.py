"""Registration of tasks and mixtures with seqio, and their JSONL source.

seqio.get_mixture_or_task("quickstart")     after `register("quickstart")`

The shards of a task are its files, which the workers of a cache job share.
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
    seqio_vocabulary,
    task_table,
)
from gecko_jax.text import json_vocabularies, text_formats, vocabularies

# Examples handed to or fetched from TensorFlow at once: singly, each takes 2 ms.
BLOCK = 256

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
    """Registers a mixture or task of the table under its own name, for use by seqio.

    Training does not need this: it registers tasks under names that also depend on the
    format and the vocabulary. Repeated calls with one name have no effect. Returns the
    seqio Mixture or Task.
    """
    seqio = load_seqio()
    tasks, drawn = mixtures.resolve(mixture, prepared_dir)
    text_format = formatting.complete_text_format(
        text_format or text_formats.TextFormat(), tasks
    )
    vocabulary = vocabularies.load(vocabulary_path, extra_ids)
    if isinstance(vocabulary, json_vocabularies.JsonVocabulary):
        raise ValueError(
            f"{vocabulary_path}: t5x tells padding by the id 0, which may be a piece "
            "of a tokenizer.json; give a SentencePiece model, or train with `gecko "
            "train`"
        )
    for task in tasks:
        register_task(task, text_format, vocabulary, task.name)
    if mixture in mixtures.MIXTURES and mixture not in seqio.MixtureRegistry.names():
        names = [task.name for task in tasks]
        rates = drawn.rates(names, [task.num_examples or 1 for task in tasks])
        seqio.MixtureRegistry.add(mixture, list(zip(names, rates, strict=True)))
    return seqio.get_mixture_or_task(mixture)


def describe(
    provider: Any,
) -> tuple[text_formats.TextFormat, vocabularies.Vocabulary]:
    """Returns the text format and vocabulary of registered tasks.

    `provider` is a seqio Task or Mixture that `register` returned, or its name. The
    format has the descriptions of all tasks. Raises ValueError if a task is not from
    this module, or two tasks do not agree.
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
    descriptions: dict[str, str] = {}
    symmetric: dict[str, None] = {}
    for task in tasks:
        descriptions |= task.source.text_format.task_descriptions
        symmetric |= dict.fromkeys(task.source.text_format.symmetric_tasks)
    joint = {"task_descriptions": descriptions, "symmetric_tasks": tuple(symmetric)}
    settings = [
        (dataclasses.replace(task.source.text_format, **joint), task.source.vocabulary)
        for task in tasks
    ]
    if settings.count(settings[0]) < len(settings):
        raise ValueError(
            f"{provider.name}: its tasks were registered with different text formats "
            "or vocabularies; register all of them with the same"
        )
    return settings[0]


def register_task(
    task: task_table.Task,
    text_format: text_formats.TextFormat,
    vocabulary: vocabularies.Vocabulary,
    name: str | None = None,
) -> Any:
    """Registers one seqio Task, unless its name is registered, and returns it.

    The format has the task's description, and the vocabulary is from
    `vocabularies.load`. The default name is the task's and a hash of the rest.
    """
    seqio = load_seqio()
    forms = formatting.templates(text_format, task.name)
    if name is None:
        plain = dataclasses.replace(task, preprocessor=None)
        facts = json.dumps([dataclasses.asdict(plain), dataclasses.asdict(forms)])
        digest = hashlib.sha256(f"{facts}{vocabulary.fingerprint}".encode()).hexdigest()
        name = f"{re.sub(r'[^A-Za-z0-9_.]', '_', task.name)}:{digest[:16]}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    wrapped = seqio_vocabulary.wrap(vocabulary)
    return seqio.TaskRegistry.add(
        name,
        source=_source_class()(task, text_format, vocabulary),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
            flatten,
            seqio.CacheDatasetPlaceholder(),
            restore,
        ],
        output_features=_output_features(wrapped, task.scores),
        metric_fns=[],
    )


def _output_features(vocabulary: Any, scores: bool) -> dict[str, Any]:
    """Returns the features of every task; a mixture drops all others."""
    seqio = load_seqio()
    import tensorflow as tf

    text = functools.partial(seqio.Feature, vocabulary, add_eos=True)
    # Numbers pass through this vocabulary unchanged, whatever its size.
    numbers = seqio.PassThroughVocabulary(size=0)
    number = functools.partial(seqio.Feature, numbers, add_eos=False)
    return {
        "query": text(rank=1),
        "positive": text(rank=1),
        "negatives": text(rank=2),
        "query_id": number(rank=1, dtype=tf.uint32),
        "passage_id": number(rank=1, dtype=tf.uint32),
        "negative_ids": number(rank=2, dtype=tf.uint32),
        "negative_group": number(rank=0, dtype=tf.int32),
        **({"scores": number(rank=1, dtype=tf.float32)} if scores else {}),
    }


def flatten(dataset: Any) -> Any:
    """Makes examples fit into tf.Example, which has no ragged tensors and no uint32.

    {"negatives": [[5, 6, 1], [7, 1]], ...}
    -> {"negatives": [5, 6, 1, 7, 1], "negative_lengths": [3, 2], ...}
    """
    import tensorflow as tf

    def flatten_record(record: dict[str, Any]) -> dict[str, Any]:
        negatives = record["negatives"]
        return {
            **record,
            **{name: tf.cast(record[name], tf.int64) for name in _IDS},
            "negatives": negatives.flat_values,
            "negative_lengths": negatives.row_lengths(),
        }

    return dataset.map(flatten_record, num_parallel_calls=tf.data.AUTOTUNE)


def restore(dataset: Any) -> Any:
    """Inverse of `flatten`."""
    import tensorflow as tf

    ragged: Any = tf.RaggedTensor  # Its type stubs lack its methods.

    def restore_record(record: dict[str, Any]) -> dict[str, Any]:
        names = (*TEXTS, "negative_group")
        restored = {
            **record,
            **{name: tf.cast(record[name], tf.uint32) for name in _IDS},
            **{name: tf.cast(record[name], tf.int32) for name in names},
        }
        # Kept, because seqio pads the negatives of an example to equal length.
        lengths = restored["negative_lengths"]
        negatives = ragged.from_row_lengths(restored["negatives"], lengths)
        return restored | {"negatives": negatives}

    return dataset.map(restore_record, num_parallel_calls=tf.data.AUTOTUNE)


@functools.cache
def _source_class() -> Any:
    seqio = load_seqio()
    import tensorflow as tf

    class JsonlSource(seqio.DataSource):
        """The formatted examples of a task, in the order of its files and lines."""

        def __init__(
            self,
            task: task_table.Task,
            text_format: text_formats.TextFormat,
            vocabulary: vocabularies.Vocabulary,
        ):
            self.text_format = text_format
            self.vocabulary = vocabulary
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
            # Keep the order of the lines: training shuffles the numbers of examples.
            del shuffle, seed, options
            paths = self._files[split]
            shards = range(len(paths))
            if shard_info is not None:
                shards = shards[shard_info.index :: shard_info.num_shards]
            scores = tf.RaggedTensorSpec((None, None), tf.float32, 1)
            dataset = tf.data.Dataset.from_generator(
                functools.partial(
                    _column_blocks, paths, self._task, self.text_format, shards
                ),
                output_signature={
                    "query": tf.TensorSpec((None,), tf.string),
                    "positive": tf.TensorSpec((None,), tf.string),
                    "negatives": tf.RaggedTensorSpec((None, None), tf.string, 1),
                    "query_id": tf.TensorSpec((None, 2), tf.uint32),
                    "passage_id": tf.TensorSpec((None, 2), tf.uint32),
                    "negative_ids": tf.RaggedTensorSpec((None, None, 2), tf.uint32, 1),
                    "negative_group": tf.TensorSpec((None,), tf.int32),
                    "place": tf.TensorSpec((None, 2), tf.int64),
                    **({"scores": scores} if self._task.scores else {}),
                },
            )
            return dataset.unbatch()

    return JsonlSource


def _column_blocks(
    paths: Sequence[str],
    task: task_table.Task,
    text_format: text_formats.TextFormat,
    shards: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Yields the formatted examples of some of a split's files, `BLOCK` at a time.

    The place of an example is the number of its file, and its number among the task's
    examples there.
    """
    import tensorflow as tf

    ragged: Any = tf.RaggedTensor  # Its type stubs lack its methods.
    pairs = (
        ((shard, number), classification.append_id(pair) if task.unique_ids else pair)
        for shard in shards
        for number, pair in enumerate(jsonl.read_pairs(paths[shard], task.source_task))
    )
    while placed := list(itertools.islice(pairs, BLOCK)):
        places, block = zip(*placed, strict=True)
        texts = [formatting.write(text_format, task, pair) for pair in block]
        queries, positives, negatives = zip(*texts, strict=True)
        lengths = list(map(len, negatives))
        negative_ids = [words for pair in block for words in pair.negative_ids]
        scores = {}
        if task.scores:
            values = [score for pair in block for score in pair.scores]
            scores["scores"] = ragged.from_row_lengths(
                np.array(values, np.float32), [len(pair.scores) for pair in block]
            )
        yield {
            "query": list(queries),
            "positive": list(positives),
            "negatives": ragged.from_row_lengths(
                tf.constant(list(itertools.chain(*negatives)), tf.string), lengths
            ),
            "query_id": np.array([pair.query_id for pair in block], np.uint32),
            "passage_id": np.array([pair.passage_id for pair in block], np.uint32),
            "negative_ids": ragged.from_row_lengths(
                np.array(negative_ids, np.uint32).reshape(-1, 2), lengths
            ),
            "negative_group": [pair.negative_group for pair in block],
            "place": np.array(places, np.int64),
            **scores,
        }
