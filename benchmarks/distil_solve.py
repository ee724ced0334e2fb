"""A first table of token vectors by least squares, for `distil.py`."""

from __future__ import annotations

import typing

import numpy as np
import scipy.sparse
from distil_texts import say

if typing.TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

# A token of frequency f starts with the weight SIF / (SIF + f).
SIF = 1e-3
# Weight of the distance to the first rows: it holds for tokens of few texts.
RIDGE = 1.0
# Rounds of least squares, each with as many steps of conjugate gradients.
ROUNDS = 2
STEPS = 10
# Power of the standard deviation by which each dimension is divided.
WHITENING = 0.5
# Number of pairs from which the order of the dimensions is learned.
PAIRS = 40_000


def solve(
    tokens: Sequence[Int[np.ndarray, " L"]],
    targets: Float[np.ndarray, "N D"],
    pieces: Float[np.ndarray, "V D"],
) -> Float[np.ndarray, "V D"]:
    """Returns the table whose sums over the tokens of each text fit the targets.

    The loss compares directions, so each round of least squares divides the sums by
    their lengths in the round before.

    Args:
        tokens: Token ids of each text.
        targets: The teacher's vector of each text, projected.
        pieces: The teacher's vector of each token as a word, projected.
    """
    lengths = np.array([len(row) for row in tokens])
    counts = bags(tokens, len(pieces))
    frequencies = np.asarray(counts.sum(0)).reshape(-1)
    frequencies /= frequencies.sum()
    table = (pieces * (SIF / (SIF + frequencies))[:, None]).astype(np.float32)
    targets = targets.astype(np.float32)
    scale = 1 / np.sqrt(lengths)
    for _ in range(ROUNDS):
        scaled = scipy.sparse.diags(scale.astype(np.float32)) @ counts
        table = fit(scaled, targets, table)
        sums = counts @ table
        scale = 1 / np.maximum(np.linalg.norm(sums, axis=1), 1e-3)
        cosines = np.sum(sums * targets, axis=1) * scale
        say(f"least squares: mean cosine {np.mean(cosines):.4f}")
    return table


def turn(
    table: Float[np.ndarray, "V D"],
    targets: Float[np.ndarray, "N D"],
    queries: Sequence[Int[np.ndarray, " L"]],
    passages: Sequence[Int[np.ndarray, " L"]],
) -> Float[np.ndarray, "D D"]:
    """Returns a matrix that turns vectors so that their first dimensions say most.

    First it divides each dimension by a power of its standard deviation: the teacher's
    first dimensions tell texts apart less than their variance suggests. Then it rotates
    the vectors, to the dimensions in which queries agree most with their passages.
    """
    scales = np.std(targets.astype(np.float32), axis=0) ** -WHITENING
    step = max(1, len(queries) // PAIRS)
    sides = []
    for side in (queries, passages):
        sums = bags(side[::step], len(table)) @ (table * scales)
        sides.append(sums / np.linalg.norm(sums, axis=1, keepdims=True))
    product = sides[0].T @ sides[1]
    _, directions = np.linalg.eigh(product + product.T)
    return (scales[:, None] * directions[:, ::-1]).astype(np.float32)


def bags(tokens: Sequence[Int[np.ndarray, " L"]], size: int) -> scipy.sparse.csr_matrix:
    """Returns how often each token comes in each text."""
    ids = np.concatenate(tokens).astype(np.int32)
    starts = np.cumsum([0, *(len(row) for row in tokens)])
    ones = np.ones(len(ids), np.float32)
    return scipy.sparse.csr_matrix((ones, ids, starts), shape=(len(tokens), size))


def fit(
    texts: scipy.sparse.csr_matrix,
    targets: Float[np.ndarray, "N D"],
    table: Float[np.ndarray, "V D"],
) -> Float[np.ndarray, "V D"]:
    """Returns a table after some steps of conjugate gradients on the ridge problem.

    Each column is a problem of its own. The diagonal is the preconditioner.
    """
    turned = texts.T.tocsr()

    def normal(x):
        return turned @ (texts @ x) + RIDGE * x

    diagonal = np.asarray(texts.multiply(texts).sum(0)).reshape(-1, 1) + RIDGE
    x = table.copy()
    residual = turned @ targets + RIDGE * table - normal(x)
    direction = scaled = residual / diagonal
    product = np.sum(residual * scaled, axis=0)
    for _ in range(STEPS):
        image = normal(direction)
        step = product / np.sum(direction * image, axis=0)
        x += step * direction
        residual -= step * image
        scaled = residual / diagonal
        before, product = product, np.sum(residual * scaled, axis=0)
        direction = scaled + product / before * direction
    return x
