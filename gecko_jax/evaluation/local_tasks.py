"""Local tasks: evaluation sets of our own as tasks that `mteb` runs.

A retrieval folder, a similarity file or a classification file becomes an instance of a
subclass of mteb's own task of that type, so that mteb's protocol and metrics apply, and
its JSON results lie beside those of its own tasks.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from gecko_jax.evaluation import judgements, mteb_encoder, retrieval_scores, sets
from gecko_jax.inference import embedding
from gecko_jax.io import wording

# mteb's type, its class, and its main metric.
_TYPES: Mapping[type, tuple[Any, str, str]] = {
    sets.RetrievalSet: ("Retrieval", "AbsTaskRetrieval", "ndcg_at_10"),
    sets.SimilaritySet: ("STS", "AbsTaskSTS", "cosine_spearman"),
    sets.ClassificationSet: ("Classification", "AbsTaskClassification", "accuracy"),
}
_SPLIT = "test"


def build(gecko: embedding.Gecko, found: sets.EvaluationSet) -> Any:
    """Returns the mteb task of an evaluation set.

    Args:
        gecko: Knows which tasks the queries of a retrieval set can name.
        found: The set.

    Raises:
        ValueError: Its queries are of symmetric and of other tasks: mteb encodes the
            passages once, and these need two ways of writing. Or `judgements` refuses
            its judgements.
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
        # mteb takes results of another revision for results of another data set.
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
    task.dataset = _rows(gecko, found)
    task.data_loaded = True  # mteb neither loads nor unloads it.
    return task


def _rows(gecko: embedding.Gecko, found: sets.EvaluationSet) -> Any:
    """Returns the set in the layout that its type of task reads."""
    import datasets

    if isinstance(found, sets.SimilaritySet):
        columns = {
            "sentence1": found.sentences1,
            "sentence2": found.sentences2,
            "score": found.scores,
        }
        return {_SPLIT: datasets.Dataset.from_dict(_lists(columns))}
    if isinstance(found, sets.ClassificationSet):
        number = {label: n for n, label in enumerate(sorted(set(found.train.labels)))}
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {
                        "text": list(part.texts),
                        "label": [number[n] for n in part.labels],
                    }
                )
                for split, part in (("train", found.train), (_SPLIT, found.test))
            }
        )
    tasks = retrieval_scores.resolve_tasks(gecko, found)
    symmetric = {t for t in tasks if gecko.files.text_format.is_symmetric(t)}
    if symmetric and len(set(tasks)) > 1:
        raise ValueError(
            f"{found.name}: the queries are of task {sorted(symmetric)[0]!r}, whose "
            "passages are written as queries, and of others; make a folder of each, "
            "or judge them together with gecko evaluate FOLDER"
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
    return {
        "default": {
            _SPLIT: {
                "corpus": datasets.Dataset.from_dict(_lists(corpus)),
                "queries": datasets.Dataset.from_dict(_lists(queries)),
                "relevant_docs": {
                    query: dict(found.relevance[query]) for query in found.query_ids
                },
                "top_ranked": None,
            }
        }
    }


def _lists(columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: list(column) for name, column in columns.items()}


def _revision(found: sets.EvaluationSet) -> str:
    """Names the content of a set."""
    content = json.dumps(vars(found), sort_keys=True, default=list).encode()
    return hashlib.sha256(content).hexdigest()[:12]
