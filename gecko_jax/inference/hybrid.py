"""Hybrid search: the rankings of BM25 and of the vectors, fused by their ranks.

BM25 finds names and rare words, vectors find meaning. Reciprocal rank fusion (RRF,
Cormack et al. 2009) needs no common scale of their scores: a passage at rank r of a
ranking gets 1 / (60 + r), and the sum over both rankings orders the passages.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from gecko_jax.inference import ranking, vector_index

Passage = TypeVar("Passage", int, str)

# The constant of Cormack et al. (2009).
RRF_K = 60
# Ranks of each side that are fused. A passage below both cannot be a good answer.
_DEPTH = 100


class HybridIndex:
    """An index of vectors together with BM25 over its texts."""

    def __init__(self, index: vector_index.Index):
        """Builds BM25 over the texts of an index; raises ValueError if it has none."""
        if index.texts is None:
            raise ValueError(
                "the index has no texts, which BM25 needs; build it again while the "
                "embedded file is at its place"
            )
        self._index = index
        titles = index.titles or [""] * len(index)
        self._bm25 = ranking.Bm25Retriever(list(zip(titles, index.texts, strict=True)))

    def search(
        self, queries: Sequence[str], vectors: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[list[list[float]], list[list[str]]]:
        """Returns fused scores and ids of the k best passages per query, best first.

        BM25 reads the queries as they are; `vectors` are their embeddings.
        """
        depth = max(k, _DEPTH)
        _, by_vectors = self._index.search_positions(vectors, depth)
        by_words = self._bm25.search(queries, [""] * len(queries), depth)
        scores, ids = [], []
        for row, (words, _) in zip(by_vectors.tolist(), by_words, strict=True):
            fused = fuse(row, words)[:k]
            scores.append([score for _, score in fused])
            ids.append([self._index.ids[position] for position, _ in fused])
        return scores, ids


def fuse(*rankings: Sequence[Passage]) -> list[tuple[Passage, float]]:
    """Returns (passage, score) by reciprocal rank fusion, best first.

    Ties keep the order of the first ranking that has the passage.
    """
    scores: dict[Passage, float] = {}
    for passages in rankings:
        for rank, passage in enumerate(passages, start=1):
            scores[passage] = scores.get(passage, 0.0) + 1.0 / (RRF_K + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
