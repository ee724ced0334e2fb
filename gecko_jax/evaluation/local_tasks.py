"""Local evaluation sets as tasks for `mteb`.

A set becomes an instance of a subclass of mteb's own task of that type, so mteb's
protocol and metrics apply, and its JSON results are stored next to those of other
tasks.
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


def build(gecko: embedding.Gecko, found: sets.EvaluationSet) -> Any:
    """Returns the mteb task of an evaluation set.

    Raises:
        ValueError: The queries of the set have symmetric and other tasks, which need
            two formats of passages, but mteb encodes the passages once. Or `judgements`
            rejects the set.
    """
    from mteb import abstasks
    from mteb.abstasks import task_metadata

    judgements.check(found)
    if isinstance(found, sets.RetrievalSet):
        if num_own := len(judgements.find_own(found)):
            logging.info(
                "%s: %s with the id of the query left out of rankings",
                found.name,
                wording.counted(num_own, "passage"),
            )
        found = judgements.for_trec(found)
    kind, class_name, main_score = _TYPES[type(found)]
    metadata = task_metadata.TaskMetadata(
        name=found.name,
        description=f"A local {kind} task.",
        # mteb ignores saved results of another revision of the data set.
        dataset={"path": found.name, "revision": _revision(found)},
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
    task = type(found.name, (getattr(abstasks, class_name),), members)()
    task.dataset = _build_dataset(gecko, found)
    task.data_loaded = True  # mteb neither loads nor unloads it.
    return task


def _build_dataset(gecko: embedding.Gecko, found: sets.EvaluationSet) -> Any:
    """Returns the set in the layout of mteb's task type."""
    import datasets

    def columns(**values: Any) -> Any:
        lists = {name: list(column) for name, column in values.items()}
        return datasets.Dataset.from_dict(lists)

    if isinstance(found, sets.SimilaritySet):
        return {
            _SPLIT: columns(
                sentence1=found.sentences1,
                sentence2=found.sentences2,
                score=found.scores,
            )
        }
    if isinstance(found, sets.ClassificationSet):
        number = {label: n for n, label in enumerate(sorted(set(found.train.labels)))}
        parts = {"train": found.train, _SPLIT: found.test}
        return datasets.DatasetDict(
            {
                split: columns(text=part.texts, label=[number[n] for n in part.labels])
                for split, part in parts.items()
            }
        )
    tasks = retrieval_scores.resolve_tasks(gecko, found)
    symmetric = {t for t in tasks if gecko.files.text_format.is_symmetric(t)}
    if symmetric and len(set(tasks)) > 1:
        raise ValueError(
            f"{found.name}: mteb cannot mix queries of the symmetric task "
            f"{min(symmetric)!r} with other tasks; make a folder of each, or score "
            "them together with gecko evaluate FOLDER"
        )
    corpus: dict[str, Any] = {
        "id": found.passage_ids,
        "title": found.titles,
        "text": found.texts,
    }
    if symmetric:
        corpus[mteb_encoder.TASK_COLUMN] = [tasks[0]] * len(found.texts)
    queries = {
        "id": found.query_ids,
        "text": found.queries,
        mteb_encoder.TASK_COLUMN: tasks,
    }
    relevance = {query: dict(found.relevance[query]) for query in found.query_ids}
    retrieval = {
        "corpus": columns(**corpus),
        "queries": columns(**queries),
        "relevant_docs": relevance,
        "top_ranked": None,
    }
    return {"default": {_SPLIT: retrieval}}


def _revision(found: sets.EvaluationSet) -> str:
    """Returns a digest of the content of a set."""
    content = json.dumps(vars(found), sort_keys=True, default=list).encode()
    return hashlib.sha256(content).hexdigest()[:12]
