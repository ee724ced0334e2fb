"""Classification by mteb's protocol: logistic regression on a few labelled vectors.

Each of ten experiments draws eight training texts of every label, fits a logistic
regression to their vectors and measures the accuracy on the test vectors. The score is
the mean. Draws and solver equal those of mteb (`AbsTaskClassification`).
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

SAMPLES_PER_LABEL = 8
NUM_EXPERIMENTS = 10
SEED = 42


def accuracy(
    train: Float[np.ndarray, "N D"],
    train_labels: Sequence[str],
    test: Float[np.ndarray, "M D"],
    test_labels: Sequence[str],
) -> float:
    """Returns the mean accuracy, in [0, 1]."""
    try:
        from sklearn import linear_model
    except ImportError:
        raise ImportError(
            "classification needs scikit-learn; install it with "
            'pip install "gecko-jax[eval]"'
        ) from None
    expected = np.array(test_labels)
    scores = []
    for members in draw(train_labels):
        classifier = linear_model.LogisticRegression(max_iter=100, random_state=SEED)
        classifier.fit(train[members], np.array(train_labels)[members])
        scores.append(np.mean(classifier.predict(test) == expected))
    return float(np.mean(scores))


def draw(labels: Sequence[str]) -> list[list[int]]:
    """Returns the positions of the training texts of each experiment.

    Each experiment shuffles the order that the previous one left.
    """
    order = list(range(len(labels)))
    experiments = []
    for _ in range(NUM_EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)
        counts: collections.Counter[str] = collections.Counter()
        members = []
        for position in order:
            if counts[labels[position]] < SAMPLES_PER_LABEL:
                counts[labels[position]] += 1
                members.append(position)
        experiments.append(members)
    return experiments
