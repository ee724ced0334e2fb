"""Local evaluation sets as tasks for `mteb`.

A set becomes an instance of a subclass of mteb's own task of that type, so mteb's
protocol and metrics apply.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from gecko_jax.evaluation import judgements, mteb_encoder, retrieval_scores, sets
from gecko_jax.inference import embedding
from gecko_jax.io import wording

# Type of the set -> mteb's task type, its class, and its main metric.
_TYPES: Mapping[type, tuple[Any, str, str]] = {
    sets.RetrievalSet: ("Retrieval", "AbsTaskRetrieval", "ndcg_at_10"),
    sets.SimilaritySet: ("STS", "AbsTaskSTS", "cosine_spearman"),
    sets.ClassificationSet: ("Classification", "AbsTaskClassification", "accuracy"),
}
_SPLIT = "test"


def build(gecko: embedding.Gecko, dataset: sets.EvaluationSet) -> Any:
    """Returns the mteb task of an evaluation set.

    Raises ValueError if `judgements` rejects the set, or its queries have symmetric and
    other tasks: these need two formats of passages, but mteb encodes the passages once.
    """
    from mteb import abstasks
    from mteb.abstasks import task_metadata

    judgements.check(dataset)
    if isinstance(dataset, sets.RetrievalSet):
        if num_own := len(judgements.find_own(dataset)):
            logging.info(
                "%s: %s with the id of the query left out of rankings",
                dataset.name,
                wording.counted(num_own, "passage"),
            )
        dataset = judgements.for_trec(dataset)
    kind, class_name, main_score = _TYPES[type(dataset)]
    metadata = task_metadata.TaskMetadata(
        name=dataset.name,
        description=f"A local {kind} task.",
        # mteb ignores saved results of another revision of the data set.
        dataset={"path": dataset.name, "revision": _revision(dataset)},
        type=kind,
        category="t2c" if kind == "Classification" else "t2t",
        modalities=["text"],
        eval_splits=[_SPLIT],
        eval_langs=["mul-Zyyy"],
        main_score=main_score,
    )
    members: dict[str, Any] = {"metadata": metadata}
    if kind == "Retrieval":  # `judgements.for_trec` has renamed the other queries.
        members["ignore_identical_ids"] = True
    task = type(dataset.name, (getattr(abstasks, class_name),), members)()
    task.dataset = _build_dataset(gecko, dataset)
    task.data_loaded = True  # mteb neither loads nor unloads it.
    return task


def _build_dataset(gecko: embedding.Gecko, dataset: sets.EvaluationSet) -> Any:
    """Returns the set in the layout of mteb's task type."""
    import datasets

    def columns(**values: Any) -> Any:
        lists = {name: list(column) for name, column in values.items()}
        return datasets.Dataset.from_dict(lists)

    if isinstance(dataset, sets.SimilaritySet):
        sides = {"sentence1": dataset.sentences1, "sentence2": dataset.sentences2}
        return {_SPLIT: columns(**sides, score=dataset.scores)}
    if isinstance(dataset, sets.ClassificationSet):
        number = {label: n for n, label in enumerate(sorted(set(dataset.train.labels)))}
        parts: Any = {
            split: columns(text=part.texts, label=[number[n] for n in part.labels])
            for split, part in (("train", dataset.train), (_SPLIT, dataset.test))
        }
        return datasets.DatasetDict(parts)
    tasks = retrieval_scores.resolve_tasks(gecko, dataset)
    symmetric = {t for t in tasks if gecko.files.text_format.is_symmetric(t)}
    if symmetric and len(set(tasks)) > 1:
        raise ValueError(
            f"{dataset.name}: mteb cannot mix queries of the symmetric task "
            f"{min(symmetric)!r} with other tasks; make a folder of each, or score "
            "them together with gecko evaluate FOLDER"
        )
    passages: dict[str, Any] = {"title": dataset.titles, "text": dataset.texts}
    if symmetric:
        passages[mteb_encoder.TASK_COLUMN] = tasks[:1] * len(dataset.texts)
    corpus = columns(id=dataset.passage_ids, **passages)
    own = {mteb_encoder.TASK_COLUMN: tasks}
    queries = columns(id=dataset.query_ids, text=dataset.queries, **own)
    relevance = {query: dict(dataset.relevance[query]) for query in dataset.query_ids}
    parts = {"corpus": corpus, "queries": queries, "relevant_docs": relevance}
    return {"default": {_SPLIT: parts | {"top_ranked": None}}}


def _revision(dataset: sets.EvaluationSet) -> str:
    """Returns a digest of the content of a set."""
    content = json.dumps(vars(dataset), sort_keys=True, default=list).encode()
    return hashlib.sha256(content).hexdigest()[:12]
