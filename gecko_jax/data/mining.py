"""Hard negatives: passages that rank high for a query and do not answer it.

    {"task": "docs", "query": "sort a list", "positive": "sorted() returns ..."}
 -> {"task": "docs", "query": "sort a list", "positive": "sorted() returns ...",
     "negatives": ["list.reverse() reverses ..."]}

BM25 or a model ranks the passages. After a first round of training, the model's own
best wrong answers are harder than those that share words (ANCE, Xiong et al. 2020).

The candidates of a query are the positives and negatives of its task in the given
files. Passages of equal text are one passage. A passage is never a negative of a query
whose positive it is on any line, or whose text it equals. With a limit, a passage that
a model ranks nearly as high as the positive is no negative either, because it may be an
unmarked answer (TopK-PercPos of NV-Retriever, arXiv 2407.15831, which keeps those below
0.95 of the positive's score).

A `Corpus` holds its texts, 8 bytes for each different word of a text (with a model, 4
bytes for each dim), and about 500 bytes of ids a text: almost 1 GB for a million
passages of a hundred words.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.data import jsonl
from gecko_jax.inference import ranking
from gecko_jax.io import checksums, progress, reading, writing
from gecko_jax.text import text_formats

_Id = tuple[int, int]

# A mined passage: text, title, and its id in the file.
Mined = tuple[str, str, str | int | None]

# Builds a retriever of the passages (title, text) of a task.
Build = Callable[[Sequence[tuple[str, str]], str], ranking.Retriever]

# Queries per search.
_BLOCK = 256

# With a limit, passages of the first search, and the factor of each deeper one.
_DEPTH, _DEEPER = 64, 8


@dataclasses.dataclass(frozen=True)
class MiningSummary:
    """Counts of `mine_negatives`."""

    examples: int
    mined: int  # negatives that were added
    short: int  # examples that still have fewer negatives than requested


def mine_negatives(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    num_negatives: int = 1,
    *,
    skip_top: int = 0,
    max_negative_share: float = 0.0,
    build: Build = ranking.Bm25Retriever,
    retriever: str = "bm25",
) -> MiningSummary:
    """Adds hard negatives to pairs and writes them to one file.

    Lines keep their order and their other fields. Negatives of a line are kept, and
    only the missing ones are mined. `OUTPUT.meta.json` records the settings.

    Args:
        files: JSONL of pairs, see `jsonl`.
        output: JSONL, compressed if its name ends in `.gz`.
        num_negatives: Negatives of each line.
        skip_top: Number of best-ranked candidates to skip, which are most likely
            unmarked answers.
        max_negative_share: Limit of a mined negative's similarity to the query, as a
            share of the positive's; 0 for no limit.
        build: Builds the retriever of each task's passages.
        retriever: Name of the retriever, for the record.

    Raises:
        ValueError: A file or line is invalid, there are no lines, or a number is
            impossible.
    """
    if not 0 <= max_negative_share < 1:
        raise ValueError(
            f"max_negative_share={max_negative_share}: must be in [0, 1); 0 is no limit"
        )
    if max_negative_share and build is ranking.Bm25Retriever:
        raise ValueError(
            f"max_negative_share={max_negative_share}: needs similarities of a model, "
            "and BM25 only counts shared words; mine with --model, or set it to 0"
        )
    records: list[dict[str, Any]] = []
    pairs: list[jsonl.Pair] = []
    by_task: dict[str, list[int]] = {}
    for path in files:
        for _, record, pair in jsonl.read_lines(path):
            by_task.setdefault(pair.task, []).append(len(pairs))
            records.append(record)
            pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{', '.join(os.fspath(path) for path in files) or 'no files'}: no "
            "examples; give lines with task, query and positive"
        )
    mined: list[list[Mined]] = [[] for _ in pairs]
    answers = Answers(pairs)

    limits: Any = {"skip_top": skip_top, "max_negative_share": max_negative_share}

    def mine() -> Iterator[int]:
        for numbers in by_task.values():
            members = [pairs[number] for number in numbers]
            corpus = Corpus(members, build, answers)
            negatives_of_task = corpus.mine(members, num_negatives, **limits)
            for number, negatives in zip(numbers, negatives_of_task, strict=True):
                mined[number] = negatives
                yield number

    def lines() -> Iterator[dict[str, Any]]:
        # Mining starts after `write_lines` has opened the output.
        for _ in progress.track(mine(), "Mining hard negatives", len(pairs)):
            pass
        yield from map(extend, records, pairs, mined)

    write_lines(output, lines())
    short = count_short(pairs, mined, num_negatives)
    summary = MiningSummary(len(pairs), sum(map(len, mined)), short)
    facts = {
        "retriever": retriever,
        "num_negatives": num_negatives,
        **limits,
        **dataclasses.asdict(summary),
        "sources": {os.fspath(path): reading.sha256(path) for path in files},
        "sha256": reading.sha256(output),
    }
    checksums.write_object(pathlib.Path(f"{os.fspath(output)}.meta.json"), facts)
    return summary


def count_short(
    pairs: Sequence[jsonl.Pair], mined: Sequence[Sequence[Mined]], num_negatives: int
) -> int:
    """Returns how many pairs have fewer negatives than requested, with those mined."""
    return sum(
        len(pair.negatives) + len(added) < num_negatives
        for pair, added in zip(pairs, mined, strict=True)
    )


class Answers:
    """The texts that answer each query, according to all lines of all tasks.

    Two lines have the same query if their texts are equal, their ids in the file are
    equal, or both have the same query as a third line. A positive stands for every text
    with its id.
    """

    def __init__(self, pairs: Iterable[jsonl.Pair] = ()):
        # Disjoint sets of query ids, as a forest: id -> parent id.
        self._parents: dict[_Id, _Id] = {}
        # Root of a query -> ids of its positives; id of a passage -> its texts.
        self._positives: dict[_Id, set[_Id]] = {}
        self._texts: dict[_Id, set[_Id]] = {}
        for pair in pairs:
            self.add(pair)

    def add(self, pair: jsonl.Pair) -> None:
        """Adds one pair."""
        for body, _, identity in pair.passages:
            self._texts.setdefault(identity, set()).add(text_formats.content_id(body))
        first = self._root(pair.query_id)
        second = self._root(text_formats.content_id(pair.query))
        self._parents[first] = second
        positives = self._positives.setdefault(second, set())
        positives.add(pair.passage_id)
        if first != second:
            positives |= self._positives.pop(first, set())

    def of(self, pair: jsonl.Pair) -> set[_Id]:
        """Returns the content ids of all answers to the query of a pair."""
        positives = self._positives[self._root(pair.query_id)]
        return set().union(*(self._texts[identity] for identity in positives))

    def _root(self, key: _Id) -> _Id:
        while (parent := self._parents.setdefault(key, key)) != key:
            self._parents[key] = self._parents[parent]  # Halves the path.
            key = parent
        return key


class Corpus:
    """The passages of one task, indexed once for many queries."""

    def __init__(
        self,
        pairs: Iterable[jsonl.Pair],
        build: Build = ranking.Bm25Retriever,
        answers: Answers | None = None,
    ):
        """Indexes the positives and negatives of one task's pairs, each text once.

        `answers` are those of these pairs and of other tasks; None collects those of
        these pairs.
        """
        self._answers = Answers() if answers is None else answers
        # By content id of the text alone: the same text under another title would be a
        # doubtful negative.
        self._passages: dict[_Id, Mined] = {}
        task = ""
        for pair in pairs:
            task = pair.task
            if answers is None:
                self._answers.add(pair)
            passages = zip(pair.passages, pair.given_ids, strict=True)
            for (body, title, _), given_id in passages:
                identity = text_formats.content_id(body)
                self._passages.setdefault(identity, (body, title, given_id))
        self._ids = list(self._passages)
        self._retriever = build(
            [(title, body) for body, title, _ in self._passages.values()], task
        )

    def mine(
        self,
        pairs: Iterable[jsonl.Pair],
        num_negatives: int,
        *,
        skip_top: int = 0,
        max_negative_share: float = 0.0,
    ) -> Iterator[list[Mined]]:
        """Yields the missing negatives of pairs that the corpus was built from.

        See `mine_negatives` for the arguments.
        """
        pairs = iter(pairs)
        while block := list(itertools.islice(pairs, _BLOCK)):
            excluded = [
                self._answers.of(pair)
                | set(map(text_formats.content_id, (pair.query, *pair.negatives)))
                for pair in block
            ]
            depth = num_negatives + skip_top + max(map(len, excluded))
            missing = [max(num_negatives - len(pair.negatives), 0) for pair in block]
            negatives: list[list[_Id]] = [[] for _ in block]
            unfinished = list(range(len(block)))
            if max_negative_share:
                depth = max(depth, _DEPTH)
            while unfinished:
                searched = [block[place] for place in unfinished]
                queries = [pair.query for pair in searched]
                tasks = [pair.task_description or pair.task for pair in searched]
                rankings = self._retriever.search(queries, tasks, depth)
                for place, (best, scores) in zip(unfinished, rankings, strict=True):
                    ids = (self._ids[position] for position in best)
                    score_of = dict(zip(ids, scores, strict=True))
                    limit = _limit(block[place], score_of, max_negative_share)
                    candidates = [i for i in score_of if i not in excluded[place]]
                    below = [i for i in candidates[skip_top:] if score_of[i] < limit]
                    negatives[place] = below[: missing[place]]
                # Passages below the limit may lie deeper in the ranking.
                if not max_negative_share or depth >= len(self._ids):
                    break
                unfinished = [n for n in unfinished if len(negatives[n]) < missing[n]]
                depth *= _DEEPER
            for ids in negatives:
                yield [self._passages[identity] for identity in ids]


def _limit(pair: jsonl.Pair, score_of: Mapping[_Id, float], share: float) -> float:
    """Returns the score that a negative must not reach."""
    if not share:
        return math.inf
    score = score_of.get(text_formats.content_id(pair.positive))
    if score is None:  # Nothing is known to rank below the positive.
        return -math.inf
    # A share of a negative score would be a limit above it.
    return score - (1 - share) * abs(score)


def write_lines(
    output: str | os.PathLike, records: Iterable[Mapping[str, Any]]
) -> None:
    """Writes JSON lines, compressed if the name ends in `.gz`; whole or not at all."""
    with writing.write_file(output) as temporary, temporary.open("wb") as raw:
        lines: Any = contextlib.nullcontext(raw)
        if os.fspath(output).endswith(".gz"):
            # Without a name and a time, equal lines give equal bytes.
            lines = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        with lines as file:
            for record in records:
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def extend(
    record: dict[str, Any], pair: jsonl.Pair, mined: Sequence[Mined]
) -> dict[str, Any]:
    """Returns the record with the mined negatives after its own."""
    if not mined:
        return record
    extended = {name: value for name, value in record.items() if name != "negative"}
    extended["negatives"] = [*pair.negatives, *(body for body, _, _ in mined)]
    titles = [*pair.negative_titles, *(title for _, title, _ in mined)]
    if any(titles):
        extended["negative_titles"] = titles
    ids = [*pair.given_ids[1:], *(given_id for _, _, given_id in mined)]
    if any(given_id is not None for given_id in ids):
        extended["negative_ids"] = ids
    if pair.scores:  # No judge has seen the mined ones.
        extended["scores"] = [*record["scores"], *[None] * len(mined)]
    return extended
