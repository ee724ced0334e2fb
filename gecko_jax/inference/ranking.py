"""Ranking metrics, the order of ties, and the BM25 baseline.

A *ranking* is a list of passage ids, best first. *Relevance* maps passage ids to
grades; a passage without a grade, or with a grade of 0 or below, is not relevant.
Metrics equal those of trec_eval and lie in [0, 1]; Spearman's correlation lies in
[-1, 1].

Passages with equal scores rank as in trec_eval, pytrec_eval and mteb: the greater id
first, compared as a string ("p9" before "p10"). `tie_order` returns that order.

    ranking   ["p3", "p7", "p1"]
    relevance {"p7": 2, "p9": 1}
    nDCG@10   (2 / log2(3)) / (2 / log2(2) + 1 / log2(3)) = 0.480
"""

import functools
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

from gecko_jax.text import word_rule


def ndcg_at_k(
    ranking: Sequence[str], relevance: Mapping[str, int | float], k: int = 10
) -> float:
    """Returns the discounted gain of the first k results, relative to the ideal one.

    The gain is the grade itself (linear, as in trec_eval and BEIR), the discount is
    log2(rank + 1). Without a relevant passage the result is 0. Multiplying all grades
    by one factor does not change the result.
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    grades = {p: float(grade) for p, grade in relevance.items() if grade > 0}
    if not grades:
        return 0.0
    # Scaling by a power of two is exact and keeps the sums of huge grades finite.
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

    The result is 0 if either side is constant.
    """
    if len(predicted) < 2:
        raise ValueError(f"{len(predicted)} pairs: Spearman needs at least 2")
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

    If the corpus is in this order, a search that prefers the earlier of two equal
    scores ranks ties as trec_eval does, also at the end of a cut-off list.
    """
    return sorted(range(len(ids)), key=ids.__getitem__, reverse=True)


def distinct_rows(
    rows: Shaped[np.ndarray, "N W"],
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " N"]]:
    """Returns the first position of each distinct row, and each row's index in them.

    A matrix product treats the rows at its edges differently, so the scores of equal
    rows can differ in the last bit. Computing the score of each distinct row once keeps
    them equal.
    """
    index_of: dict[bytes, int] = {}
    first: list[int] = []
    indices = np.empty(len(rows), np.int64)
    for position, row in enumerate(np.ascontiguousarray(rows)):
        key = hashlib.blake2b(row.data, digest_size=16).digest()
        indices[position] = index_of.setdefault(key, len(first))
        if len(index_of) > len(first):
            first.append(position)
    return np.array(first, np.int64), indices


def best_positions(scores: Float[np.ndarray, " P"], k: int) -> Int[np.ndarray, " T"]:
    """Returns the positions of the k highest scores, best first.

    The earlier of two equal scores wins, also at the end of the list.
    """
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, np.int64)
    border = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= border)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries."""

    def search(
        self, queries: Sequence[str], tasks: Sequence[str], k: int
    ) -> list[tuple[list[int], list[float]]]:
        """Returns positions and scores of the k best passages per query."""
        ...


class Bm25Retriever:
    """BM25 (bm25s, English stemmer) over (title, text) of passages; ignores tasks.

    Terms are those of `word_rule.terms`. Terms of one letter, as in "R" or "C++", have
    a separate index whose scores are added. In one index, the many single letters of
    formulas and code would inflate the length of passages.
    """

    def __init__(self, passages: Sequence[tuple[str, str]], task: str = ""):
        del task
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # Logs every step.
        texts = (f"{title}\n{body}" for title, body in passages)
        self._indexes: list[bm25s.BM25 | None] = []
        for terms in zip(*map(_terms, texts), strict=True):
            index = None
            if any(terms):  # bm25s cannot index a corpus without terms.
                index = bm25s.BM25()
                index.index(list(terms), show_progress=False)
            self._indexes.append(index)

    def search(
        self, queries: Sequence[str], tasks: Sequence[str], k: int
    ) -> list[tuple[list[int], list[float]]]:
        """See `Retriever.search`; omits passages that share no term with the query."""
        del tasks
        results = []
        for query in queries:
            parts = []
            for index, terms in zip(self._indexes, _terms(query), strict=True):
                if index and (known := index.get_tokens_ids(terms)):
                    parts.append(index.get_scores_from_ids(known))
            scores = np.asarray(sum(parts) if parts else [], np.float32)
            best = best_positions(scores, k)
            best = best[scores[best] > 0]
            results.append((best.tolist(), scores[best].tolist()))
        return results


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


def bm25_rankings(
    queries: Sequence[str], passages: Sequence[str], ids: Sequence[str], k: int = 100
) -> list[list[str]]:
    """Returns the ids of the k best passages for each query by BM25.

    A title precedes the text of its passage. Passages that share no term with the query
    are omitted, so a ranking may be shorter. Equal scores are in `tie_order`.
    """
    order = tie_order(ids)
    retriever = Bm25Retriever([("", passages[position]) for position in order])
    results = retriever.search(queries, [""] * len(queries), k)
    return [[ids[order[position]] for position in best] for best, _ in results]
