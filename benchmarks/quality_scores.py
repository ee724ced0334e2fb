"""Scores of the systems of `quality.py`, by task and dims."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import quality_data

from gecko_jax.inference import ranking


def score(data: quality_data.Data, rank: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Returns nDCG@10 by split, task and dims.

    Args:
        data: The evaluation folders.
        rank: (set, task) -> dims -> a ranking for each query.
    """
    from gecko_jax.evaluation import judgements, sets

    found: dict[str, dict[str, dict[str, float]]] = {}
    for split, folders in data.evals.items():
        for task, folder in folders.items():
            (one,) = (s for s in sets.load(folder) if isinstance(s, sets.RetrievalSet))
            found.setdefault(split, {})[task] = {
                dim: float(
                    np.mean(
                        [
                            ranking.ndcg_at_k(best, one.relevance[query])
                            for query, best in zip(
                                one.query_ids,
                                judgements.leave_out_own(one, ranked),
                                strict=True,
                            )
                        ]
                    )
                )
                for dim, ranked in rank(one, task).items()
            }
    return found


def tasks_of(found: Any, folder: str) -> list[str]:
    """Returns the task of each query: its own or, if it has none, the folder's name."""
    return [task or folder for task in found.tasks]


def passages(found: Any) -> list[str]:
    """Returns the passages with their titles in front."""
    both = zip(found.titles, found.texts, strict=True)
    return [f"{title} {text}".strip() for title, text in both]


def by_dim(
    found: Any, queries: np.ndarray, corpus: np.ndarray, dims: Sequence[int]
) -> dict[str, Any]:
    """Returns the rankings at every dim, by the cosine of the prefixes."""
    from gecko_jax.inference import embedding

    return {
        str(dim): rankings(
            found, embedding.cut(queries, dim) @ embedding.cut(corpus, dim).T
        )
        for dim in dims
    }


def rankings(found: Any, similarity: np.ndarray) -> list[list[str]]:
    """Returns the best ids of each query, one more than scored for its own passage."""
    order = ranking.tie_order(found.passage_ids)
    return [
        [
            found.passage_ids[order[int(place)]]
            for place in ranking.best_positions(row[order], 11)
        ]
        for row in similarity
    ]
