"""Statistics of a mixture: what its texts are like, before anything is trained on them.

    lengths      tokens of queries and passages, of a sample of each task
    truncation   texts of the sample that are longer than the configured length
    padding      tokens of batches drawn from the sample that are no text
    duplicates   queries, positives and pairs that come again, over all lines
    overlaps     those that two tasks share, over all lines

Texts are the same when their words are, whatever their case (`contamination.words`).
Every line is read and checked once, and nothing is cached; memory is 24 bytes a line,
and the sample.
"""

import array
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from gecko_jax.data import (
    classification,
    features,
    formatting,
    jsonl,
    mixtures,
    task_table,
)
from gecko_jax.io import progress
from gecko_jax.text import overlap, text_formats, vocabularies

# What may come twice of an example.
PARTS = ("query", "positive", "pair")

# Examples of a task whose tokens are counted, and batches whose padding is.
SAMPLE = 5_000
_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
    """What a task holds.

    Attributes:
        name: Of the task.
        num_examples: Lines.
        rate: Share of the mixture.
        num_sampled: Lines whose tokens were counted.
        query_lengths: Tokens of the sampled queries, before they are cut.
        passage_lengths: The same of positives and negatives.
        repeated: Part -> lines whose part stands on an earlier line of the task.
        descriptions: Task description -> lines that give it as their own.
    """

    name: str
    num_examples: int
    rate: float
    num_sampled: int
    query_lengths: Int[np.ndarray, " Q"]
    passage_lengths: Int[np.ndarray, " P"]
    repeated: dict[str, int]
    descriptions: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a mixture holds.

    Attributes:
        tasks: Of each task.
        overlaps: Two tasks -> part -> texts that both hold; only where there are some.
        padding: (query, passage or both; whether rows are packed) -> share of a
            batch's tokens that are no text.
        num_batches: Batches that the padding was counted in.
        shape: The sizes of a batch.
    """

    tasks: tuple[TaskStatistics, ...]
    overlaps: dict[tuple[str, str], dict[str, int]]
    padding: dict[tuple[str, bool], float]
    num_batches: int
    shape: features.Shape


@dataclasses.dataclass
class _Read:
    """What reading a task through has given."""

    draw: random.Random
    num_examples: int = 0
    sample: list[jsonl.Pair] = dataclasses.field(default_factory=list)
    # Of each part, for every line: 8 bytes by which equal texts are known.
    hashes: dict[str, array.array] = dataclasses.field(
        default_factory=lambda: {part: array.array("Q") for part in PARTS}
    )
    descriptions: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, pair: jsonl.Pair, sample: int) -> None:
        """Takes a line in; every line has the same chance to be in the sample."""
        self.num_examples += 1
        # Reservoir sampling: line n replaces one of the sample with chance sample / n.
        if len(self.sample) < sample:
            self.sample.append(pair)
        elif (place := self.draw.randrange(self.num_examples)) < sample:
            self.sample[place] = pair
        query = overlap.content_hash(pair.query)
        positive = overlap.content_hash(pair.positive)
        whole = overlap.content_hash(f"{query} {positive}")
        for part, value in zip(PARTS, (query, positive, whole), strict=True):
            self.hashes[part].append(value)
        if pair.task_description.strip():
            self.descriptions[text_formats.clean(pair.task_description)] += 1


def collect(
    tasks: Sequence[task_table.Task],
    drawn: mixtures.Mixture,
    *,
    vocabulary: vocabularies.Vocabulary,
    text_format: text_formats.TextFormat,
    shape: features.Shape,
    batch_size: int,
    one_task_per_batch: bool,
    sample: int = SAMPLE,
) -> Statistics:
    """Reads all lines of the tasks, and tokenizes a sample of them.

    Args:
        tasks: With their files.
        drawn: The mixture that gives their rates.
        vocabulary: Of the tokens.
        text_format: How texts are written; completed with the tasks' descriptions.
        shape: Lengths, negatives and packing of a batch.
        batch_size: Examples of a batch.
        one_task_per_batch: All examples of a batch come from one task.
        sample: Most examples of a task that are tokenized.

    Raises:
        ValueError: A bad line, or a task without one.
    """
    text_format = task_table.complete_text_format(text_format, tasks)
    read = _read(tasks, sample)
    weights = drawn.rates(
        [task.name for task in tasks], [found.num_examples for found in read]
    )
    rates = [weight / sum(weights) for weight in weights]
    found, sampled = [], []
    for task, one, rate in zip(tasks, read, rates, strict=True):
        examples = _tokenize(task, one.sample, vocabulary, text_format)
        sampled.append(examples)
        found.append(
            TaskStatistics(
                name=task.name,
                num_examples=one.num_examples,
                rate=rate,
                num_sampled=len(examples),
                query_lengths=np.array([len(e.query) for e in examples]),
                passage_lengths=np.array(
                    [len(t) for e in examples for t in (e.positive, *e.negatives)]
                ),
                repeated={
                    part: one.num_examples - len(set(hashes))
                    for part, hashes in one.hashes.items()
                },
                descriptions=dict(one.descriptions.most_common()),
            )
        )
    return Statistics(
        tasks=tuple(found),
        overlaps=_overlaps([task.name for task in tasks], read),
        padding=_padding(sampled, rates, shape, batch_size, one_task_per_batch),
        num_batches=_BATCHES,
        shape=shape,
    )


def _read(tasks: Sequence[task_table.Task], sample: int) -> list[_Read]:
    """Reads every file through, once for all its tasks."""
    read = {task.name: _Read(random.Random(task.name)) for task in tasks}
    for path in dict.fromkeys(path for task in tasks for path in task.files):
        here = {t.source_task: read[t.name] for t in tasks if path in t.files}
        for pair in progress.track(jsonl.read_pairs(path), f"Reading {path}"):
            if pair.task in here:
                here[pair.task].add(pair, sample)
    for task in tasks:
        if not read[task.name].num_examples:
            raise ValueError(
                f"task {task.name}: no line of {', '.join(task.files)} has the task "
                f"{task.source_task!r}"
            )
    return list(read.values())


def _tokenize(
    task: task_table.Task,
    pairs: Sequence[jsonl.Pair],
    pieces: vocabularies.Vocabulary,
    text_format: text_formats.TextFormat,
) -> list[features.Example]:
    examples = []
    for pair in progress.track(pairs, f"Tokenizing a sample of {task.name}"):
        if task.unique_ids:
            pair = classification.append_id(pair)
        query, positive, negatives = formatting.write(text_format, task.name, pair)
        tokens = [np.array(t) for t in pieces.encode([query, positive, *negatives])]
        examples.append(
            features.Example(
                query=tokens[0],
                positive=tokens[1],
                negatives=tuple(tokens[2:]),
                query_id=np.array(pair.query_id),
                passage_id=np.array(pair.passage_id),
                negative_ids=np.reshape(pair.negative_ids, (-1, 2)),
                negative_group=pair.negative_group,
            )
        )
    return examples


def _overlaps(
    names: Sequence[str], read: Sequence[_Read]
) -> dict[tuple[str, str], dict[str, int]]:
    overlaps: dict[tuple[str, str], dict[str, int]] = {}
    for (one, first), (two, second) in itertools.combinations(
        zip(names, read, strict=True), 2
    ):
        shared = {
            part: len(np.intersect1d(first.hashes[part], second.hashes[part]))
            for part in PARTS
        }
        if any(shared.values()):
            overlaps[one, two] = shared
    return overlaps


def _padding(
    sampled: Sequence[Sequence[features.Example]],
    rates: Sequence[float],
    shape: features.Shape,
    batch_size: int,
    one_task_per_batch: bool,
) -> dict[tuple[str, bool], float]:
    """Returns the shares of padding in batches of the mixture."""
    draw = np.random.default_rng(0)
    empty, tokens = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    for _ in range(_BATCHES):
        num_drawn = 1 if one_task_per_batch else batch_size
        chosen = np.resize(draw.choice(len(sampled), num_drawn, p=rates), batch_size)
        examples = [
            sampled[task][int(draw.integers(len(sampled[task])))]
            for task in chosen.tolist()
        ]
        for packing in (False, True):
            batch = features.convert(
                examples, dataclasses.replace(shape, packing=packing)
            )
            for side in ("query", "passage"):
                is_empty = batch[f"{side}_segment_ids"] == 0
                for key in ((side, packing), ("both", packing)):
                    empty[key] += int(is_empty.sum())
                    tokens[key] += is_empty.size
    return {key: empty[key] / tokens[key] for key in tokens}
