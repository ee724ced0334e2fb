"""Hard negatives: passages that rank high for a query and do not answer it.

    {"task": "docs", "query": "sort a list", "positive": "sorted() returns ..."}
 -> {"task": "docs", "query": "sort a list", "positive": "sorted() returns ...",
     "negatives": ["list.reverse() reverses ..."]}

BM25 ranks, or a model: after a first round of training its own best wrong answers are
harder than those that share words (ANCE, Xiong et al. 2020).

The passages searched are the positives and negatives of the same task in the given
files. A passage is never a negative of a query that names it as positive on any line,
nor when its text is the query's own; equal texts count as one passage.

A `Corpus` holds its texts and, for each, 8 bytes a different word (of a model, 4 bytes
a dim) and some 500 for its ids: near 1 GB for a million passages of a hundred words.
"""

import dataclasses
import gzip
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.data import jsonl
from gecko_jax.inference import ranking
from gecko_jax.io import progress, writing
from gecko_jax.text import text_formats

_Id = tuple[int, int]

# A passage that was mined: text, title, and the id that the data gives it.
Mined = tuple[str, str, str | int | None]

# Makes what searches (title, text) of the passages of a task.
Build = Callable[[Sequence[tuple[str, str]], str], ranking.Retriever]

# Queries searched for at once.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class MiningSummary:
    """What was written.

    Attributes:
        examples: Lines written, one for each line read.
        mined: Negatives that were added.
        short: Examples that have fewer negatives than wanted.
    """

    examples: int
    mined: int
    short: int


def mine_negatives(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    num_negatives: int = 1,
    *,
    skip_top: int = 0,
    build: Build = ranking.Bm25Retriever,
) -> MiningSummary:
    """Adds hard negatives to pairs and writes them as one file.

    Lines keep their order and their other fields. Negatives that a line has already
    are kept and counted; only what is missing is mined.

    Args:
        files: JSONL of pairs, see `gecko_jax.data.jsonl`.
        output: JSONL, compressed if it ends in `.gz`; written whole or not at all.
        num_negatives: Negatives each line should have.
        skip_top: Best-ranked candidates to pass over, which are the likeliest to be
            answers that nobody marked.
        build: Makes the retriever of each task's passages.

    Raises:
        ValueError: A bad file or line, no lines, or an impossible number.
    """
    if num_negatives < 1 or skip_top < 0:
        raise ValueError(
            f"num_negatives={num_negatives}, skip_top={skip_top}: at least 1 negative "
            "must be wanted, and at least 0 candidates passed over"
        )
    records: list[dict[str, Any]] = []
    pairs: list[jsonl.Pair] = []
    for path in files:
        for _, record, pair in jsonl.read_lines(path):
            records.append(record)
            pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{', '.join(os.fspath(path) for path in files) or 'no files'}: no "
            "examples; give lines with task, query and positive"
        )
    mined: list[list[Mined]] = [[] for _ in pairs]
    by_task: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_task.setdefault(pair.task, []).append(number)
    answers = Answers(pairs)

    def lines() -> Iterator[dict[str, Any]]:
        """Mines when the first line is asked for: the output is known to be good."""
        with progress.Progress("Mining hard negatives", len(pairs)) as bar:
            done = 0
            for numbers in by_task.values():
                chosen = [pairs[number] for number in numbers]
                corpus = Corpus(chosen, build, answers)
                found = corpus.mine(chosen, num_negatives, skip_top=skip_top)
                for number, negatives in zip(numbers, found, strict=True):
                    mined[number] = negatives
                    done += 1
                    bar.update(done)
        yield from map(extend, records, pairs, mined)

    write_lines(output, lines())
    return MiningSummary(
        examples=len(pairs),
        mined=sum(map(len, mined)),
        short=sum(
            len(pair.negatives) + len(found) < num_negatives
            for pair, found in zip(pairs, mined, strict=True)
        ),
    )


class Answers:
    """Which texts answer a query, by all lines: none of them is a negative of it."""

    def __init__(self, pairs: Iterable[jsonl.Pair] = ()):
        """Takes pairs of all tasks.

        Two lines are of the same query when their texts or the ids they give are equal,
        or when both are that of a third; a positive stands for every text that was
        given its id.
        """
        self._query: dict[_Id, _Id] = {}  # A forest: key -> another key of the query.
        self._positives: dict[_Id, set[_Id]] = {}  # Of roots.
        self._texts: dict[_Id, set[_Id]] = {}
        for pair in pairs:
            self.add(pair)

    def add(self, pair: jsonl.Pair) -> None:
        """Takes one pair more."""
        for body, given in zip(
            (pair.positive, *pair.negatives),
            (pair.passage_id, *pair.negative_ids),
            strict=True,
        ):
            self._texts.setdefault(given, set()).add(text_formats.content_id(body))
        first, second = map(self._root, _query_keys(pair))
        self._query[first] = second
        positives = self._positives.setdefault(second, set())
        positives.add(pair.passage_id)
        if first != second:
            positives |= self._positives.pop(first, set())

    def of(self, pair: jsonl.Pair) -> set[_Id]:
        """Returns the content ids of all answers to the query of a pair."""
        found = self._positives[self._root(pair.query_id)]
        return set().union(*(self._texts[given] for given in found))

    def _root(self, key: _Id) -> _Id:
        while (above := self._query.setdefault(key, key)) != key:
            self._query[key] = self._query[above]
            key = above
        return key


class Corpus:
    """The passages of one task, indexed once for many queries."""

    def __init__(
        self,
        pairs: Iterable[jsonl.Pair],
        build: Build = ranking.Bm25Retriever,
        answers: Answers | None = None,
    ):
        """Takes positives and negatives of all pairs, each text once.

        Args:
            pairs: All of one task.
            build: Makes what searches them.
            answers: Of these pairs and of other tasks; None for those of these alone.
        """
        self._answers = Answers() if answers is None else answers
        # By content id. Titles do not tell passages apart here: a text under another
        # title would be a doubtful negative.
        self._passages: dict[_Id, Mined] = {}
        task = ""
        for pair in pairs:
            task = pair.task
            if answers is None:
                self._answers.add(pair)
            for passage in zip(
                (pair.positive, *pair.negatives),
                (pair.title, *pair.negative_titles),
                pair.given_ids,
                strict=True,
            ):
                self._passages.setdefault(text_formats.content_id(passage[0]), passage)
        self._ids = list(self._passages)
        self._retriever = build(
            [(title, body) for body, title, _ in self._passages.values()], task
        )

    def mine(
        self, pairs: Iterable[jsonl.Pair], num_negatives: int, *, skip_top: int = 0
    ) -> Iterator[list[Mined]]:
        """Yields what each pair lacks of its negatives.

        Args:
            pairs: All of them among those that the corpus was made of.
            num_negatives: Negatives each pair should have.
            skip_top: Best-ranked candidates to pass over.
        """
        pairs = iter(pairs)
        while block := list(itertools.islice(pairs, _BLOCK)):
            excluded = []
            for pair in block:
                own = {
                    text_formats.content_id(body)
                    for body in (pair.query, *pair.negatives)
                }
                excluded.append(own | self._answers.of(pair))
            depth = num_negatives + skip_top + max(map(len, excluded))
            found = self._retriever.search(
                [pair.query for pair in block],
                [pair.task_description or pair.task for pair in block],
                depth,
            )
            for pair, own, (best, _) in zip(block, excluded, found, strict=True):
                candidates = [
                    self._ids[place] for place in best if self._ids[place] not in own
                ]
                wanted = max(num_negatives - len(pair.negatives), 0)
                yield [
                    self._passages[passage]
                    for passage in candidates[skip_top : skip_top + wanted]
                ]


def write_lines(
    output: str | os.PathLike, records: Iterable[Mapping[str, Any]]
) -> None:
    """Writes JSON lines, compressed if the name ends in `.gz`; whole or not at all."""
    with writing.write_file(output) as temporary, temporary.open("wb") as raw:
        # Without a name and a time: equal lines give equal bytes.
        packed = (
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
            if os.fspath(output).endswith(".gz")
            else None
        )
        lines = packed or raw
        for record in records:
            lines.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        if packed:
            packed.close()


def _query_keys(pair: jsonl.Pair) -> tuple[_Id, _Id]:
    return pair.query_id, text_formats.content_id(pair.query)


def extend(
    record: dict[str, Any], pair: jsonl.Pair, found: Sequence[Mined]
) -> dict[str, Any]:
    """Returns the record with the mined negatives after its own."""
    if not found:
        return record
    extended = {name: value for name, value in record.items() if name != "negative"}
    extended["negatives"] = [*pair.negatives, *(body for body, _, _ in found)]
    titles = [*pair.negative_titles, *(title for _, title, _ in found)]
    if any(titles):
        extended["negative_titles"] = titles
    ids = [*pair.given_ids[1:], *(given for _, _, given in found)]
    if any(given is not None for given in ids):
        extended["negative_ids"] = ids
    return extended
