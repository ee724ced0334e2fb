"""The caches that seqio's Beam job writes, and how training takes them over.

    <cache_dir>/seqio/<task>/<hash>/train.tfrecord-00000-of-00003 ...
    <cache_dir>/seqio/<task>/<hash>/info.train.json, stats.train.json, COMPLETED

The layout is seqio's own: a task that is registered as `<task>:<hash>` reads it with
`use_cached=True` once `<cache_dir>/seqio` is among seqio's cache folders. Workers share
a task's files, and Beam hands examples on in any order: each holds its place in the
source, from which it gets back its number, so that a step's examples do not depend on
where they were tokenized.
"""

import dataclasses
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
from gecko_jax.text import text_formats

_COMPLETED = "COMPLETED"

# Examples of an output file.
_SHARD = 50_000


def task_name(task: task_table.Task, key: str) -> str:
    """Returns the task's name in seqio's registry, given the key of its cache."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.name)[:64]}:{key}"


def folder(task: task_table.Task, key: str, cache_dir: pathlib.Path) -> pathlib.Path:
    """Returns where the task's cache is or would be."""
    return cache_dir.joinpath("seqio", *task_name(task, key).split(":"))


def find(
    task: task_table.Task, key: str, cache_dir: pathlib.Path
) -> pathlib.Path | None:
    """Returns the folder of the task's finished cache, None where there is no cache.

    Raises:
        ValueError: It is half-written or has lost files.
    """
    found = folder(task, key, cache_dir)
    if not found.exists():
        return None
    missing = [
        name
        for name in (_COMPLETED, "info.train.json", "stats.train.json")
        if not (found / name).exists()
    ]
    if missing:
        raise ValueError(
            f"{found}: half-written, it has no {', '.join(missing)}; delete it, and "
            "run `gecko data cache` again or let training tokenize"
        )
    remedy = (
        "delete the folder, and run `gecko data cache` again or let training tokenize"
    )
    info = reading.read_object(
        found / "info.train.json", {"num_shards": int}, remedy=remedy
    )
    num_shards = info["num_shards"]
    there = len(_shards(found))
    if there != num_shards:
        raise ValueError(
            f"{found}: {there} of its {num_shards} files are there; copy the others, "
            "or delete it and run `gecko data cache` again"
        )
    return found


def _shards(found: pathlib.Path) -> list[pathlib.Path]:
    return sorted(found.glob("train.tfrecord-*-of-*"))


def read(found: pathlib.Path) -> Any:
    """Returns the examples of a finished cache, as the task itself gives them."""
    seqio = load_seqio()
    import tensorflow as tf

    sequence = functools.partial(
        tf.io.FixedLenSequenceFeature, dtype=tf.int64, allow_missing=True
    )
    source = seqio.TFExampleDataSource(
        {"train": [os.fspath(path) for path in _shards(found)]},
        feature_description={
            "query": sequence([]),
            "positive": sequence([]),
            "negatives": sequence([]),
            "negative_lengths": sequence([]),
            "negative_ids": sequence([2]),
            "query_id": tf.io.FixedLenFeature([2], tf.int64),
            "passage_id": tf.io.FixedLenFeature([2], tf.int64),
            "negative_group": tf.io.FixedLenFeature([], tf.int64),
            "place": tf.io.FixedLenFeature([2], tf.int64),
        },
    )
    return registration.restore(source.get_dataset("train", shuffle=False))


def guard(blocks: Iterable[Any], found: pathlib.Path) -> Iterator[Any]:
    """Yields what is read of a cache; a damaged file is an error that names it.

    Raises:
        ValueError: Bytes are wrong or missing.
    """
    import tensorflow as tf

    try:
        yield from blocks
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"{found}: damaged ({error.message}); delete it, and run `gecko data "
            "cache` again or let training tokenize"
        ) from None


@dataclasses.dataclass(frozen=True)
class Job:
    """What a cache job needs to know of all its tasks.

    Attributes:
        text_format: Completed with the tasks' descriptions.
        vocabulary_path: The SentencePiece `.model` file, for every worker to read.
        extra_ids: Sentinels to add to it.
        pipeline_options: Of Apache Beam, such as ("--runner=DirectRunner",).
    """

    text_format: text_formats.TextFormat
    vocabulary_path: str
    extra_ids: int
    pipeline_options: Sequence[str] = ()


def write(
    task: task_table.Task, key: str, job: Job, cache_dir: pathlib.Path
) -> tuple[pathlib.Path, dict[str, int]]:
    """Tokenizes a task with Apache Beam, unless its finished cache is there.

    Returns:
        The folder, and seqio's statistics: examples, tokens and longest text of each
        feature.

    Raises:
        ImportError: The extra is missing.
        ValueError: A half-written cache is in the way.
    """
    beam, beam_utils = load_beam()
    seqio = load_seqio()
    target = find(task, key, cache_dir)
    if target is None:
        target = folder(task, key, cache_dir)
        name = task_name(task, key)
        # Workers have a registry of their own.
        register = functools.partial(
            registration.register_task,
            task,
            job.text_format,
            job.vocabulary_path,
            job.extra_ids,
            name,
        )
        options = beam.options.pipeline_options.PipelineOptions(
            list(job.pipeline_options)
        )
        logging.info("Caching %s in %s", task.name, target)
        with writing.write_folder(target) as temporary:
            with beam.Pipeline(options=options) as pipeline:
                _build(pipeline, register(), register, temporary, beam, beam_utils)
            (temporary / _COMPLETED).touch()
    stats = json.loads(
        pathlib.Path(seqio.get_cached_stats_path(target, "train")).read_text()
    )
    return target, stats


def _build(
    pipeline: Any,
    seqio_task: Any,
    register: Any,
    output: pathlib.Path,
    beam: Any,
    beam_utils: Any,
) -> None:
    """Builds the pipeline of `seqio_cache_tasks` for one task.

    That script finds a task only where importing a module registers it.
    """
    seqio = load_seqio()
    parts = seqio_task.source.list_shards("train")
    size = seqio_task.source.num_input_examples("train")
    num_shards = max(len(parts), -(-size // _SHARD))
    # Ids have no tokens to count.
    features = seqio_task.output_features
    tokens = {name: features[name] for name in registration.TEXTS}
    examples = (
        pipeline
        | beam_utils.PreprocessTask(seqio_task, "train", setup_fn=register)
        # A tensor takes far longer to hand on than its array.
        | beam.Map(lambda example: {k: v.numpy() for k, v in example.items()})
        | beam.Reshuffle()
    )
    prefix = seqio.get_cached_tfrecord_prefix(os.fspath(output), "train")
    _ = examples | beam_utils.WriteExampleTfRecord(prefix, num_shards=num_shards)
    for transform, path in (
        (beam_utils.GetInfo(num_shards), seqio.get_cached_info_path),
        (beam_utils.GetStats(tokens), seqio.get_cached_stats_path),
    ):
        name = type(transform).__name__
        _ = (
            examples
            | name >> transform
            | f"Write{name}" >> beam_utils.WriteJson(path(os.fspath(output), "train"))
        )


def load_beam() -> tuple[Any, Any]:
    """Returns Apache Beam and seqio's transforms for it.

    Raises:
        ImportError: The extra is missing.
    """
    try:
        import apache_beam
    except ModuleNotFoundError:
        raise ImportError(
            "a cache job needs Apache Beam, in an environment of its own: "
            'pip install "gecko-jax[beam]"'
        ) from None
    load_seqio()
    from seqio import beam_utils

    return apache_beam, beam_utils
