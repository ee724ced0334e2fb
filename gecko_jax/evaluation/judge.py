"""Judging: a model's scores on evaluation sets, beside the lines to beat.

Retrieval is judged by nDCG@10, recall@100 and MRR@10, similarity by Spearman's
correlation of the cosines, classification by the accuracy of a logistic regression.
The texts are encoded once, and every dim is judged on its prefix of the vectors. Equal
scores rank as in trec_eval (`ranking.tie_order`). `judgements` decides which passages
count.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float

from gecko_jax.evaluation import classification, instructions, judgements, sets, tables
from gecko_jax.formats import model_folder
from gecko_jax.inference import embedding, quantization, ranking, vector_index
from gecko_jax.models import dual_encoder
from gecko_jax.text import vocabularies

# Judged to this rank by recall, the deepest of the metrics.
DEPTH = 100

_METRICS: Mapping[str, Callable[..., float]] = {
    "ndcg_at_10": functools.partial(ranking.ndcg_at_k, k=10),
    "recall_at_100": functools.partial(ranking.recall_at_k, k=DEPTH),
    "mrr_at_10": functools.partial(ranking.mrr_at_k, k=10),
}


def evaluate(
    gecko: embedding.Gecko,
    paths: Sequence[str | os.PathLike],
    *,
    dims: Sequence[int] | None = None,
    task: str | None = None,
    precisions: Sequence[str] = (quantization.FLOAT32,),
    baselines: bool = True,
    untrained: bool = False,
    beside: Mapping[str, embedding.Gecko] | None = None,
) -> tables.Results:
    """Judges a model on retrieval folders, similarity files and classification files.

    Args:
        gecko: The model.
        paths: See `sets.load_all`.
        dims: Some of the model's dims; None is all.
        task: Of queries that name no task the model knows; None is "search result",
            "semantic similarity" for similarity, "classification" for classification.
        precisions: How passages are stored (`quantization`); a row each. Queries are
            float32 always; of a pair the second sentence counts as the passage, and
            classes are told by float32 vectors alone.
        baselines: Adds BM25, a random bag of words and one with IDF weights.
        untrained: Adds the same architecture with fresh parameters.
        beside: Other models by the name they have in the tables, judged at `dims` or
            at all of their own.

    Raises:
        ValueError: A dim is not trained, or a set has a fault (named).
    """
    others = dict(beside or {})
    if taken := others.keys() & set(tables.SYSTEMS):
        raise ValueError(
            f"{min(taken)!r}: the tables have another system of this name; name the "
            "folder otherwise, such as ./model"
        )
    others_dims = {
        name: sorted({other.check_dim(dim) for dim in dims or other.dims})
        for name, other in others.items()
    }
    dims = sorted({gecko.check_dim(dim) for dim in dims or gecko.dims})
    for precision in precisions:
        quantization.check_precision(precision)
    # All is read first, so that a fault in the last set does not waste the others.
    all_sets = list(sets.load_all(paths))
    for found in all_sets:
        judgements.check(found)
    fresh = _untrained(gecko) if untrained else None
    rows: list[tables.Row] = []
    for found in all_sets:
        rows += _judge(gecko, found, dims, task, tables.MODEL, found.name, precisions)
        for name, other in others.items():
            rows += _judge(
                other, found, others_dims[name], task, name, f"{found.name}, {name}"
            )
        if fresh:
            rows += _judge(
                fresh, found, dims, task, tables.UNTRAINED, f"{found.name}, untrained"
            )
        if baselines and isinstance(found, sets.RetrievalSet):
            rows += _judge_bm25(found)
            for idf in (False, True):
                rows += bag_of_words_baseline(
                    gecko.vocabulary, found, dim=dims[-1], idf=idf
                )
    about = _describe(gecko, dims, task, all_sets)
    about["beside"] = {name: other.revision for name, other in others.items()}
    return tables.Results(tuple(rows), about)


def _judge(
    gecko: embedding.Gecko,
    found: sets.EvaluationSet,
    dims: Sequence[int],
    task: str | None,
    system: str,
    description: str,
    precisions: Sequence[str] = (quantization.FLOAT32,),
) -> list[tables.Row]:
    kinds = [(dim, precision) for dim in dims for precision in precisions]
    if isinstance(found, sets.SimilaritySet):
        first, second = (
            encode_symmetric(gecko, side, "STS", task)
            for side in (found.sentences1, found.sentences2)
        )
        return [
            _judge_similarity(found, system, first, second, *kind) for kind in kinds
        ]
    if isinstance(found, sets.ClassificationSet):
        train, test = (
            encode_symmetric(gecko, part.texts, "Classification", task)
            for part in (found.train, found.test)
        )
        return [_judge_classes(found, system, train, test, dim) for dim in dims]
    tasks = np.array(resolve_tasks(gecko, found, task))
    queries = np.empty((len(tasks), gecko.dims[-1]), np.float32)
    # The passages of a symmetric task are written with that task.
    searches: dict[str | None, list[int]] = {}
    for name in np.unique(tasks).tolist():
        members = np.flatnonzero(tasks == name)
        queries[members] = gecko.encode_queries(
            [found.queries[q] for q in members], name
        )
        symmetric = gecko.files.text_format.is_symmetric(name)
        searches.setdefault(name if symmetric else None, []).extend(members.tolist())
    rankings: dict[tuple[int, str], list[list[str]]] = {
        kind: [[]] * len(tasks) for kind in kinds
    }
    order = ranking.tie_order(found.passage_ids)
    ids = [found.passage_ids[place] for place in order]
    for passage_task, members in searches.items():
        passages = gecko.encode(
            found.texts,
            side="passage",
            task=passage_task,
            titles=found.titles,
            description=f"Encoding {description}",
        )[order]
        for dim, precision in kinds:
            codes = quantization.encode(embedding.cut(passages, dim), precision)
            ranked = _rank(codes, ids, embedding.cut(queries[members], dim))
            for query, best in zip(members, ranked, strict=True):
                rankings[dim, precision][query] = best
    return [
        row
        for dim, precision in kinds
        for row in _score(found, system, dim, rankings[dim, precision], precision)
    ]


def _rank(
    codes: quantization.Codes,
    ids: Sequence[str],
    queries: Float[np.ndarray, "Q D"],
) -> list[list[str]]:
    """Returns the best passages of each query, one more than is judged.

    Args:
        codes: The vectors of the passages, in `ranking.tie_order`.
        ids: Of the passages, in the same order.
        queries: Vectors of the same width.
    """
    k = DEPTH + 1
    first, number_of = ranking.distinct_rows(codes.values)
    if len(first) == len(ids):
        return vector_index.Index(codes, ids).search(queries, k)[1]
    members: list[list[str]] = [[] for _ in first]
    for identity, number in zip(ids, number_of, strict=True):
        if len(members[number]) < k:
            members[number].append(identity)
    codes = dataclasses.replace(codes, values=codes.values[first])
    built = vector_index.Index(codes, [group[0] for group in members])
    ranked = []
    for scores, numbers in zip(*built.search_positions(queries, k), strict=True):
        hits = [
            (score, identity)
            for score, number in zip(scores.tolist(), numbers, strict=True)
            for identity in members[number]
        ]
        ranked.append([identity for _, identity in sorted(hits, reverse=True)[:k]])
    return ranked


def resolve_tasks(
    gecko: embedding.Gecko, found: sets.RetrievalSet, task: str | None = None
) -> list[str]:
    """Returns the task each query is written with.

    Args:
        gecko: Knows the names of its tasks.
        found: The set; its queries may name tasks.
        task: Of queries that name no task the model knows; None is "search result".
    """
    known = gecko.task_descriptions
    fallback = task or embedding.DEFAULT_TASK
    return [name if name in known else fallback for name in found.tasks]


def encode_symmetric(
    gecko: embedding.Gecko, texts: Sequence[str], kind: str, task: str | None = None
) -> Float[np.ndarray, "N E"]:
    """Embeds texts that all stand on one side, such as sentences to compare.

    Args:
        gecko: The model.
        texts: They are written as queries, and may be as long as passages.
        kind: mteb's type of the task; says the task when there is none.
        task: Name or description of the task.
    """
    return gecko.encode(
        list(texts),
        side="query",
        task=task or instructions.BY_TYPE[kind].task,
        max_length=gecko.files.passage_length,
    )


def _judge_similarity(
    found: sets.SimilaritySet,
    system: str,
    first: Float[np.ndarray, "N D"],
    second: Float[np.ndarray, "N D"],
    dim: int,
    precision: str,
) -> tables.Row:
    codes = quantization.encode(embedding.cut(second, dim), precision)
    second = codes.decode()
    # In float64, so that pairs of equal texts are equal: only the order counts.
    sides = [embedding.cut(side, dim).astype(np.float64) for side in (first, second)]
    cosines = np.sum(sides[0] * sides[1], axis=1)
    correlation = ranking.spearman(cosines, found.scores)
    metrics = {"spearman": correlation}
    return tables.Row(
        found.name, system, dim, tables.ALL, len(cosines), metrics, precision
    )


def _judge_classes(
    found: sets.ClassificationSet,
    system: str,
    train: Float[np.ndarray, "N D"],
    test: Float[np.ndarray, "M D"],
    dim: int,
) -> tables.Row:
    accuracy = classification.accuracy(
        embedding.cut(train, dim),
        found.train.labels,
        embedding.cut(test, dim),
        found.test.labels,
    )
    count = len(found.test.labels)
    return tables.Row(
        found.name, system, dim, tables.ALL, count, {"accuracy": accuracy}
    )


def _judge_bm25(found: sets.RetrievalSet) -> list[tables.Row]:
    passages = [
        f"{title} {text}".strip()
        for title, text in zip(found.titles, found.texts, strict=True)
    ]
    ranked = ranking.bm25_rankings(
        found.queries, passages, found.passage_ids, DEPTH + 1
    )
    rows = _score(found, tables.BM25, None, ranked)
    if any(ranked):
        return rows
    return [dataclasses.replace(row, note=tables.NO_HIT) for row in rows]


def bag_of_words_baseline(
    vocab: vocabularies.Vocabulary,
    found: sets.RetrievalSet,
    *,
    dim: int,
    idf: bool,
    seed: int = 0,
) -> list[tables.Row]:
    """Judges a model that learned nothing: one random vector per token, summed.

    Args:
        vocab: Cuts the texts into tokens.
        found: The set.
        dim: Entries of the vectors.
        idf: Weighs each token by its inverse document frequency in the corpus.
        seed: Of the random vectors.
    """
    table = np.random.default_rng(seed).standard_normal((vocab.size, dim), np.float32)
    passages = [
        f"{title} {text}" if title else text
        for title, text in zip(found.titles, found.texts, strict=True)
    ]
    order = ranking.tie_order(found.passage_ids)
    passages = [passages[place] for place in order]
    corpus_tokens = [np.array(ids[:-1], np.int64) for ids in vocab.encode(passages)]
    query_tokens = [np.array(ids[:-1], np.int64) for ids in vocab.encode(found.queries)]
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
    ranked = _rank(
        quantization.encode(corpus, quantization.FLOAT32),
        [found.passage_ids[place] for place in order],
        queries,
    )
    return _score(found, tables.IDF_BAG if idf else tables.BAG, dim, ranked)


def _score(
    found: sets.RetrievalSet,
    system: str,
    dim: int | None,
    rankings: Sequence[Sequence[str]],
    precision: str = quantization.FLOAT32,
) -> list[tables.Row]:
    """Returns a row for all queries, and one per task where there are several."""
    scores = np.empty((len(_METRICS), len(rankings)))
    rankings = judgements.leave_out_own(found, rankings)
    for q, (query, ranked) in enumerate(zip(found.query_ids, rankings, strict=True)):
        for m, metric in enumerate(_METRICS.values()):
            scores[m, q] = metric(ranked, found.relevance[query])
    tasks = np.array(found.tasks)
    names = sorted(set(found.tasks))
    groups = [(tables.ALL, np.ones(len(tasks), bool))]
    if len(names) > 1:
        groups += [(name or "no task", tasks == name) for name in names]
    return [
        tables.Row(
            set=found.name,
            system=system,
            dim=dim,
            task=name,
            count=int(members.sum()),
            metrics={
                metric: float(scores[m, members].mean())
                for m, metric in enumerate(_METRICS)
            },
            precision=precision,
        )
        for name, members in groups
    ]


def _untrained(gecko: embedding.Gecko) -> embedding.Gecko:
    config = gecko.files.encoder_config
    init = jax.jit(functools.partial(dual_encoder.init_params, config))
    return embedding.Gecko(
        dataclasses.replace(
            gecko.files, params=init(jax.random.key(0)), revision="untrained"
        )
    )


def _describe(
    gecko: embedding.Gecko,
    dims: Sequence[int],
    task: str | None,
    all_sets: Sequence[sets.EvaluationSet],
) -> dict[str, Any]:
    model_files = gecko.files
    retrieval = [one for one in all_sets if isinstance(one, sets.RetrievalSet)]
    own = {one.name: len(judgements.find_own(one)) for one in retrieval}
    return {
        "revision": gecko.revision,
        "step": model_files.step,
        "dims": list(dims),
        "task": task,
        "dtype": model_files.encoder_config.dtype,
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
        "text_format": model_files.text_format.to_dict(),
        "backend": jax.default_backend(),
        "versions": model_folder.versions(),
        "num_passages": {one.name: len(one.texts) for one in retrieval},
        "num_own_left_out": {name: number for name, number in own.items() if number},
    }


def build_callback(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Callable[[Any, int], dict[str, float]] | None:
    """Returns the evaluation that `train.train` calls, or None if config has none.

    It reads the workdir's model files at its first call, when training has written
    them. With `evaluation.max_queries`, the corpus is cut to ten times as many
    passages (`RetrievalSet.limit`).
    """
    if not config.evaluation.folder:
        return None
    max_queries = config.evaluation.max_queries
    # A missing or broken set should stop a run at its start.
    all_sets = [
        found.limit(max_queries, 10 * max_queries)
        for found in sets.load(config.evaluation.folder)
    ]
    for found in all_sets:
        judgements.check(found)

    def evaluate_now(params: Any, step: int) -> dict[str, float]:
        model_files = model_folder.load_settings(pathlib.Path(workdir))
        gecko = embedding.Gecko(
            dataclasses.replace(model_files, params=params, step=step)
        )
        return judge_quickly(gecko, all_sets)

    return evaluate_now


def judge_quickly(
    gecko: embedding.Gecko, all_sets: Sequence[sets.EvaluationSet]
) -> dict[str, float]:
    """Returns {"ndcg_at_10/256": ..., "spearman/256": ...}, means over the sets."""
    values: dict[str, list[float]] = {}
    for found in all_sets:
        rows = _judge(gecko, found, gecko.dims, None, tables.MODEL, found.name)
        for row in rows:
            if row.task == tables.ALL:
                for name, value in row.metrics.items():
                    values.setdefault(f"{name}/{row.dim}", []).append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}
