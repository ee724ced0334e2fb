"""Hybrid search: BM25 and vectors, fused by rank."""

import numpy as np
import pytest

from gecko_jax.inference import hybrid, vector_index

IDS = ["heron", "role", "import"]
TEXTS = [
    "Herons wade in shallow water.",
    "A role needs the SELECT privilege.",
    "Modules are found on import.",
]


def _index(texts=TEXTS):
    return vector_index.Index(np.eye(3, dtype=np.float32), IDS, texts=texts)


def test_fusion_sums_reciprocal_ranks():
    fused = dict(hybrid.fuse([7, 8, 9], [9, 7]))
    assert fused == {
        7: pytest.approx(1 / 61 + 1 / 62),
        9: pytest.approx(1 / 63 + 1 / 61),
        8: pytest.approx(1 / 62),
    }
    assert [passage for passage, _ in hybrid.fuse([7, 8, 9], [9, 7])] == [7, 9, 8]


def test_a_passage_that_both_sides_find_is_first():
    # The vectors prefer "import", then "role"; the words find only "role".
    vectors = np.array([[0.0, 0.6, 0.8]], np.float32)
    scores, ids = hybrid.HybridIndex(_index()).search(["SELECT privilege"], vectors, 2)
    assert ids == [["role", "import"]]
    assert scores[0] == [pytest.approx(1 / 62 + 1 / 61), pytest.approx(1 / 61)]


def test_without_a_common_word_the_vectors_decide():
    vectors = np.array([[0.1, 0.2, 0.9]], np.float32)
    _, ids = hybrid.HybridIndex(_index()).search(["zebra"], vectors, 3)
    assert ids == [["import", "role", "heron"]]


def test_an_index_without_texts_is_refused():
    with pytest.raises(ValueError, match="the index has no texts"):
        hybrid.HybridIndex(_index(None))
