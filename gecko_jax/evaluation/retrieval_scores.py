"""Scores of rankings on a retrieval set: the model, BM25 and a random bag of words.

The metrics are nDCG@10, recall@100 and MRR@10. Equal scores rank as in trec_eval
(`ranking.tie_order`). `judgements` decides which passages a ranking may hold.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from gecko_jax.evaluation import judgements, sets, tables
from gecko_jax.inference import embedding, hybrid, quantization, ranking, vector_index
from gecko_jax.text import vocabularies

# Cut-off of recall, the deepest of the metrics.
DEPTH = 100

_METRICS: Mapping[str, Callable[..., float]] = {
    "ndcg_at_10": functools.partial(ranking.ndcg_at_k, k=10),
    "recall_at_100": functools.partial(ranking.recall_at_k, k=DEPTH),
    "mrr_at_10": functools.partial(ranking.mrr_at_k, k=10),
}


def score_model(
    gecko: embedding.Gecko,
    dataset: sets.RetrievalSet,
    dims: Sequence[int],
    task: str | None = None,
    system: str = tables.MODEL,
    precisions: Sequence[str] = (quantization.FLOAT32,),
    by_words: Sequence[Sequence[str]] | None = None,
) -> list[tables.Row]:
    """Returns the rows of a model; see `judge.evaluate`.

    With `by_words`, the rankings of BM25, rows of the fused rankings follow.
    """
    tasks = resolve_tasks(gecko, dataset, task)
    queries = gecko.encode_queries(dataset.queries, tasks)
    # Passages of a symmetric task get the format of its queries.
    is_symmetric = gecko.files.text_format.is_symmetric
    passage_tasks = [name if is_symmetric(name) else None for name in tasks]
    kinds = [(dim, precision) for dim in dims for precision in precisions]
    rankings: dict[tuple[int, str], list[list[str]]]
    rankings = {kind: [[]] * len(tasks) for kind in kinds}
    order = ranking.tie_order(dataset.passage_ids)
    ids = [dataset.passage_ids[position] for position in order]
    suffix = "" if system == tables.MODEL else f", {system}"
    for passage_task in dict.fromkeys(passage_tasks):
        members = [q for q, name in enumerate(passage_tasks) if name == passage_task]
        passages = gecko.encode(
            dataset.texts,
            side="passage",
            task=passage_task,
            titles=dataset.titles,
            description=f"Encoding {dataset.name}{suffix}",
        )[order]
        for dim, precision in kinds:
            codes = quantization.encode(embedding.cut(passages, dim), precision)
            ranked = _rank(codes, ids, embedding.cut(queries[members], dim))
            for query, best in zip(members, ranked, strict=True):
                rankings[dim, precision][query] = best
    rows = []
    for dim, precision in kinds:
        rows += _score(dataset, system, dim, rankings[dim, precision], precision)
    if by_words is not None:
        for dim, precision in kinds:
            fused = [
                [passage for passage, _ in hybrid.fuse(best, words)]
                for best, words in zip(rankings[dim, precision], by_words, strict=True)
            ]
            rows += _score(dataset, tables.HYBRID, dim, fused, precision)
    return rows


def resolve_tasks(
    gecko: embedding.Gecko, dataset: sets.RetrievalSet, task: str | None = None
) -> list[str]:
    """Returns the task of each query.

    `task`, or "search result", replaces names that the model does not know.
    """
    known = gecko.task_descriptions
    fallback = task or embedding.DEFAULT_TASK
    return [name if name in known else fallback for name in dataset.tasks]


def _rank(
    codes: quantization.Codes, ids: Sequence[str], queries: Float[np.ndarray, "Q D"]
) -> list[list[str]]:
    """Returns the best `DEPTH` + 1 passages of each query.

    One more than is scored, because the query's own passage may be left out. The
    passages must be in `ranking.tie_order`.
    """
    k = DEPTH + 1
    first, number_of = ranking.distinct_rows(codes.values)
    if len(first) == len(ids):
        return vector_index.Index(codes, ids).search(queries, k)[1]
    # Search the distinct vectors, then replace each by the passages that have it.
    members: list[list[str]] = [[] for _ in first]
    for identity, number in zip(ids, number_of, strict=True):
        if len(members[number]) < k:
            members[number].append(identity)
    codes = dataclasses.replace(codes, values=codes.values[first])
    built = vector_index.Index(codes, [group[0] for group in members])
    ranked = []
    for scores, numbers in zip(*built.search_positions(queries, k), strict=True):
        pairs = zip(scores.tolist(), numbers, strict=True)
        hits = [(score, name) for score, number in pairs for name in members[number]]
        ranked.append([identity for _, identity in sorted(hits, reverse=True)[:k]])
    return ranked


def rank_by_words(dataset: sets.RetrievalSet) -> list[list[str]]:
    """Returns BM25's best `DEPTH` + 1 passages of each query."""
    pairs = zip(dataset.titles, dataset.texts, strict=True)
    passages = [f"{title} {text}".strip() for title, text in pairs]
    ids = dataset.passage_ids
    return ranking.bm25_rankings(dataset.queries, passages, ids, DEPTH + 1)


def score_bm25(
    dataset: sets.RetrievalSet, ranked: Sequence[Sequence[str]]
) -> list[tables.Row]:
    """Returns the rows of BM25, from the result of `rank_by_words`."""
    rows = _score(dataset, tables.BM25, None, ranked)
    if any(ranked):
        return rows
    return [dataclasses.replace(row, note=tables.NO_HIT) for row in rows]


def score_bag_of_words(
    vocab: vocabularies.Vocabulary,
    dataset: sets.RetrievalSet,
    *,
    dim: int,
    idf: bool,
    seed: int = 0,
) -> list[tables.Row]:
    """Scores a model without training: the sum of one random vector per token.

    `idf` weights each token by its inverse document frequency in the corpus.
    """
    table = np.random.default_rng(seed).standard_normal((vocab.size, dim), np.float32)
    pairs = zip(dataset.titles, dataset.texts, strict=True)
    passages = [f"{title} {text}" if title else text for title, text in pairs]
    order = ranking.tie_order(dataset.passage_ids)
    # Drop what opens and ends every text.
    opening = len(vocab.opening)
    corpus_tokens, query_tokens = (
        [np.array(ids[opening:-1], np.int64) for ids in vocab.encode(texts)]
        for texts in ([passages[position] for position in order], dataset.queries)
    )
    if idf:
        frequency = np.zeros(vocab.size)
        for tokens in corpus_tokens:
            frequency[np.unique(tokens)] += 1
        weights = np.log((len(passages) + 1) / (frequency + 1))
        table *= weights[:, None].astype(np.float32)
    corpus, queries = (
        embedding.cut(np.stack([table[tokens].sum(axis=0) for tokens in side]), dim)
        for side in (corpus_tokens, query_tokens)
    )
    codes = quantization.encode(corpus, quantization.FLOAT32)
    ranked = _rank(codes, [dataset.passage_ids[p] for p in order], queries)
    return _score(dataset, tables.IDF_BAG if idf else tables.BAG, dim, ranked)


def _score(
    dataset: sets.RetrievalSet,
    system: str,
    dim: int | None,
    rankings: Sequence[Sequence[str]],
    precision: str = quantization.FLOAT32,
) -> list[tables.Row]:
    """Returns a row for all queries and, if there are several tasks, one per task."""
    rankings = judgements.leave_out_own(dataset, rankings)
    relevance = [dataset.relevance[query] for query in dataset.query_ids]
    scores = {
        name: np.array(list(map(metric, rankings, relevance)))
        for name, metric in _METRICS.items()
    }
    tasks = np.array(dataset.tasks)
    names = sorted(set(dataset.tasks))
    groups = [(tables.ALL, np.ones(len(tasks), bool))]
    if len(names) > 1:
        groups += [(name or "no task", tasks == name) for name in names]
    rows = []
    for task, members in groups:
        means = {name: float(values[members].mean()) for name, values in scores.items()}
        count = int(members.sum())
        row = tables.Row(dataset.name, system, dim, task, count, means, precision)
        rows.append(row)
    return rows
