"""Retrieval of the candidates with a Gecko checkpoint.

BM25 serves the first round (`ranking.Bm25Retriever`); `gecko fret bootstrap` trains the
paper's initial retriever. With a checkpoint, the passages are embedded shard by shard:

    embed/shard-00000.npy       float32, one row per passage
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gecko_jax.io import npy, writing

_REMEDY = "remove it, and the same command makes it again"


class GeckoRetriever:
    """Exact search over embeddings of the passages with an `embedding.Gecko`."""

    def __init__(self, gecko: Any, vectors: Float[np.ndarray, "P D"]):
        from gecko_jax.inference import vector_index

        self._gecko = gecko
        self._vectors = vectors
        numbers = [str(number) for number in range(len(vectors))]
        self._index = vector_index.Index(vectors, numbers, revision=gecko.revision)

    def search(
        self, queries: Sequence[str], tasks: Sequence[str], k: int
    ) -> list[tuple[list[int], list[float]]]:
        """See `ranking.Retriever.search`."""
        if not queries:
            return []
        encoded = self._gecko.encode_queries(queries, tasks, dim=self._index.dim)
        scores, positions = self._index.search_positions(encoded, k)
        return list(zip(positions.tolist(), scores.tolist(), strict=True))

    def similarities(
        self, query: str, task: str, numbers: Sequence[int]
    ) -> list[float]:
        """Returns the cosine of a query and each of these passages."""
        encoded = self._gecko.encode_queries([query], [task], dim=self._index.dim)
        return (self._vectors[list(numbers)] @ encoded[0]).tolist()


def index(gecko: Any, passages: Sequence[tuple[str, str]], task: str) -> GeckoRetriever:
    """Returns the retriever of a task's passages, which are (title, text) pairs."""
    titles, texts = zip(*passages, strict=True)
    shown = f"Encoding passages of {task}"
    vectors = gecko.encode(
        texts, side="passage", task=task, titles=titles, description=shown
    )
    return GeckoRetriever(gecko, vectors)


def write_vectors(
    path: pathlib.Path, gecko: Any, passages: Sequence[tuple[str, str]], dim: int
) -> None:
    """Embeds the (title, text) pairs of a shard; `dim` 0 is the full width."""
    titles, texts = zip(*passages, strict=True)
    vectors = gecko.encode_passages(list(texts), list(titles), dim=dim or None)
    with writing.write_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)


def read_vectors(paths: Sequence[pathlib.Path]) -> Float[np.ndarray, "P D"]:
    """Returns the embeddings of all shards in order; raises ValueError for damage."""
    parts = []
    for path in paths:
        try:
            parts.append(npy.open_array(path, (None, None), "f4", remedy=_REMEDY))
        except OSError as error:
            raise ValueError(f"{path}: missing ({error}); {_REMEDY}") from error
    return np.concatenate(parts)
