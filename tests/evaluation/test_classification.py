import collections
import sys

import numpy as np
import pytest

from gecko_jax.evaluation import classification

LABELS = ["a"] * 20 + ["b"] * 5 + ["c"] * 12


def test_each_experiment_draws_eight_of_every_label():
    drawn = classification.draw(LABELS)
    assert len(drawn) == 10
    for members in drawn:
        assert len(set(members)) == len(members)
        counts = collections.Counter(LABELS[m] for m in members)
        assert counts == {"a": 8, "b": 5, "c": 8}
    assert len({tuple(sorted(members)) for members in drawn}) == 10
    assert classification.draw(LABELS) == drawn


def test_accuracy_is_high_for_separable_classes_and_low_for_noise():
    rng = np.random.default_rng(0)
    corners = {label: rng.standard_normal(8) for label in set(LABELS)}
    vectors = np.stack([corners[label] for label in LABELS]).astype(np.float32)
    vectors += 0.01 * rng.standard_normal(vectors.shape).astype(np.float32)
    assert classification.accuracy(vectors, LABELS, vectors, LABELS) == 1.0
    noise = rng.standard_normal(vectors.shape).astype(np.float32)
    assert classification.accuracy(noise, LABELS, noise[::-1], LABELS) < 0.7


def test_the_error_for_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    vectors = np.ones((len(LABELS), 2), np.float32)
    with pytest.raises(ImportError, match=r"gecko-jax\[eval\]"):
        classification.accuracy(vectors, LABELS, vectors, LABELS)
