"""Batches addressed by step: what step n trains on is a pure function of n.

    batches = Batches(selection.select(...), features.Shape(64, 512), ...)
    batches.batch(1000)                      the arrays of step 1000
    for batch in batches.iterate(1000, 2000)    the same, prepared in the background

seqio tasks fill tokenized caches (`cache`). Grain shuffles the numbers of each task's
examples anew in every epoch, repeats them forever and mixes the tasks by their rates.
No state passes from step to step, so a resumed run needs only its step, and neither
packing nor the lengths change which examples a step holds.

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
    query_teacher, passage_teacher        float16 [B, T]    see `teacher_vectors`
    negative_teacher                      float16 [B, G, T]
    scores                                float32 [B, 1+G]  minus infinity for none

The teacher's vectors and the scores are there only if the loss needs them.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax.data import cache, features, formatting, selection, teacher_vectors

# Number of examples read for `idf_weights`, and the smallest weight.
_IDF_EXAMPLES = 100_000
_LEAST_WEIGHT = 0.05

# Number of a task's examples whose teacher vectors are checked.
_TEACHER_EXAMPLES = 200

# Batches prepared ahead of their use.
_AHEAD = 4


class Batches:
    """The global batches of a mixture, by step.

    Every process computes the whole global batch, which takes milliseconds, and keeps
    the rows of its own devices. So any number of processes sees the same data without
    communication.

    Attributes:
        tasks, task_names: The tasks, indexed by `task_index`.
        task_sizes, num_examples: Number of examples of each task, and of all.
        readers: The cache of each task.
        vocabulary, text_format: Those of the checkpoint, with the tasks' descriptions.
        shape: Sizes of a batch.
        rates: Share of each task, summing to 1.
        facts: Everything that determines the examples of a step, except the seed:
            sources, format, vocabulary, rates, batch size.
        mixture_hash: Hash of `facts`.
    """

    def __init__(
        self,
        chosen: selection.Selection,
        shape: features.Shape,
        *,
        batch_size: int,
        one_task_per_batch: bool,
        seed: int,
        teacher: str | os.PathLike = "",
    ):
        """Opens the caches of the tasks; builds those that do not exist.

        `batch_size` is the global number of examples per step (B), and `teacher` the
        folder of a teacher's vectors, "" for none. The seed is that of the shuffles and
        of the negatives, which each step samples anew. Raises ValueError if a length is
        impossible, or the sources or vectors are invalid.
        """
        for name in ("query_length", "passage_length"):
            if not 2 <= (length := getattr(shape, name)) <= cache.MAX_TOKENS:
                rule = f"must be at least 2 and at most {cache.MAX_TOKENS}"
                raise ValueError(f"data {name}={length}: {rule}")
        self._batch_size = batch_size
        self._one_task_per_batch = one_task_per_batch
        self._seed = seed
        self.shape = shape
        self.vocabulary = chosen.vocabulary
        self.tasks, self.text_format = chosen.tasks, chosen.text_format
        # Before the texts are tokenized, which takes long: the folder may be missing.
        self._teacher = None
        if teacher:
            self._teacher = teacher_vectors.Teacher(teacher, shape.teacher_dim)
        self.readers = [
            cache.build(task, key, self.text_format, self.vocabulary, chosen.cache_dir)
            for task, key in zip(self.tasks, chosen.keys, strict=True)
        ]
        self.task_names = tuple(task.name for task in self.tasks)
        self.task_sizes = tuple(len(reader) for reader in self.readers)
        self.num_examples = sum(self.task_sizes)
        weights = chosen.mixture.rates(self.task_names, self.task_sizes)
        self.rates = tuple(weight / sum(weights) for weight in weights)
        # Checkpoints store the facts, so that a refused resume can name the change.
        self.facts: dict[str, Any] = {
            "batch_size": batch_size,
            "num_negatives": shape.num_negatives,
            "one_task_per_batch": one_task_per_batch,
            "vocabulary": self.vocabulary.fingerprint,
            "tasks": {
                name: {
                    "rate": weights[n],
                    "examples": self.task_sizes[n],
                    "sources": list(chosen.sources[n]),
                    "format": dataclasses.asdict(
                        formatting.templates(self.text_format, name)
                    ),
                    "cache": chosen.keys[n],
                }
                for n, name in enumerate(self.task_names)
            },
        }
        # Omitted if absent, which keeps the hashes of older runs.
        if any(task.unique_ids for task in self.tasks):
            self.facts["unique_ids"] = True
        if self._teacher is not None:
            self.facts["teacher"] = self._teacher.facts["sha256"]
        digest = hashlib.sha256(json.dumps(self.facts).encode())
        self.mixture_hash = digest.hexdigest()[:16]
        self._order = self._build_order(weights)
        self._lock = threading.Lock()
        self._warn_about_small_tasks()
        if self._teacher is not None:
            self._check_teacher(self._teacher, teacher)
        if shape.scores:
            self._check_scores()

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
            names = [self.tasks[task].source_task for task, _ in picks]
            num = self.shape.num_negatives
            batch |= self._teacher.features(examples, names, choices, num)
        return batch

    def iterate(
        self, start_step: int, stop_step: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields `batch(start_step)`, ..., before `stop_step`, prepared in a thread.

        If `stop_step` is None, the batches never end. Errors of the thread are raised
        here; closing the iterator ends the thread.
        """
        steps = itertools.count(start_step)
        if stop_step is not None:
            steps = iter(range(start_step, stop_step))
        pool = futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            waiting = collections.deque(
                pool.submit(self.batch, step)
                for step in itertools.islice(steps, _AHEAD)
            )
            while waiting:
                batch = waiting.popleft().result()
                for step in itertools.islice(steps, 1):
                    waiting.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def examples(self, task_index: int, count: int) -> list[features.Example]:
        """Returns the first examples of a task, in the order of its files."""
        reader = self.readers[task_index]
        with self._lock:
            return reader.read(range(min(count, len(reader))))

    def _build_order(self, weights: Sequence[float]) -> Any:
        """Returns the endless order of (task, example), or of whole batches of them."""
        import grain

        orders = []
        for task_index, name in enumerate(self.task_names):
            order = (
                grain.MapDataset.range(self.task_sizes[task_index])
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

        Queries and positives count as documents; large tasks are sampled. A token in
        half of the texts has almost no weight, nor do the words of the text format. A
        token in no text has weight 1.
        """
        counts = np.zeros(vocab_size)
        num_texts = 0
        for task_index in range(len(self.tasks)):
            for example in self.examples(task_index, _IDF_EXAMPLES // len(self.tasks)):
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
        """Samples G of each example's negatives; depends on seed and step alone."""
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

    def _check_teacher(
        self, teacher: teacher_vectors.Teacher, folder: str | os.PathLike
    ) -> None:
        """Refuses vectors of other texts, and warns about tasks without vectors."""
        shares = {}
        for task_index, task in enumerate(self.tasks):
            examples = self.examples(task_index, _TEACHER_EXAMPLES)
            names = [task.source_task] * len(examples)
            vectors = teacher.features(examples, names, [()] * len(examples), 0)
            has_vector = [v.any(axis=1).mean() for v in vectors.values() if v.size]
            shares[task.name] = float(np.mean(has_vector))
        if not any(shares.values()):
            raise ValueError(
                f"data.teacher={folder}: has no vector for any text of "
                f"{', '.join(shares)}; make it from the same files with `gecko data "
                "teach`"
            )
        for name, share in shares.items():
            if share < 1:
                logging.warning(
                    "The teacher has vectors for %.0f%% of the texts of task %s; the "
                    "others are trained without it.",
                    100 * share,
                    name,
                )

    def _check_scores(self) -> None:
        """Refuses data without scores, and warns about examples without."""
        if not any(reader.num_scored for reader in self.readers):
            raise ValueError(
                f"loss.kl_weight: no line of {', '.join(self.task_names)} has scores; "
                "add them (docs/data.md), or set the weight to 0"
            )
        for name, reader in zip(self.task_names, self.readers, strict=True):
            if reader.num_scored < len(reader):
                logging.warning(
                    "%d of the %d examples of task %s have scores; the others are "
                    "trained without the KL divergence.",
                    reader.num_scored,
                    len(reader),
                    name,
                )

    def _warn_about_small_tasks(self) -> None:
        sizes = zip(self.task_names, self.task_sizes, self.rates, strict=True)
        for name, size, rate in sizes:
            share = 1.0 if self._one_task_per_batch else rate
            if size < self._batch_size * share:
                logging.warning(
                    "Task %s has %d examples, fewer than its part of a batch: some "
                    "occur twice in a batch. loss.mask_duplicates masks them.",
                    name,
                    size,
                )


def _derive_seed(seed: int, name: str) -> int:
    """Returns a seed of Grain for a task that does not depend on the other tasks."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "little") % (2**31)
