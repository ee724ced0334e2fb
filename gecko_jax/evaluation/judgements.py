"""Rules for relevance judgements: own passages, and grades that can be scored.

A query's *own passage* is the passage with the id of the query. In ArguAna and Quora
the queries come from the corpus, so the own passage is the query itself, and BEIR
leaves it out of the ranking. In other sets equal ids are a coincidence, and the own
passage may be the answer. `find_own` distinguishes the two cases.
"""

import dataclasses
import fractions
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from gecko_jax.evaluation import sets
from gecko_jax.io import wording
from gecko_jax.text import text_formats

# Sets whose mteb task ignores identical ids: names of mteb and BEIR, in lower case and
# without punctuation.
_NAMES = (
    "arguana fever feverhardnegatives fiqa fiqa2018 msmarco msmarcohardnegatives quora "
    "quoraretrieval quoraretrievalhardnegatives"
)
_IGNORES_OWN = frozenset(_NAMES.split())

# Greatest grade passed to trec_eval, which allocates and scans an array of this length
# for each query: a grade of 1e9 takes 8 GB and a minute.
MOST_STEPS = 1_000_000


def check(dataset: sets.EvaluationSet) -> None:
    """Checks that the judgements of a set can rank systems.

    Logs a warning if no relevant passage of some query is in the corpus, or if every
    query has the same grade for all passages. Raises ValueError if no relevant passage
    is in the corpus, or all pairs of a similarity set have the same gold score.
    """
    name = dataset.name
    if isinstance(dataset, sets.SimilaritySet) and np.ptp(dataset.scores) == 0:
        raise ValueError(
            f"{name}: all {wording.counted(len(dataset.scores), 'pair')} have the gold "
            f"score {dataset.scores[0]:g}; add pairs with other scores"
        )
    if not isinstance(dataset, sets.RetrievalSet):
        return
    corpus = frozenset(dataset.passage_ids)
    relevant = {
        query: [p for p, grade in dataset.relevance[query].items() if grade > 0]
        for query in dataset.query_ids
    }
    lost = [query for query, ids in relevant.items() if corpus.isdisjoint(ids)]
    if not any(relevant.values()):
        raise ValueError(
            f"{name}: no query has a relevant passage; add a judgement with a "
            "grade above 0"
        )
    if len(lost) == len(relevant):
        absent = next(passage for group in relevant.values() for passage in group)
        raise ValueError(
            f"{name}: the relevant passages of all queries, such as {absent!r}, are "
            f"absent from the corpus, with ids such as {dataset.passage_ids[0]!r}; use "
            "the ids of this corpus in the judgements"
        )
    if lost:
        logging.warning(
            "%s: %d of %d queries, such as %r, score 0 because none of their relevant "
            "passages is in the corpus",
            name,
            len(lost),
            len(relevant),
            lost[0],
        )
    if all(
        len(grades) >= len(corpus) and len({grades.get(p) for p in corpus}) == 1
        for grades in (dataset.relevance[query] for query in relevant)
    ):
        logging.warning(
            "%s: every query has the same grade for all passages of the corpus, so all "
            "rankings score the same",
            name,
        )


def find_own(dataset: sets.RetrievalSet) -> frozenset[str]:
    """Returns the queries whose own passage is left out of their ranking.

    A judged passage is never left out. Any other own passage is left out if the mteb
    task of this name ignores identical ids, or if its text is the query.
    """
    rows = {passage: row for row, passage in enumerate(dataset.passage_ids)}
    ignores_own = _plain(dataset.name) in _IGNORES_OWN
    own = []
    for query, content in zip(dataset.query_ids, dataset.queries, strict=True):
        if query not in rows or query in dataset.relevance[query]:
            continue
        row = rows[query]
        title, body = dataset.titles[row], dataset.texts[row]
        same = {text_formats.clean(body), text_formats.clean(f"{title} {body}")}
        if ignores_own or text_formats.clean(content) in same:
            own.append(query)
    return frozenset(own)


def _plain(name: str) -> str:
    """Returns a name in lower case, without punctuation and version (`.v2`)."""
    return re.sub(r"\.v\d+$|[^a-z0-9]", "", name.lower())


def leave_out_own(
    dataset: sets.RetrievalSet, rankings: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Returns the rankings, one per query, without the own passages of `find_own`."""
    own = find_own(dataset)
    return [
        [passage for passage in ranked if passage != query or query not in own]
        for query, ranked in zip(dataset.query_ids, rankings, strict=True)
    ]


def for_trec(dataset: sets.RetrievalSet) -> sets.RetrievalSet:
    """Returns the set in a form for which mteb computes the scores of `judge`.

    trec_eval needs integer grades, so the grades of a query are multiplied by one
    factor, which does not change the metrics; ValueError if they then exceed
    `MOST_STEPS`. mteb's `ignore_identical_ids` leaves out every own passage, so queries
    that keep their own passage get another id.
    """
    own, used_ids = find_own(dataset), {*dataset.passage_ids, *dataset.query_ids}
    corpus = frozenset(dataset.passage_ids)
    query_ids, relevance = [], dict(dataset.relevance)
    for query in dataset.query_ids:
        name = query
        if query in corpus and query not in own:
            while name in used_ids:
                name = f"query {name}"
            used_ids.add(name)
        query_ids.append(name)
        relevance[name] = _to_integer_grades(dataset.name, query, relevance.pop(query))
    return dataclasses.replace(dataset, query_ids=tuple(query_ids), relevance=relevance)


def _to_integer_grades(
    name: str, query: str, grades: Mapping[str, int | float]
) -> dict[str, int]:
    """Returns the grades of a query as integer multiples of their common divisor."""
    if all(isinstance(g, int) and g <= MOST_STEPS for g in grades.values()):
        return {passage: int(grade) for passage, grade in grades.items()}
    # Round to twelve digits, so that 0.1 + 0.2 is 3/10.
    exact = {p: fractions.Fraction(f"{g:.12g}") for p, g in grades.items() if g > 0}
    scale = math.lcm(*(grade.denominator for grade in exact.values()))
    steps = {passage: int(grade * scale) for passage, grade in exact.items()}
    divisor = math.gcd(*steps.values())
    reduced = {passage: number // divisor for passage, number in steps.items()}
    if max(reduced.values()) > MOST_STEPS:
        least, most = (choose(exact, key=exact.__getitem__) for choose in (min, max))
        raise ValueError(
            f"{name}: query {query!r} has the grades {grades[least]} and "
            f"{grades[most]}; trec_eval supports multiples up to {MOST_STEPS:,} of a "
            "common divisor: round the grades, or use gecko evaluate FOLDER"
        )
    return {passage: reduced.get(passage, 0) for passage in grades}
