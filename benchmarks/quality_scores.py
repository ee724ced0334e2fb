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

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for split, folders in data.evals.items():
        for task, folder in folders.items():
            (dataset,) = (
                s for s in sets.load(folder) if isinstance(s, sets.RetrievalSet)
            )
            scores.setdefault(split, {})[task] = {
                dim: float(
                    np.mean(
                        [
                            ranking.ndcg_at_k(best, dataset.relevance[query])
                            for query, best in zip(
                                dataset.query_ids,
                                judgements.leave_out_own(dataset, ranked),
                                strict=True,
                            )
                        ]
                    )
                )
                for dim, ranked in rank(dataset, task).items()
            }
    return scores


def tasks_of(dataset: Any, folder: str) -> list[str]:
    """Returns the task of each query: its own or, if it has none, the folder's name."""
    return [task or folder for task in dataset.tasks]


def passages(dataset: Any) -> list[str]:
    """Returns the passages with their titles in front."""
    pairs = zip(dataset.titles, dataset.texts, strict=True)
    return [f"{title} {text}".strip() for title, text in pairs]


def by_dim(
    dataset: Any, queries: np.ndarray, corpus: np.ndarray, dims: Sequence[int]
) -> dict[str, Any]:
    """Returns the rankings at every dim, by the cosine of the prefixes."""
    from gecko_jax.inference import embedding

    return {
        str(dim): rankings(
            dataset, embedding.cut(queries, dim) @ embedding.cut(corpus, dim).T
        )
        for dim in dims
    }


def rankings(dataset: Any, similarity: np.ndarray) -> list[list[str]]:
    """Returns the best ids of each query, one more than scored for its own passage."""
    order = ranking.tie_order(dataset.passage_ids)
    return [
        [
            dataset.passage_ids[order[int(place)]]
            for place in ranking.best_positions(row[order], 11)
        ]
        for row in similarity
    ]
