"""Classification by mteb's protocol: how well a few labelled vectors teach the labels.

Ten times, eight training texts of every label are drawn and a logistic regression is
fitted to their vectors; the score is the mean accuracy on the test vectors. Draws and
solver are those of mteb (`AbsTaskClassification`), so the numbers are too.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

SAMPLES_PER_LABEL = 8
NUM_EXPERIMENTS = 10
SEED = 42
_MAX_STEPS = 100


def accuracy(
    train: Float[np.ndarray, "N D"],
    train_labels: Sequence[str],
    test: Float[np.ndarray, "M D"],
    test_labels: Sequence[str],
) -> float:
    """Returns the mean accuracy of the experiments.

    Raises:
        ImportError: scikit-learn is not installed.
    """
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
        classifier = linear_model.LogisticRegression(
            max_iter=_MAX_STEPS, random_state=SEED
        )
        classifier.fit(train[members], np.array(train_labels)[members])
        scores.append(np.mean(classifier.predict(test) == expected))
    return float(np.mean(scores))


def draw(labels: Sequence[str]) -> list[list[int]]:
    """Returns the training texts of each experiment, eight of every label.

    Every experiment shuffles the order that the one before left.
    """
    order = list(range(len(labels)))
    experiments = []
    for _ in range(NUM_EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)
        taken: collections.Counter[str] = collections.Counter()
        members = []
        for position in order:
            if taken[labels[position]] < SAMPLES_PER_LABEL:
                taken[labels[position]] += 1
                members.append(position)
        experiments.append(members)
    return experiments
