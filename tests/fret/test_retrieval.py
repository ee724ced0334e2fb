"""Retrieval by a checkpoint: texts are written as the task has them."""

import numpy as np

from gecko_jax.fret import retrieval


def test_passages_are_encoded_with_their_task_and_queries_with_theirs():
    asked = []

    class Gecko:
        revision = "r"

        def encode(self, texts, *, side, task, titles, description):
            asked.append((side, task, tuple(titles), tuple(texts)))
            return np.eye(len(texts), dtype=np.float32)

        def encode_queries(self, queries, tasks, *, dim):
            asked.append(tuple(tasks))
            return np.eye(dim, dtype=np.float32)[::-1][: len(queries)]

    passages = [("", "a"), ("Title", "b"), ("", "c")]
    retriever = retrieval.index(Gecko(), passages, "snli")
    found = retriever.search(["x", "y"], ["own", "snli"], 1)
    assert found == [([2], [1.0]), ([1], [1.0])]
    assert asked == [
        ("passage", "snli", ("", "Title", ""), ("a", "b", "c")),
        ("own", "snli"),
    ]
