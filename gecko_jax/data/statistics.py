"""Statistics of a mixture, to inspect before training on it.

    lengths      tokens of queries and passages, in a sample of each task
    truncation   texts of the sample that are longer than the configured length
    padding      share of padding tokens in batches drawn from the sample
    duplicates   repeated queries, positives and pairs, over all lines
    overlaps     texts that two tasks share, over all lines

Texts are equal if they have the same words, in any case (`word_rule.words`). Every line
is read and checked once, and no cache is written. Memory is 24 bytes a line, plus the
sample.
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

# The parts of an example that are compared.
PARTS = ("query", "positive", "pair")

# Size of a task's sample, and number of batches drawn from the samples.
SAMPLE = 5_000
_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
    """Statistics of a task."""

    name: str
    num_examples: int
    rate: float  # share of the mixture
    num_sampled: int
    # Tokens of the sampled texts, not truncated; negatives are passages, too.
    query_lengths: Int[np.ndarray, " Q"]
    passage_lengths: Int[np.ndarray, " P"]
    repeated: dict[str, int]  # part -> lines whose part is on an earlier line
    descriptions: dict[str, int]  # task description -> lines with it as their own


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of a mixture."""

    tasks: tuple[TaskStatistics, ...]
    # Two tasks -> part -> number of shared texts; only pairs with any.
    overlaps: dict[tuple[str, str], dict[str, int]]
    # (query, passage or both; whether rows are packed) -> share of padding tokens.
    padding: dict[tuple[str, bool], float]
    num_batches: int  # for `padding`
    shape: features.Shape


class _Lines:
    """The lines of a task: a sample, and the hashes of all texts."""

    def __init__(self, task: str):
        self.random = random.Random(task)
        self.num_examples = 0
        self.sample: list[jsonl.Pair] = []
        # Part -> 64-bit hash of each line.
        self.hashes = {part: array.array("Q") for part in PARTS}
        self.descriptions: Counter[str] = Counter()

    def add(self, pair: jsonl.Pair, sample: int) -> None:
        self.num_examples += 1
        # Reservoir sampling: line n enters the sample with probability sample / n.
        if len(self.sample) < sample:
            self.sample.append(pair)
        elif (place := self.random.randrange(self.num_examples)) < sample:
            self.sample[place] = pair
        query = overlap.content_hash(pair.query)
        positive = overlap.content_hash(pair.positive)
        example = overlap.content_hash(f"{query} {positive}")
        for part, value in zip(PARTS, (query, positive, example), strict=True):
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
    """Reads all lines of the tasks, and tokenizes at most `sample` of each.

    The tasks' descriptions complete `text_format`, and `drawn` gives their rates.
    Raises ValueError if a line is invalid, or a task has none.
    """
    text_format = formatting.complete_text_format(text_format, tasks, vocabulary)
    lines = {task.name: _Lines(task.name) for task in tasks}
    for task, _, pair in task_table.read_lines(tasks, "Reading"):
        lines[task.name].add(pair, sample)
    for task in tasks:
        if not lines[task.name].num_examples:
            raise task_table.no_lines(task)
    sizes = [task_lines.num_examples for task_lines in lines.values()]
    weights = drawn.rates(list(lines), sizes)
    rates = [weight / sum(weights) for weight in weights]
    statistics, sampled = [], []
    for task, rate in zip(tasks, rates, strict=True):
        read = lines[task.name]
        examples = _tokenize(task, read.sample, vocabulary, text_format)
        sampled.append(examples)
        passages = [text for e in examples for text in (e.positive, *e.negatives)]
        statistics.append(
            TaskStatistics(
                name=task.name,
                num_examples=read.num_examples,
                rate=rate,
                num_sampled=len(examples),
                query_lengths=np.array([len(e.query) for e in examples]),
                passage_lengths=np.array(list(map(len, passages))),
                repeated={p: len(h) - len(set(h)) for p, h in read.hashes.items()},
                descriptions=dict(read.descriptions.most_common()),
            )
        )
    overlaps: dict[tuple[str, str], dict[str, int]] = {}
    for first, second in itertools.combinations(lines, 2):
        one, other = lines[first].hashes, lines[second].hashes
        shared = {p: len(np.intersect1d(one[p], other[p])) for p in PARTS}
        if any(shared.values()):
            overlaps[first, second] = shared
    return Statistics(
        tasks=tuple(statistics),
        overlaps=overlaps,
        padding=_padding(sampled, rates, shape, batch_size, one_task_per_batch),
        num_batches=_BATCHES,
        shape=shape,
    )


def _tokenize(
    task: task_table.Task,
    pairs: Sequence[jsonl.Pair],
    vocabulary: vocabularies.Vocabulary,
    text_format: text_formats.TextFormat,
) -> list[features.Example]:
    examples = []
    for pair in progress.track(pairs, f"Tokenizing a sample of {task.name}"):
        if task.unique_ids:
            pair = classification.append_id(pair)
        query, positive, negatives = formatting.write(text_format, task, pair)
        tokens = [np.array(t) for t in vocabulary.encode([query, positive, *negatives])]
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


def _padding(
    sampled: Sequence[Sequence[features.Example]],
    rates: Sequence[float],
    shape: features.Shape,
    batch_size: int,
    one_task_per_batch: bool,
) -> dict[tuple[str, bool], float]:
    """Returns the shares of padding in batches of the mixture."""
    draw = np.random.default_rng(0)
    padding, total = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    for _ in range(_BATCHES):
        num_drawn = 1 if one_task_per_batch else batch_size
        tasks = np.resize(draw.choice(len(sampled), num_drawn, p=rates), batch_size)
        samples = [sampled[task] for task in tasks.tolist()]
        examples = [sample[int(draw.integers(len(sample)))] for sample in samples]
        for packing in (False, True):
            packed_shape = dataclasses.replace(shape, packing=packing)
            batch = features.convert(examples, packed_shape)
            for side in ("query", "passage"):
                is_padding = batch[f"{side}_segment_ids"] == 0
                for key in ((side, packing), ("both", packing)):
                    padding[key] += int(is_padding.sum())
                    total[key] += is_padding.size
    return {key: padding[key] / total[key] for key in total}
