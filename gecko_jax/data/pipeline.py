"""Batches addressed by step: what step n trains on is a pure function of n.

    batches = Batches(mixture="quickstart", files=(), ..., seed=0, cache_dir="data")
    batches.batch(1000)                      the arrays of step 1000, at once
    for batch in batches.iterate(1000, 2000)    the same, prepared in the background

seqio tasks fill tokenized caches (`gecko_jax.data.cache`); over the numbers of their
examples Grain shuffles each task anew in every epoch, repeats it for ever and mixes the
tasks by their rates. Nothing is carried from step to step, so a resumed run needs only
its step, and neither packing nor the lengths change which examples a step holds.

Features of a batch of B examples with G negatives, rows R and tokens L:

    query_tokens, query_segment_ids       int32 [Rq, Lq]    see `features`
    query_index                           int32 [B, 2]      row and segment
    passage_tokens, passage_segment_ids   int32 [Rp, Lp]
    passage_index                         int32 [B*(1+G), 2]
    query_id, passage_id                  uint32 [B, 2]
    negative_id                           uint32 [B, G, 2]
    negative_mask                         bool [B, G]       False: fewer negatives
    example_mask                          bool [B]
    negative_group, task_index            int32 [B]
    query_teacher, passage_teacher        float16 [B, T]    see `teacher`
    negative_teacher                      float16 [B, G, T]
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax.data import (
    cache,
    features,
    formatting,
    mixtures,
    prefetch,
    selection,
    teacher_vectors,
)
from gecko_jax.text import text_formats, vocabularies

# Examples that are read for the weights of tokens, and the least such weight.
_IDF_EXAMPLES = 100_000
_LEAST_WEIGHT = 0.05

# Examples of a task in which a teacher's vectors are looked for.
_TEACHER_EXAMPLES = 200

# Seeds of Grain are 32 bits.
_SEED_BYTES = 4


class Batches:
    """The global batches of a mixture, by step.

    Every process computes the whole global batch: a batch is a few hundred kilobytes
    and takes milliseconds, and so any number of processes sees the same data without a
    word between them. Each then keeps the rows of its own devices.

    Attributes:
        tasks: The rows of the table, or those made for the files.
        task_names: What `task_index` points into.
        task_sizes: Number of examples of each task.
        readers: The cache of each task.
        shape: The sizes of a batch.
        rates: Share of each task, summing to 1.
        num_examples: Of all tasks.
        text_format: As given, completed with the descriptions of these tasks; this is
            the one to keep with a checkpoint.
        facts: What the examples of a step depend on, other than the seed.
        mixture_hash: Changes with whatever the examples of a step depend on, other
            than the seed: sources, format, vocabulary, rates, batch size.
    """

    def __init__(
        self,
        *,
        mixture: str,
        files: Sequence[str | os.PathLike],
        vocabulary: vocabularies.Vocabulary,
        vocabulary_path: str | os.PathLike,
        text_format: text_formats.TextFormat,
        batch_size: int,
        query_length: int,
        passage_length: int,
        num_negatives: int,
        packing: bool,
        one_task_per_batch: bool,
        seed: int,
        cache_dir: str | os.PathLike,
        row_multiple: int = 1,
        microbatch_rows: int = 0,
        prepared_dir: str | os.PathLike = mixtures.PREPARED,
        teacher: str | os.PathLike = "",
        teacher_dim: int = 0,
        unique_ids: bool = False,
    ):
        """Opens the caches of the mixture, building those that are not there.

        Args:
            mixture: Name in the table, of a mixture or a task; not used with `files`.
            files: A user's own JSONL; each of its tasks is drawn by its size.
            vocabulary: Must be that of `vocabulary_path`.
            vocabulary_path: The `.model` file, which seqio reads.
            text_format: How texts are written; its descriptions have precedence.
            batch_size: Global examples per step (B).
            query_length: Tokens kept of a query.
            passage_length: Tokens kept of a passage.
            num_negatives: Hard negatives per query (G), sampled anew in every step
                from those an example has.
            packing: Put several texts into one row.
            one_task_per_batch: All examples of a step come from one task.
            seed: Of the shuffles and of the sampling of negatives.
            cache_dir: Where caches lie; may be shared by many runs.
            row_multiple: Row counts are multiples of it.
            microbatch_rows: Row counts above it are multiples of it; 0 for any.
            prepared_dir: Where `gecko data prepare` put the sets of the mixture.
            teacher: Folder of a teacher's vectors, or "" for none.
            teacher_dim: Their width.
            unique_ids: Append an id to the texts of classification triples, instead of
                masking by it; see `classification.append_id`.

        Raises:
            ValueError: An unknown mixture, a bad file or line, an impossible size.
        """
        _check_sizes(
            batch_size, query_length, passage_length, num_negatives, row_multiple, seed
        )
        if vocabularies.load(vocabulary_path, vocabulary.extra_ids) != vocabulary:
            raise ValueError(
                f"{vocabulary_path}: is not the vocabulary given beside it; give the "
                "file that the vocabulary was loaded from"
            )
        self.vocabulary = vocabulary
        self._batch_size = batch_size
        self._one_task_per_batch = one_task_per_batch
        self._seed = seed
        self.shape = features.Shape(
            query_length,
            passage_length,
            num_negatives,
            packing,
            row_multiple,
            microbatch_rows,
        )
        self.num_segments = self.shape.num_segments
        chosen = selection.select(
            mixture=mixture,
            files=files,
            vocabulary=vocabulary,
            text_format=text_format,
            cache_dir=cache_dir,
            prepared_dir=prepared_dir,
            unique_ids=unique_ids,
        )
        self.tasks, self.text_format = chosen.tasks, chosen.text_format
        self.readers = [
            cache.build(
                task,
                key,
                self.text_format,
                os.fspath(vocabulary_path),
                vocabulary.extra_ids,
                pathlib.Path(cache_dir),
            )
            for task, key in zip(self.tasks, chosen.keys, strict=True)
        ]
        self.task_names = tuple(task.name for task in self.tasks)
        self.task_sizes = tuple(len(reader) for reader in self.readers)
        self.num_examples = sum(self.task_sizes)
        weights = chosen.mixture.rates(self.task_names, self.task_sizes)
        self.rates = tuple(weight / sum(weights) for weight in weights)
        # Kept beside every checkpoint, so that a refusal can name what has changed.
        self.facts: dict[str, Any] = {
            "batch_size": batch_size,
            "num_negatives": num_negatives,
            "one_task_per_batch": one_task_per_batch,
            "vocabulary": vocabulary.fingerprint,
            "tasks": {
                name: {
                    "rate": weight,
                    "examples": size,
                    "sources": list(sources),
                    "format": dataclasses.asdict(
                        formatting.templates(self.text_format, name)
                    ),
                    "cache": key,
                }
                for name, weight, size, sources, key in zip(
                    self.task_names,
                    weights,
                    self.task_sizes,
                    chosen.sources,
                    chosen.keys,
                    strict=True,
                )
            },
        }
        if unique_ids:
            self.facts["unique_ids"] = True
        self._teacher = None
        if teacher:
            self._teacher = teacher_vectors.Teacher(teacher, teacher_dim)
            self.facts["teacher"] = self._teacher.facts["sha256"]
        digest = hashlib.sha256(json.dumps(self.facts).encode())
        self.mixture_hash = digest.hexdigest()[:16]
        self._order = self._build_order(weights)
        self._lock = threading.Lock()
        self._warn_of_small_tasks()
        self._check_teacher(teacher)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns the model features of one step, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step}: steps are counted from 0")
        picks = self.picks(step)
        examples: list[Any] = [None] * len(picks)
        for task_index, reader in enumerate(self.readers):
            rows = [row for row, (task, _) in enumerate(picks) if task == task_index]
            if rows:
                with self._lock:
                    read = reader.read([picks[row][1] for row in rows])
                for row, example in zip(rows, read, strict=True):
                    examples[row] = example
        choices = self._choose_negatives(step, examples)
        batch = features.convert(examples, self.shape, choices)
        batch["task_index"] = np.array([task for task, _ in picks], np.int32)
        if self._teacher is not None:
            batch |= self._teacher.features(
                examples,
                [self.tasks[task].source_task for task, _ in picks],
                choices,
                self.shape.num_negatives,
            )
        return batch

    def iterate(
        self, start_step: int, stop_step: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields `batch(start_step)`, ..., before `stop_step`, prepared ahead.

        See `prefetch.ahead`.
        """
        return prefetch.ahead(self.batch, start_step, stop_step)

    def examples(self, task_index: int, count: int) -> list[features.Example]:
        """Returns the first examples of a task, in the order of its files."""
        reader = self.readers[task_index]
        with self._lock:
            return reader.read(range(min(count, len(reader))))

    def _build_order(self, weights: Sequence[float]) -> Any:
        """Returns the endless order of (task, example), or of whole batches of them."""
        import grain

        orders = []
        for task_index, (name, size) in enumerate(
            zip(self.task_names, self.task_sizes, strict=True)
        ):
            order = (
                grain.MapDataset.range(size)
                .seed(_derive_seed(self._seed, name))
                .shuffle()
                .repeat()
                .map(lambda number, task_index=task_index: (task_index, number))
            )
            if self._one_task_per_batch:
                order = order.batch(self._batch_size, batch_fn=list)
            orders.append(order)
        if len(orders) == 1:
            return orders[0]
        return grain.MapDataset.mix(orders, weights=list(weights))

    def idf_weights(self, vocab_size: int) -> Float[np.ndarray, " V"]:
        """Returns the inverse document frequency of every token id, from 0 to 1.

        Queries and positives count as documents; of a large mixture a sample of each
        task is enough. A token in half of the texts weighs next to nothing, as do the
        words of the text format; one that is in no text weighs 1.
        """
        counts = np.zeros(vocab_size)
        num_texts = 0
        for reader in self.readers:
            numbers = np.arange(len(reader))[: _IDF_EXAMPLES // len(self.readers)]
            for example in reader.read(numbers.tolist()):
                for tokens in (example.query, example.positive):
                    counts[np.unique(tokens)] += 1
                num_texts += 2
        idf = np.log((num_texts - counts + 0.5) / (counts + 0.5))
        return np.clip(idf / np.log(num_texts), _LEAST_WEIGHT, 1.0).astype(np.float32)

    def picks(self, step: int) -> list[tuple[int, int]]:
        """Returns the task and the number of each example of a step."""
        if self._one_task_per_batch:
            return self._order[step]
        first = step * self._batch_size
        return [self._order[first + row] for row in range(self._batch_size)]

    def _choose_negatives(
        self, step: int, examples: Sequence[features.Example]
    ) -> list[list[int]]:
        """Samples G of each example's negatives, by seed and step alone."""
        num = self.shape.num_negatives
        most = max(len(example.negatives) for example in examples)
        if not num or not most:
            return [[] for _ in examples]
        random = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        draws = random.random((len(examples), most))
        return [
            np.argsort(draw[: len(example.negatives)])[:num].tolist()
            for draw, example in zip(draws, examples, strict=True)
        ]

    def _check_teacher(self, folder: str | os.PathLike) -> None:
        """Refuses vectors of other texts, and tells of tasks without any."""
        if self._teacher is None:
            return
        shares = {}
        for task_index, task in enumerate(self.tasks):
            examples = self.examples(task_index, _TEACHER_EXAMPLES)
            names = [task.source_task] * len(examples)
            found = self._teacher.features(examples, names, [()] * len(examples), 0)
            there = [
                vectors.any(axis=1).mean() for vectors in found.values() if vectors.size
            ]
            shares[task.name] = float(np.mean(there))
        if not any(shares.values()):
            raise ValueError(
                f"data.teacher={folder}: it has a vector of none of the texts of "
                f"{', '.join(shares)}; make it from the same files with `gecko data "
                "teach`"
            )
        for name, share in shares.items():
            if share < 1:
                logging.warning(
                    "Of the texts of task %s the teacher has %.0f%%; the others are "
                    "trained without it.",
                    name,
                    100 * share,
                )

    def _warn_of_small_tasks(self) -> None:
        for name, size, rate in zip(
            self.task_names, self.task_sizes, self.rates, strict=True
        ):
            share = 1.0 if self._one_task_per_batch else rate
            if size < self._batch_size * share:
                logging.warning(
                    "Task %s has %d examples, fewer than its part of a batch: some "
                    "occur twice in it. loss.mask_duplicates keeps them apart.",
                    name,
                    size,
                )


def _check_sizes(
    batch_size: int,
    query_length: int,
    passage_length: int,
    num_negatives: int,
    row_multiple: int,
    seed: int,
) -> None:
    for name, value, least, most in (
        ("batch_size", batch_size, 1, None),
        ("query_length", query_length, 2, cache.MAX_TOKENS),
        ("passage_length", passage_length, 2, cache.MAX_TOKENS),
        ("num_negatives", num_negatives, 0, None),
        ("row_multiple", row_multiple, 1, None),
        ("seed", seed, 0, None),
    ):
        if value < least or (most is not None and value > most):
            rule = f"at least {least}" + (f" and at most {most}" if most else "")
            raise ValueError(f"data {name}={value}: must be {rule}")


def _derive_seed(seed: int, name: str) -> int:
    """Gives every task its own shuffle, whatever other tasks there are."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=_SEED_BYTES)
    return int.from_bytes(digest.digest(), "little") % (2**31)
