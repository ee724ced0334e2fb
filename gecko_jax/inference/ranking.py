"""Ranking: how good a ranked list is, and BM25, the line every embedder must beat.

A *ranking* is a list of passage ids, best first. *Relevance* maps passage ids to
grades; a passage that is missing or graded 0 or below is not relevant. Metrics are
those of trec_eval and lie in [0, 1], Spearman's correlation in [-1, 1].

Passages with equal scores rank as in trec_eval, pytrec_eval and mteb: the greater id
first, compared as a string ("p9" before "p10"). `tie_order` gives that order.

    ranking   ["p3", "p7", "p1"]
    relevance {"p7": 2, "p9": 1}
    nDCG@10   (2 / log2(3)) / (2 / log2(2) + 1 / log2(3)) = 0.480
"""

import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

from gecko_jax.io import wording
from gecko_jax.text import word_rule


def ndcg_at_k(
    ranking: Sequence[str], relevance: Mapping[str, int | float], k: int = 10
) -> float:
    """Returns the discounted gain of the first k over the best one possible.

    The gain is the grade itself (linear, as in trec_eval and BEIR) and the discount
    log2(rank + 1). Without a relevant passage the result is 0. Grades may be fractions:
    the result does not change when all grades are multiplied by the same factor.
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    grades = {p: float(grade) for p, grade in relevance.items() if grade > 0}
    if not grades:
        return 0.0
    # A power of two scales without rounding, and keeps the sums of huge grades finite.
    _, exponent = math.frexp(max(grades.values()))
    ideal = np.ldexp(sorted(grades.values(), reverse=True)[:k], -exponent)
    gains = np.ldexp([grades.get(passage, 0.0) for passage in ranking[:k]], -exponent)
    best = np.dot(ideal, discounts[: len(ideal)])
    return float(np.dot(gains, discounts[: len(gains)]) / best)


def recall_at_k(
    ranking: Sequence[str], relevance: Mapping[str, int | float], k: int = 100
) -> float:
    """Returns the share of the relevant passages that are among the first k."""
    relevant = {passage for passage, grade in relevance.items() if grade > 0}
    return len(relevant.intersection(ranking[:k])) / len(relevant) if relevant else 0.0


def mrr_at_k(
    ranking: Sequence[str], relevance: Mapping[str, int | float], k: int = 10
) -> float:
    """Returns 1 / rank of the first relevant passage, 0 when it is beyond k."""
    for rank, passage in enumerate(ranking[:k], start=1):
        if relevance.get(passage, 0) > 0:
            return 1.0 / rank
    return 0.0


def spearman(
    predicted: Float[np.ndarray, " N"], gold: Float[np.ndarray, " N"]
) -> float:
    """Returns the correlation of the ranks; equal values share their mean rank.

    A constant side orders nothing: the result is then 0.
    """
    if len(predicted) < 2:
        raise ValueError(
            f"{wording.counted(len(predicted), 'pair')}: Spearman's correlation needs "
            "at least 2"
        )
    ranks = np.stack([_mean_ranks(predicted), _mean_ranks(gold)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=1))
    if not norms.all():
        return 0.0
    return float(np.clip(ranks[0] @ ranks[1] / norms.prod(), -1.0, 1.0))


def _mean_ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    _, group, counts = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def tie_order(ids: Sequence[str]) -> list[int]:
    """Returns the positions of passages from the greatest id to the least.

    A search in a corpus of this order that keeps the earlier of two equal scores ranks
    ties as trec_eval does, at the border of a list too.
    """
    return sorted(range(len(ids)), key=ids.__getitem__, reverse=True)


def distinct_rows(
    rows: Shaped[np.ndarray, "N W"],
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " N"]]:
    """Returns the first position of each distinct row, and the number of each row's.

    The products of equal rows can differ in the last bit, because a matrix product
    treats the rows at its edges differently. Scores that are computed once for each
    distinct row are equal.
    """
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    number_of = np.empty(len(rows), np.int64)
    for position, row in enumerate(np.ascontiguousarray(rows)):
        key = hashlib.blake2b(row.data, digest_size=16).digest()
        number = numbers.setdefault(key, len(first))
        if number == len(first):
            first.append(position)
        number_of[position] = number
    return np.array(first, np.int64), number_of


def best_positions(scores: Float[np.ndarray, " P"], k: int) -> Int[np.ndarray, " T"]:
    """Returns the positions of the k highest scores, best first.

    Of equal scores the earlier position wins, at the border of the list too.
    """
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, np.int64)
    border = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= border)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


class Bm25:
    """BM25 over a corpus (bm25s, English stemmer), built once for many queries.

    Terms are those of `words.terms`. Terms of one letter, as in "R" or "C++", have an
    index of their own, whose scores are added: formulas and code are full of them, and
    would seem longer than they are.
    """

    def __init__(self, passages: Sequence[str]):
        """Indexes the passages; a title belongs in front of its text."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # It tells every step.
        self._retrievers: list[bm25s.BM25 | None] = []
        for terms in zip(*map(_terms, passages), strict=True):
            retriever = None
            if any(terms):  # Else nothing but stop words: there is nothing to index.
                retriever = bm25s.BM25()
                retriever.index(list(terms), show_progress=False)
            self._retrievers.append(retriever)

    def search(
        self, queries: Sequence[str], k: int
    ) -> Iterator[tuple[Int[np.ndarray, " T"], Float[np.ndarray, " T"]]]:
        """Yields positions and scores of the k best passages, query by query.

        Passages that share no term with the query never appear, so there may be fewer.
        """
        for query in queries:
            parts = []
            for retriever, terms in zip(self._retrievers, _terms(query), strict=True):
                known = retriever.get_tokens_ids(terms) if retriever else []
                if known and retriever:
                    parts.append(retriever.get_scores_from_ids(known))
            if not parts:
                yield np.empty(0, np.int64), np.empty(0, np.float32)
                continue
            scores = np.asarray(sum(parts), np.float32)
            best = best_positions(scores, k)
            best = best[scores[best] > 0]
            yield best, scores[best]


def _terms(text: str) -> tuple[list[str], list[str]]:
    """Returns the stems of the longer terms of a text, and its terms of one letter."""
    stop_words, stemmer = _english()
    long, short = [], []
    for term in word_rule.terms(text):
        if term not in stop_words:
            (short if len(term) == 1 else long).append(term)
    return stemmer.stemWords(long), short


@functools.cache
def _english() -> tuple[frozenset[str], Any]:
    import Stemmer
    from bm25s import stopwords

    return frozenset(stopwords.STOPWORDS_EN), Stemmer.Stemmer("english")


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries."""

    def search(
        self, queries: Sequence[str], tasks: Sequence[str], k: int
    ) -> list[tuple[list[int], list[float]]]:
        """Returns positions and scores of the k best passages per query."""
        ...


class Bm25Retriever:
    """Words in common; the task has no part in it."""

    def __init__(self, passages: Sequence[tuple[str, str]], task: str = ""):
        """Indexes (title, text) of every passage."""
        del task
        self._bm25 = Bm25([f"{title}\n{body}" for title, body in passages])

    def search(
        self, queries: Sequence[str], tasks: Sequence[str], k: int
    ) -> list[tuple[list[int], list[float]]]:
        """See `Retriever.search`; passages without a common word are never found."""
        del tasks
        found = self._bm25.search(queries, k)
        return [(best.tolist(), scores.tolist()) for best, scores in found]


def bm25_rankings(
    queries: Sequence[str],
    passages: Sequence[str],
    ids: Sequence[str],
    k: int = 100,
) -> list[list[str]]:
    """Ranks the passages for every query with BM25 (bm25s, English stemmer).

    Args:
        queries: What is looked for, without any task format.
        passages: The corpus; a title belongs in front of its text.
        ids: One id per passage.
        k: Longest ranking. Passages that share no word with the query never appear,
            so a ranking may be shorter.

    Returns:
        The ids of the best passages for each query; equal scores in `tie_order`.
    """
    if len(passages) != len(ids):
        raise ValueError(f"{len(passages)} passages but {len(ids)} ids: one id each")
    order = tie_order(ids)
    found = Bm25([passages[position] for position in order]).search(queries, k)
    return [[ids[order[int(place)]] for place in best] for best, _ in found]
