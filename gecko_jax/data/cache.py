"""The tokenized cache of a task: random-access records on disk, built once.

The name of a cache holds a hash of everything its content depends on: the bytes of the
sources, the chosen lines, the text format, the vocabulary and the version of this code.
A changed source therefore gets another cache. The folder is written under a temporary
name and renamed, so an existing cache is complete.

    <cache_dir>/tasks/<task>-<hash>/records.array_record
    <cache_dir>/tasks/<task>-<hash>/info.json
    <cache_dir>/tasks/<task>-<hash>/order.npy    example -> record, unless it is equal
    <cache_dir>/sources/<sha256>.json            numbers of examples in a source file

If a Beam job (`seqio_cache`) has tokenized the task, its examples are copied, in the
order of the source files. Reading needs no TensorFlow.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from gecko_jax.data import (
    features,
    formatting,
    jsonl,
    load_seqio,
    registration,
    seqio_cache,
    task_table,
)
from gecko_jax.io import checksums, field_rules, npy, progress, reading, writing
from gecko_jax.text import text_formats, vocabularies

# Tokens stored of a text, so that a run can change its lengths without a new cache.
MAX_TOKENS = 2048

_RECORDS, _ORDER = "records.array_record", "order.npy"
_REMEDY = "delete the folder, and it will be built again"
_EXAMPLES = field_rules.map_of(field_rules.COUNT)

# Increased whenever the records or their content change.
_VERSION = 1


def summarize_source(path: str, cache_dir: pathlib.Path) -> tuple[str, dict[str, int]]:
    """Returns a source file's checksum, and the number of examples of each task.

    A file is read and checked once; later calls only compare its checksum. Raises
    ValueError if the file is missing, empty or has an invalid line.
    """
    try:
        digest = reading.sha256(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check data.files") from None
    note = cache_dir / "sources" / f"{digest}.json"
    if note.exists():
        remedy = "delete it, and the source is read through again"
        examples = checksums.read_object(note, {}, remedy=remedy)
        if not _EXAMPLES.holds(examples):
            raise ValueError(f"{note}: not {_EXAMPLES.name} for each task; {remedy}")
    else:
        examples = jsonl.count_examples(path)
        checksums.write_object(note, examples)
    return digest, examples


def key(
    task: task_table.Task,
    sources: Sequence[str],
    text_format: text_formats.TextFormat,
    vocabulary: vocabularies.Vocabulary,
) -> str:
    """Returns 16 hex digits that depend on everything the task's tokens depend on.

    `sources` are the checksums of the task's files.
    """
    facts = {
        "version": _VERSION,
        "max_tokens": MAX_TOKENS,
        "source_task": task.source_task,
        "sources": list(sources),
        "templates": dataclasses.asdict(formatting.templates(text_format, task.name)),
        "vocabulary": vocabulary.fingerprint,
    }
    # Omitted if False, which keeps the keys of older caches.
    facts |= {name: True for name in ("unique_ids", "scores") if getattr(task, name)}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build(
    task: task_table.Task,
    cache_key: str,
    text_format: text_formats.TextFormat,
    vocabulary: vocabularies.Vocabulary,
    cache_dir: pathlib.Path,
) -> "Reader":
    """Returns the cache of a task, and builds it if it does not exist."""
    name = seqio_cache.task_name(task, cache_key).replace(":", "-")
    folder = cache_dir / "tasks" / name
    if not (folder / "info.json").exists():
        stored = seqio_cache.find(task, cache_key, cache_dir)
        if stored is not None:
            logging.info("Copying %s from %s", task.name, stored)
            dataset = seqio_cache.read(stored, task.scores)
        else:
            logging.info("Tokenizing %s into %s", task.name, folder)
            load_seqio()
            registered = registration.register_task(task, text_format, vocabulary)
            dataset = registered.get_dataset(None, split="train", shuffle=False)
        _write(task, folder, dataset, stored)
    return Reader(folder)


def _write(
    task: task_table.Task,
    folder: pathlib.Path,
    dataset: Any,
    stored: pathlib.Path | None,
) -> None:
    """Writes the examples of a seqio task, from a Beam cache if `stored` names one."""
    import tensorflow as tf

    # Fusing the maps of all preprocessors saves TensorFlow's overhead for each.
    fused = tf.data.Options()
    fused.experimental_optimization.map_fusion = True
    expected = task.num_examples
    blocks = dataset.ragged_batch(registration.BLOCK).with_options(fused)
    if stored:
        blocks = seqio_cache.guard(blocks, stored)
    places: list[np.ndarray] = []
    verb = "Reading" if stored else "Tokenizing"
    with writing.write_folder(folder) as temporary:
        read = examples(blocks, places)
        tokenized = progress.track(read, f"{verb} {task.name}", expected)
        path = temporary / _RECORDS
        written, num_scored = _write_records(path, tokenized, folder)
        # A Beam job writes examples in any order; sort them by their places.
        place = np.concatenate(places)
        order = np.lexsort(place.T[::-1])
        distinct = len(np.unique(place, axis=0))
        if stored and not len(place) == distinct == expected:
            raise ValueError(
                f"{stored}: holds {distinct:,} of the {expected:,} examples of "
                f"{task.name}; delete it, and run `gecko data cache` again or let "
                "training tokenize"
            )
        if not len(place) == written == (expected or written):
            raise OSError(
                f"{folder}: only {written:,} of {expected or len(place):,} examples of "
                f"{task.name} were written; check the space on the disk and that the "
                "source files do not change, and run again"
            )
        info: dict[str, Any] = {"task": task.name, "num_examples": written}
        if task.scores:
            info["num_scored"] = num_scored
        if (order[1:] < order[:-1]).any():
            np.save(temporary / _ORDER, order)
            # ArrayRecord has its own hashes, which it verifies on every read.
            info[checksums.FILES] = checksums.of_files(temporary, [_ORDER])
        checksums.write_object(temporary / "info.json", info)


def _write_records(
    path: pathlib.Path, tokenized: Iterable[features.Example], folder: pathlib.Path
) -> tuple[int, int]:
    """Writes the records; returns how many can be read back and how many are scored."""
    module = _array_record()
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    num_scored = 0
    for example in tokenized:
        writer.write(encode(example))
        num_scored += bool(np.isfinite(example.scores).any())
    try:
        writer.close()
    except RuntimeError as error:  # The C++ error of a failed write.
        is_full = os.strerror(errno.ENOSPC) in str(error)
        number = errno.ENOSPC if is_full else errno.EIO
        raise OSError(number, os.strerror(number), str(folder)) from error
    return module.ArrayRecordReader(str(path)).num_records(), num_scored


def _array_record() -> Any:
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue] - C++
    )

    return array_record_module


def examples(
    blocks: Iterable[Any], places: list[np.ndarray]
) -> Iterator[features.Example]:
    """Yields the examples in blocks of a seqio task; appends their places to a list."""
    fields = [field.name for field in dataclasses.fields(features.Example)]
    trim = functools.partial(features.trim, length=MAX_TOKENS)
    for block in blocks:
        places.append(block["place"].numpy())
        names = [name for name in fields if name in block]
        columns = [block[name].numpy() for name in names]
        negative_lengths = block["negative_lengths"].numpy()
        for lengths, *row in zip(negative_lengths, *columns, strict=True):
            values = dict(zip(names, row, strict=True))
            # seqio pads the negatives of an example to equal length. The id of
            # padding may be that of a piece.
            padded = zip(values["negatives"], lengths, strict=True)
            values |= {
                "query": trim(values["query"]),
                "positive": trim(values["positive"]),
                "negatives": tuple(trim(tokens[:length]) for tokens, length in padded),
                "negative_ids": np.reshape(values["negative_ids"], (-1, 2)),
                "negative_group": int(values["negative_group"]),
            }
            yield features.Example(**values)


class Reader:
    """Random access to the examples of a finished cache."""

    def __init__(self, folder: pathlib.Path):
        self._path = folder / _RECORDS
        try:
            path, fields = writing.member(folder, "info.json"), {"num_examples": int}
            info = checksums.read_object(path, fields, remedy=_REMEDY)
            # Examples with a score; 0 if the task does not keep scores.
            self.num_scored = int(info.get("num_scored", 0))
            # Records are read in shuffled order. Readahead and threads only cost time
            # (1.4 against 0.65 ms for 24 records).
            self._reader = _array_record().ArrayRecordReader(
                str(self._path), options="readahead_buffer_size:0,max_parallelism:1"
            )
            order = writing.member(folder, _ORDER)
            self._order = None
            if order.exists():
                shape = (info["num_examples"],)
                self._order = npy.open_array(order, shape, "i8", remedy=_REMEDY)
        except RuntimeError as error:
            raise self._damage(error) from error
        if len(self) != info["num_examples"]:
            raise ValueError(
                f"{folder}: holds {len(self):,} of {info['num_examples']:,} "
                f"examples; {_REMEDY}"
            )

    def _damage(self, error: RuntimeError) -> ValueError:
        first = (str(error).splitlines() or ["unreadable"])[0]
        return ValueError(f"{self._path}: damaged ({first}); {_REMEDY}")

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, numbers: Sequence[int]) -> list[features.Example]:
        """Returns the examples with the given numbers, in the given order."""
        return [decode(record) for record in self.records(numbers)]

    def records(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the encoded examples with the given numbers."""
        places = list(numbers)
        if self._order is not None:
            places = self._order[places].tolist()
            if places and not 0 <= min(places) <= max(places) < len(self):
                raise ValueError(
                    f"{self._path.with_name(_ORDER)}: damaged (an index is out of "
                    f"range); {_REMEDY}"
                )
        try:
            return self._reader.read(places)
        except RuntimeError as error:
            raise self._damage(error) from error


def encode(example: features.Example) -> bytes:
    """Packs an example into 32-bit words: sizes, ids, tokens, and scores if any."""
    texts = (example.query, example.positive, *example.negatives)
    sizes = [len(example.negatives), example.negative_group, *map(len, texts)]
    ids = [example.query_id, example.passage_id, *example.negative_ids]
    parts = [np.array(sizes, np.int32), np.concatenate(ids).astype(np.uint32)]
    parts += [tokens.astype(np.int32) for tokens in texts]
    parts.append(example.scores.astype(np.float32))
    return b"".join(part.tobytes() for part in parts)


def decode(record: bytes) -> features.Example:
    """Inverse of `encode`."""
    words = np.frombuffer(record, np.int32)
    num = int(words[0])
    lengths = words[2 : 4 + num]
    ids = words[4 + num : 8 + 3 * num].view(np.uint32).reshape(-1, 2)
    ends = np.cumsum(lengths)
    tokens = words[8 + 3 * num :]
    texts = [tokens[end - size : end] for end, size in zip(ends, lengths, strict=True)]
    return features.Example(
        query=texts[0],
        positive=texts[1],
        negatives=tuple(texts[2:]),
        query_id=ids[0],
        passage_id=ids[1],
        negative_ids=ids[2:],
        negative_group=int(words[1]),
        scores=tokens[ends[-1] :].view(np.float32),
    )
