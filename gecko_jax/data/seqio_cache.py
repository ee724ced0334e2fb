"""Caches of seqio's Apache Beam job: written on many machines, read by training.

    <cache_dir>/seqio/<task>/<hash>/train.tfrecord-00000-of-00003 ...
    <cache_dir>/seqio/<task>/<hash>/info.train.json, stats.train.json, COMPLETED

The layout is seqio's: a task registered as `<task>:<hash>` reads it with
`use_cached=True` if `<cache_dir>/seqio` is one of seqio's cache folders. The workers
share a task's files, and Beam returns examples in any order. Each example stores its
place in the source, so training gives it the same number as without Beam.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from gecko_jax.data import load_seqio, registration, task_table
from gecko_jax.io import reading, writing
from gecko_jax.text import text_formats, vocabularies

_COMPLETED, _INFO, _STATS = "COMPLETED", "info.train.json", "stats.train.json"
_REMEDY = "delete it, and run `gecko data cache` again or let training tokenize"

# Examples of an output file.
_SHARD = 50_000


def task_name(task: task_table.Task, key: str) -> str:
    """Returns the task's name in seqio's registry, given the key of its cache."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.name)[:64]}:{key}"


def folder(task: task_table.Task, key: str, cache_dir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the task's cache, which may not exist."""
    return cache_dir.joinpath("seqio", *task_name(task, key).split(":"))


def find(
    task: task_table.Task, key: str, cache_dir: pathlib.Path
) -> pathlib.Path | None:
    """Returns the folder of the task's finished cache, or None.

    Raises ValueError if the cache is half-written or lacks files.
    """
    path = folder(task, key, cache_dir)
    if not path.exists():
        return None
    missing = [n for n in (_COMPLETED, _INFO, _STATS) if not (path / n).exists()]
    if missing:
        raise ValueError(
            f"{path}: half-written, it has no {', '.join(missing)}; {_REMEDY}"
        )
    info = reading.read_object(path / _INFO, {"num_shards": int}, remedy=_REMEDY)
    num_shards, num_files = info["num_shards"], len(_shards(path))
    if num_files != num_shards:
        raise ValueError(
            f"{path}: has {num_files} of its {num_shards} files; copy the others, or "
            f"{_REMEDY}"
        )
    return path


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.glob("train.tfrecord-*-of-*"))


def read(path: pathlib.Path, scores: bool = False) -> Any:
    """Returns the examples of a finished cache as a dataset, like the task's own.

    `scores` tells whether the task keeps scores.
    """
    seqio = load_seqio()
    import tensorflow as tf

    sequence = functools.partial(
        tf.io.FixedLenSequenceFeature, dtype=tf.int64, allow_missing=True
    )
    lists = ("query", "positive", "negatives", "negative_lengths")
    two_words = ("query_id", "passage_id", "place")
    source = seqio.TFExampleDataSource(
        {"train": [os.fspath(shard) for shard in _shards(path)]},
        feature_description={
            **dict.fromkeys(lists, sequence([])),
            **dict.fromkeys(two_words, tf.io.FixedLenFeature([2], tf.int64)),
            "negative_ids": sequence([2]),
            "negative_group": tf.io.FixedLenFeature([], tf.int64),
            **({"scores": sequence([], dtype=tf.float32)} if scores else {}),
        },
    )
    return registration.restore(source.get_dataset("train", shuffle=False))


def guard(blocks: Iterable[Any], path: pathlib.Path) -> Iterator[Any]:
    """Yields the blocks of a cache; turns TensorFlow's errors into a ValueError."""
    import tensorflow as tf

    try:
        yield from blocks
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(f"{path}: damaged ({error.message}); {_REMEDY}") from None


def write(
    task: task_table.Task,
    key: str,
    text_format: text_formats.TextFormat,
    vocabulary: vocabularies.Vocabulary,
    cache_dir: pathlib.Path,
    pipeline_options: Sequence[str] = (),
) -> tuple[pathlib.Path, dict[str, int]]:
    """Tokenizes a task with Apache Beam, unless its finished cache exists.

    Every worker reads the file of the vocabulary. The options are Apache Beam's, such
    as "--runner=DirectRunner". Returns the folder, and seqio's statistics: examples,
    tokens and longest text of each feature. Raises ValueError if a half-written cache
    is in the way.
    """
    beam, beam_utils = load_beam()
    seqio = load_seqio()
    target = find(task, key, cache_dir)
    if target is None:
        target = folder(task, key, cache_dir)
        # Each worker has a registry of its own.
        arguments = (task, text_format, vocabulary, task_name(task, key))
        register = functools.partial(registration.register_task, *arguments)
        options = beam.options.pipeline_options.PipelineOptions(list(pipeline_options))
        logging.info("Caching %s in %s", task.name, target)
        with writing.write_folder(target) as temporary:
            with beam.Pipeline(options=options) as pipeline:
                _build(pipeline, register, os.fspath(temporary), beam, beam_utils)
            (temporary / _COMPLETED).touch()
    stats = pathlib.Path(seqio.get_cached_stats_path(target, "train"))
    return target, json.loads(stats.read_text())


def _build(
    pipeline: Any, register: Any, output: str, beam: Any, beam_utils: Any
) -> None:
    """Builds the pipeline of seqio's script `seqio_cache_tasks` for one task.

    The script itself takes only tasks that importing a module registers.
    """
    seqio = load_seqio()
    task = register()
    num_shards = max(
        len(task.source.list_shards("train")),
        -(-task.source.num_input_examples("train") // _SHARD),
    )
    # Count tokens of texts alone, not ids.
    texts = {name: task.output_features[name] for name in registration.TEXTS}
    examples = (
        pipeline
        | beam_utils.PreprocessTask(task, "train", setup_fn=register)
        # Passing on a tensor takes far longer than passing on its array.
        | beam.Map(lambda example: {k: v.numpy() for k, v in example.items()})
        | beam.Reshuffle()
    )
    prefix = seqio.get_cached_tfrecord_prefix(output, "train")
    _ = examples | beam_utils.WriteExampleTfRecord(prefix, num_shards=num_shards)
    for transform, path in (
        (beam_utils.GetInfo(num_shards), seqio.get_cached_info_path),
        (beam_utils.GetStats(texts), seqio.get_cached_stats_path),
    ):
        name = type(transform).__name__
        _ = (
            examples
            | name >> transform
            | f"Write{name}" >> beam_utils.WriteJson(path(output, "train"))
        )


def load_beam() -> tuple[Any, Any]:
    """Returns Apache Beam and seqio's transforms for it."""
    try:
        import apache_beam
    except ModuleNotFoundError:
        raise ImportError(
            "a cache job needs Apache Beam, in a separate environment: "
            'pip install "gecko-jax[beam]"'
        ) from None
    load_seqio()
    from seqio import beam_utils

    return apache_beam, beam_utils
