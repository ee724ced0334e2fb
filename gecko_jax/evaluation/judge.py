"""Scores of a model, and of baselines, on evaluation sets.

Retrieval is scored by `retrieval_scores`, similarity by Spearman's correlation of the
cosines, classification by the accuracy of a logistic regression. Texts are encoded
once, and each dim is scored on its prefix of the vectors.
"""

import collections
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

from gecko_jax.evaluation import (
    classification,
    instructions,
    judgements,
    retrieval_scores,
    sets,
    tables,
)
from gecko_jax.formats import model_folder
from gecko_jax.inference import embedding, quantization, ranking
from gecko_jax.models import dual_encoder


def evaluate(
    gecko: embedding.Gecko,
    paths: Sequence[str | os.PathLike],
    *,
    dims: Sequence[int] | None = None,
    task: str | None = None,
    precisions: Sequence[str] = (quantization.FLOAT32,),
    baselines: bool = True,
    untrained: bool = False,
    hybrid: bool = False,
    beside: Mapping[str, embedding.Gecko] | None = None,
) -> tables.Results:
    """Scores a model on retrieval folders, similarity files and classification files.

    Args:
        gecko: The model.
        paths: Files and folders of sets (`sets.load_all`).
        dims: Some of the model's dims; None is all.
        task: Task of queries that name no task the model knows. None is "search
            result" for retrieval, "semantic similarity" for similarity, and
            "classification" for classification.
        precisions: Precisions of the passages (`quantization`), one table row each.
            Queries are always float32. The second sentence of a pair counts as the
            passage; classification uses float32 only.
        baselines: Adds BM25, a random bag of words and one with IDF weights.
        untrained: Adds the same architecture with fresh parameters.
        hybrid: Adds the model's rankings fused with those of BM25 (`hybrid.fuse`).
        beside: Table name -> another model, scored at `dims` or at all its dims.

    Raises:
        ValueError: A dim was not trained, or a set has an error.
    """
    others = dict(beside or {})
    if reserved := others.keys() & set(tables.SYSTEMS):
        raise ValueError(
            f"{min(reserved)!r}: the tables use this name for another system; pass the "
            "folder under another name, such as ./model"
        )
    others_dims = {
        name: sorted({other.check_dim(dim) for dim in dims or other.dims})
        for name, other in others.items()
    }
    dims = sorted({gecko.check_dim(dim) for dim in dims or gecko.dims})
    for precision in precisions:
        quantization.check_precision(precision)
    # Read all sets first, so that an error in the last one does not waste the others.
    all_sets = list(sets.load_all(paths))
    for dataset in all_sets:
        judgements.check(dataset)
    fresh = _untrained(gecko) if untrained else None
    rows: list[tables.Row] = []
    for dataset in all_sets:
        by_words = None
        if isinstance(dataset, sets.RetrievalSet) and (baselines or hybrid):
            by_words = retrieval_scores.rank_by_words(dataset)
        fused_with = by_words if hybrid else None
        rows += _judge(gecko, dataset, dims, task, tables.MODEL, precisions, fused_with)
        for name, other in others.items():
            rows += _judge(other, dataset, others_dims[name], task, name)
        if fresh:
            rows += _judge(fresh, dataset, dims, task, tables.UNTRAINED)
        if baselines and isinstance(dataset, sets.RetrievalSet):
            assert by_words is not None
            rows += retrieval_scores.score_bm25(dataset, by_words)
            for idf in (False, True):
                rows += retrieval_scores.score_bag_of_words(
                    gecko.vocabulary, dataset, dim=dims[-1], idf=idf
                )
    about = _describe(gecko, dims, task, all_sets)
    about["beside"] = {name: other.revision for name, other in others.items()}
    return tables.Results(tuple(rows), about)


def _judge(
    gecko: embedding.Gecko,
    dataset: sets.EvaluationSet,
    dims: Sequence[int],
    task: str | None = None,
    system: str = tables.MODEL,
    precisions: Sequence[str] = (quantization.FLOAT32,),
    by_words: Sequence[Sequence[str]] | None = None,
) -> list[tables.Row]:
    """Returns the rows of one system on one set."""
    if isinstance(dataset, sets.RetrievalSet):
        return retrieval_scores.score_model(
            gecko, dataset, dims, task, system, precisions, by_words
        )
    rows: list[tables.Row] = []
    build = functools.partial(tables.Row, dataset.name, system, task=tables.ALL)
    if isinstance(dataset, sets.SimilaritySet):
        pairs = (dataset.sentences1, dataset.sentences2)
        sides = [encode_symmetric(gecko, side, "STS", task) for side in pairs]
        for dim in dims:
            first, second = (embedding.cut(side, dim) for side in sides)
            first = first.astype(np.float64)  # Cosines of equal pairs stay equal.
            for precision in precisions:
                decoded = quantization.encode(second, precision).decode()
                cosines = np.sum(first * embedding.cut(decoded, dim), axis=1)
                metrics = {"spearman": ranking.spearman(cosines, dataset.scores)}
                count = len(dataset.scores)
                row = build(dim, count=count, metrics=metrics, precision=precision)
                rows.append(row)
        return rows
    parts = (dataset.train, dataset.test)
    sides = [encode_symmetric(gecko, p.texts, "Classification", task) for p in parts]
    labels, expected = (part.labels for part in parts)
    for dim in dims:
        train, test = (embedding.cut(side, dim) for side in sides)
        accuracy = classification.accuracy(train, labels, test, expected)
        metrics = {"accuracy": accuracy}
        rows.append(build(dim, count=len(expected), metrics=metrics))
    return rows


def encode_symmetric(
    gecko: embedding.Gecko, texts: Sequence[str], kind: str, task: str | None = None
) -> Float[np.ndarray, "N E"]:
    """Encodes texts of a task without sides, such as sentences to compare.

    They are encoded as queries, up to the length of passages. `kind` is mteb's type of
    the task, whose instruction is the default for `task`.
    """
    task, length = task or instructions.BY_TYPE[kind].task, gecko.files.passage_length
    return gecko.encode(list(texts), side="query", task=task, max_length=length)


def _untrained(gecko: embedding.Gecko) -> embedding.Gecko:
    config = gecko.files.encoder_config
    init = jax.jit(functools.partial(dual_encoder.init_params, config))
    fresh = {"params": init(jax.random.key(0)), "revision": "untrained"}
    return embedding.Gecko(dataclasses.replace(gecko.files, **fresh))


def _describe(
    gecko: embedding.Gecko,
    dims: Sequence[int],
    task: str | None,
    all_sets: Sequence[sets.EvaluationSet],
) -> dict[str, Any]:
    model_files = gecko.files
    retrieval = [d for d in all_sets if isinstance(d, sets.RetrievalSet)]
    own = {dataset.name: len(judgements.find_own(dataset)) for dataset in retrieval}
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
        "num_passages": {dataset.name: len(dataset.texts) for dataset in retrieval},
        "num_own_left_out": {name: number for name, number in own.items() if number},
    }


def build_callback(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Callable[[Any, int], dict[str, float]] | None:
    """Returns the evaluation function for training, None if the config has no folder.

    The function reads the model files of the workdir, which training writes before its
    first call. With `evaluation.max_queries`, the corpus is limited to ten times as
    many passages (`RetrievalSet.limit`).
    """
    if not config.evaluation.folder:
        return None
    max_queries = config.evaluation.max_queries
    # Read the sets now: a missing or broken set must stop the run at its start.
    loaded = sets.load(config.evaluation.folder)
    all_sets = [dataset.limit(max_queries, 10 * max_queries) for dataset in loaded]
    for dataset in all_sets:
        judgements.check(dataset)

    def evaluate_now(params: Any, step: int) -> dict[str, float]:
        files = model_folder.load_settings(pathlib.Path(workdir))
        gecko = embedding.Gecko(dataclasses.replace(files, params=params, step=step))
        # Means over the sets: {"ndcg_at_10/256": ..., "spearman/256": ...}.
        values: dict[str, list[float]] = collections.defaultdict(list)
        for dataset in all_sets:
            for row in _judge(gecko, dataset, gecko.dims):
                if row.task == tables.ALL:
                    for name, value in row.metrics.items():
                        values[f"{name}/{row.dim}"].append(value)
        return {name: float(np.mean(scores)) for name, scores in values.items()}

    return evaluate_now
