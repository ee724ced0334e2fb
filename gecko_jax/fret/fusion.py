"""Fusion: two ways to judge the candidates become one order (section 3.2).

    R(q, p) = 1 / r_QL(q, p) + 1 / r_RC(q, p)          ranks from 1

The positive is the candidate of the highest R, the hard negative that of the lowest.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How ranks become a triple.

    Attributes:
        k: Added to each rank; the paper has none.
        likelihood_weight: Of 1 / r_QL; 0 leaves it out.
        relevance_weight: Of 1 / r_RC; 0 leaves it out.
        relevance: "log_prob" of the best label, or "log_odds" of the upper half of the
            grades against the lower.
        positive: "relabelled", or "seed" for the seed passage.
        negative: "lowest", "sampled" from the rest, or "none".
        min_information: Least log p(q|p) - log p(q|generic passage) of the positive,
            in nats; used where a generic passage was scored.
    """

    k: float
    likelihood_weight: float
    relevance_weight: float
    relevance: str
    positive: str
    negative: str
    min_information: float


def ranks(scores: Sequence[float]) -> Int[np.ndarray, " N"]:
    """Returns ranks from 1; of equal scores, the earlier candidate is first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(1, len(order) + 1)
    return result


def relevance_score(
    log_probs: Sequence[float], grades: Sequence[int], kind: str
) -> float:
    """Returns one number from the log-probabilities of the labels.

    Args:
        log_probs: One per label, in nats.
        grades: One per label; the highest is the best.
        kind: "log_prob" or "log_odds".
    """
    if kind == "log_prob":
        return log_probs[int(np.argmax(grades))]
    middle = (max(grades) + min(grades)) / 2
    upper = [p for p, grade in zip(log_probs, grades, strict=True) if grade > middle]
    lower = [p for p, grade in zip(log_probs, grades, strict=True) if grade <= middle]
    return _log_sum_exp(upper) - _log_sum_exp(lower)


def fuse(
    likelihood_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    relevance_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    settings: Settings,
) -> Float[np.ndarray, " N"]:
    """Returns R of every candidate; ranks that are None have no part."""
    parts = []
    for found, weight in (
        (likelihood_ranks, settings.likelihood_weight),
        (relevance_ranks, settings.relevance_weight),
    ):
        if found is not None and weight:
            parts.append(weight / (settings.k + np.asarray(found, np.float64)))
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

    Args:
        fused: R of every candidate, in the order of retrieval, which settles ties: of
            equal candidates the earlier is the positive, the later the negative.
        seed_position: Where the seed stands.
        settings: What to choose.
        rng: Seeded by the row; draws a sampled negative.
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


def _log_sum_exp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
