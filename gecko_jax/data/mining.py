"""Hard negatives by BM25: passages that share the query's words and do not answer it.

    {"task": "docs", "query": "sort a list", "positive": "sorted() returns ..."}
 -> {"task": "docs", "query": "sort a list", "positive": "sorted() returns ...",
     "negatives": ["list.reverse() reverses ..."]}

The passages searched are the positives and negatives of the same task in the given
files. A passage is never a negative of a query that names it as positive on any line,
nor when its text is the query's own; equal texts count as one passage.
"""

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gecko_jax import files as files_lib
from gecko_jax import progress, ranking, text
from gecko_jax.data import jsonl

_Id = tuple[int, int]


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
    mined: list[list[tuple[str, str]]] = [[] for _ in pairs]
    by_task: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_task.setdefault(pair.task, []).append(number)
    for number, found in progress.track(
        _mine_tasks(pairs, by_task, num_negatives, skip_top),
        "Mining hard negatives",
        len(pairs),
    ):
        mined[number] = found
    with files_lib.write_file(output) as temporary, temporary.open("wb") as raw:
        # Without a name and a time: equal lines give equal bytes.
        packed = (
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
            if os.fspath(output).endswith(".gz")
            else None
        )
        lines = packed or raw
        for record, pair, found in zip(records, pairs, mined, strict=True):
            line = json.dumps(_extend(record, pair, found), ensure_ascii=False)
            lines.write((line + "\n").encode())
        if packed:
            packed.close()
    return MiningSummary(
        examples=len(pairs),
        mined=sum(map(len, mined)),
        short=sum(
            len(pair.negatives) + len(found) < num_negatives
            for pair, found in zip(pairs, mined, strict=True)
        ),
    )


def _mine_tasks(
    pairs: Sequence[jsonl.Pair],
    by_task: dict[str, list[int]],
    num_negatives: int,
    skip_top: int,
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yields (line, mined negatives with their titles), task by task."""
    for numbers in by_task.values():
        chosen = [pairs[number] for number in numbers]
        passages = _passages(chosen)
        answers = _answers(chosen)
        contents = [f"{title}\n{body}" for body, title in passages.values()]
        ids = list(passages)
        queries = [pair.query for pair in chosen]
        for number, pair, scores in zip(
            numbers, chosen, _bm25_scores(queries, contents), strict=True
        ):
            wanted = num_negatives - len(pair.negatives)
            excluded = {text.content_id(body) for body in (pair.query, *pair.negatives)}
            for key in _query_keys(pair):
                excluded |= answers[key]
            depth = max(wanted, 0) + skip_top + len(excluded)
            candidates = [
                ids[position]
                for position in ranking.best_positions(scores, depth)
                if scores[position] > 0 and ids[position] not in excluded
            ]
            found = candidates[skip_top : skip_top + max(wanted, 0)]
            yield number, [passages[passage] for passage in found]


def _passages(pairs: Sequence[jsonl.Pair]) -> dict[_Id, tuple[str, str]]:
    """Returns content id -> (text, title) of each different text.

    Titles do not tell passages apart here: a text under another title would be a
    doubtful negative.
    """
    passages: dict[_Id, tuple[str, str]] = {}
    for pair in pairs:
        for body, title in zip(
            (pair.positive, *pair.negatives),
            (pair.title, *pair.negative_titles),
            strict=True,
        ):
            passages.setdefault(text.content_id(body), (body, title))
    return passages


def _answers(pairs: Sequence[jsonl.Pair]) -> dict[_Id, set[_Id]]:
    """Returns query -> the content ids of all its positives.

    Two lines are of the same query when their texts or the ids they give are equal;
    a positive stands for every text that was given its id.
    """
    same_passage: dict[_Id, set[_Id]] = {}
    for pair in pairs:
        for body, given in zip(
            (pair.positive, *pair.negatives),
            (pair.passage_id, *pair.negative_ids),
            strict=True,
        ):
            same_passage.setdefault(given, set()).add(text.content_id(body))
    answers: dict[_Id, set[_Id]] = {}
    for pair in pairs:
        for key in _query_keys(pair):
            answers.setdefault(key, set()).update(same_passage[pair.passage_id])
    return answers


def _query_keys(pair: jsonl.Pair) -> tuple[_Id, _Id]:
    return pair.query_id, text.content_id(pair.query)


def _extend(
    record: dict[str, Any], pair: jsonl.Pair, found: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Returns the record with the mined negatives after its own."""
    if not found:
        return record
    extended = {name: value for name, value in record.items() if name != "negative"}
    extended["negatives"] = [*pair.negatives, *(body for body, _ in found)]
    titles = [*pair.negative_titles, *(title for _, title in found)]
    if any(titles):
        extended["negative_titles"] = titles
    if record.get("negative_ids") is not None:
        extended["negative_ids"] = [*record["negative_ids"], *([None] * len(found))]
    return extended


def _bm25_scores(
    queries: Sequence[str], passages: Sequence[str]
) -> Iterator[np.ndarray]:
    """Yields the BM25 score of every passage, query by query."""
    import bm25s
    import Stemmer

    def tokenize(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(
            list(texts),
            stopwords="en",
            stemmer=Stemmer.Stemmer("english"),
            return_ids=False,
            show_progress=False,
        )

    words = tokenize(passages)
    nothing = np.zeros(len(passages), np.float32)
    if not any(words):  # Nothing but stop words: bm25s has no vocabulary to index.
        yield from (nothing for _ in queries)
        return
    retriever = bm25s.BM25()
    retriever.index(words, show_progress=False)
    for query in tokenize(queries):
        known = retriever.get_tokens_ids(query)
        yield np.asarray(retriever.get_scores_from_ids(known)) if known else nothing
