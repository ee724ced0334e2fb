"""Reciprocal rank fusion of the two rankings of the candidates (section 3.2).

    R(q, p) = 1 / r_QL(q, p) + 1 / r_RC(q, p)          ranks from 1

The positive is the candidate with the highest R, the hard negative the lowest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys `fuse` of `configs/fret.py`, which `settings.KEYS` describes.

    `relevance` "log_odds" is of the upper half of the grades against the lower.
    """

    k: float
    likelihood_weight: float
    relevance_weight: float
    relevance: str
    positive: str
    negative: str
    min_information: float
    margin: float = 0.0
    near: str = "drop"
    num_negatives: int = 1
    max_negative_share: float = 0.0


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
    return float(np.logaddexp.reduce(upper) - np.logaddexp.reduce(lower))


def fuse(
    likelihood_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    relevance_ranks: Sequence[int] | Int[np.ndarray, " N"] | None,
    settings: Settings,
) -> Float[np.ndarray, " N"]:
    """Returns R of every candidate; None leaves a judgement out."""
    judgements = (
        (likelihood_ranks, settings.likelihood_weight),
        (relevance_ranks, settings.relevance_weight),
    )
    parts = [
        weight / (settings.k + np.asarray(ranked, np.float64))
        for ranked, weight in judgements
        if ranked is not None and weight
    ]
    if not parts:
        raise ValueError("fuse: both weights are 0; give one of them a weight above 0")
    return np.sum(parts, axis=0)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Positions of the chosen candidates."""

    positive: int
    others: list[int]  # further positives, best first
    negatives: list[int]  # hard negatives, the first choice first
    false_negatives: list[int]  # negatives of the line above its own positive


def choose(
    fused: Float[np.ndarray, " N"],
    seed_position: int,  # of the seed passage, or of the line's positive
    settings: Settings,
    rng: np.random.Generator,  # draws sampled negatives
    *,
    answers: Sequence[int] = (),  # positions that are never negatives
    given: Sequence[int] = (),  # positions of the negatives of the line
    similarities: Sequence[float | None] = (),  # to the query, by the retriever
) -> Choice:
    """Chooses the positive and the hard negatives among the candidates.

    `fused` is in the order of retrieval: of equal candidates, the earlier one is the
    positive and the later the negative. A candidate that is judged above the positive,
    or nearly as high (`Settings.margin`), is never a negative. A candidate without a
    similarity passes `max_negative_share`; a positive without one leaves no negative.
    """
    positive = seed_position
    if settings.positive == "relabelled":
        positive = int(np.argmax(fused))
    false_negatives = [p for p in given if fused[p] > fused[seed_position]]
    limit = (1 - settings.margin) * fused[positive]
    best_first = np.argsort(-fused, kind="stable").tolist()
    near = [p for p in best_first if fused[p] > limit and p != positive]
    others = near if settings.near == "positive" else []
    eligible = given if settings.negative == "given" else range(len(fused))
    excluded = {positive, *near, *false_negatives, *answers}
    eligible = [p for p in eligible if p not in excluded]
    if share := settings.max_negative_share:
        eligible = [p for p in eligible if _is_below(similarities, p, positive, share)]
    negatives: list[int] = []
    if settings.negative == "none":
        eligible = []
    for _ in range(min(settings.num_negatives, len(eligible))):
        if settings.negative == "sampled":
            negatives.append(int(rng.choice(eligible)))
        else:
            negatives.append(min(eligible, key=lambda p: (fused[p], -p)))
        eligible.remove(negatives[-1])
    return Choice(positive, others, negatives, false_negatives)


def _is_below(
    similarities: Sequence[float | None], place: int, positive: int, share: float
) -> bool:
    """Whether a candidate is less similar to the query than the limit allows."""
    own, highest = similarities[place], similarities[positive]
    if highest is None:
        return False
    # A share of a negative similarity would be a limit above it.
    limit = highest - (1 - share) * abs(highest)
    return own is None or own < limit
