"""Reciprocal rank fusion of the two rankings of the candidates (section 3.2).

    R(q, p) = 1 / r_QL(q, p) + 1 / r_RC(q, p)          ranks from 1

The positive is the candidate with the highest R, the hard negative the lowest.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the fusion, and of the choice of positive and negative.

    Attributes:
        k: Constant added to each rank; 0 in the paper.
        likelihood_weight: Weight of 1 / r_QL; 0 leaves it out.
        relevance_weight: Weight of 1 / r_RC; 0 leaves it out.
        relevance: "log_prob" of the best label, or "log_odds" of the upper half of the
            grades against the lower.
        positive: "relabelled", or "seed" for the seed passage.
        negative: "lowest", "sampled" from the rest, or "none".
        min_information: Least log p(q|positive) - log p(q|generic passage), in nats;
            used if a generic passage is scored.
    """

    k: float
    likelihood_weight: float
    relevance_weight: float
    relevance: str
    positive: str
    negative: str
    min_information: float


def ranks(scores: Sequence[float]) -> Int[np.ndarray, " N"]:
    """Returns ranks from 1; of equal scores, the earlier candidate ranks first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(1, len(order) + 1)
    return result


def relevance_score(
    log_probs: Sequence[float], grades: Sequence[int], kind: str
) -> float:
    """Returns one score from the log-probabilities of the labels; see `Settings`."""
    if kind == "log_prob":
        return log_probs[int(np.argmax(grades))]
    middle = (max(grades) + min(grades)) / 2
    upper = [p for p, grade in zip(log_probs, grades, strict=True) if grade > middle]
    lower = [p for p, grade in zip(log_probs, grades, strict=True) if grade <= middle]
    return _log_sum_exp(upper) - _log_sum_exp(lower)


def _log_sum_exp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))


def fuse(
    likelihood_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    relevance_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    settings: Settings,
) -> Float[np.ndarray, " N"]:
    """Returns R of every candidate; None leaves a judgement out."""
    parts = [
        weight / (settings.k + np.asarray(judged, np.float64))
        for judged, weight in (
            (likelihood_ranks, settings.likelihood_weight),
            (relevance_ranks, settings.relevance_weight),
        )
        if judged is not None and weight
    ]
    if not parts:
        raise ValueError("fuse: both weights are 0; give one of them a weight above 0")
    return np.sum(parts, axis=0)


def choose(
    fused: Float[np.ndarray, " N"],
    seed_position: int,
    settings: Settings,
    rng: np.random.Generator,
) -> tuple[int, int | None]:
    """Returns the positions of the positive and of the hard negative.

    `fused` is in the order of retrieval: of equal candidates, the earlier one is the
    positive and the later the negative. `rng` draws a sampled negative.
    """
    positive = seed_position
    if settings.positive == "relabelled":
        positive = int(np.argmax(fused))
    rest = [position for position in range(len(fused)) if position != positive]
    if settings.negative == "none" or not rest:
        return positive, None
    if settings.negative == "sampled":
        return positive, int(rng.choice(rest))
    return positive, min(rest, key=lambda position: (fused[position], -position))
