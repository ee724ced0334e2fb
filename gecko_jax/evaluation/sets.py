"""Evaluation sets: retrieval in the BEIR layout, similarity, classification.

A retrieval set is a folder:

    corpus.jsonl    {"_id": "p1", "title": "", "text": "..."}
    queries.jsonl   {"_id": "q1", "text": "...", "task": "docs"}     task is optional
    qrels.jsonl     {"query-id": "q1", "corpus-id": "p1", "score": 1}
                    or qrels/test.tsv or qrels.tsv (`qrels`)

A similarity set is a `.jsonl` or `.tsv` file with the columns sentence1, sentence2 and
score.

A classification set is a `.jsonl` or `.tsv` file that names the columns text, label and
split ("train" or "test"), or a folder with `train.jsonl` and `test.jsonl` (or `.tsv`),
which need no split.

Any of the files may end in `.gz`. `columns` defines how they are read.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax.io import columns, inputs, qrels, reading, wording
from gecko_jax.text import text_files

QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart"

_PAIR = ("sentence1", "sentence2", "score")
_CLASS = ("text", "label", "split")
_SPLITS = ("train", "test")
_QRELS = ("qrels/test.tsv", "qrels/test.jsonl", "qrels.tsv", "qrels.jsonl")


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries with relevant passages, and the corpus to search."""

    name: str  # of the folder
    passage_ids: tuple[str, ...]
    titles: tuple[str, ...]  # of the passages, "" for none
    texts: tuple[str, ...]  # of the passages
    query_ids: tuple[str, ...]  # of the queries with a relevant passage
    queries: tuple[str, ...]  # their texts
    tasks: tuple[str, ...]  # the field `task` of each query, "" for none
    # Query id -> passage id -> grade.
    relevance: Mapping[str, Mapping[str, int | float]]

    def limit(self, max_queries: int, max_passages: int) -> "RetrievalSet":
        """Returns a smaller set for a quick look; 0 sets no limit.

        Queries are taken at even distances. All passages judged for them stay, and
        others at even distances fill up to `max_passages`. The scores are higher than
        on the whole set, so compare them only with each other.
        """
        chosen = _spread(range(len(self.queries)), max_queries)
        judged = {p for q in chosen for p in self.relevance[self.query_ids[q]]}
        passage_rows = [r for r, p in enumerate(self.passage_ids) if p in judged]
        unjudged = [r for r, p in enumerate(self.passage_ids) if p not in judged]
        room = max(max_passages - len(passage_rows), 0)
        if room or not max_passages:
            passage_rows = sorted(passage_rows + _spread(unjudged, room))
        columns = dict.fromkeys(("passage_ids", "titles", "texts"), passage_rows)
        columns |= dict.fromkeys(("query_ids", "queries", "tasks"), chosen)
        cut = {name: _take(getattr(self, name), rows) for name, rows in columns.items()}
        return dataclasses.replace(self, **cut)


@dataclasses.dataclass(frozen=True)
class SimilaritySet:
    """Pairs of sentences with gold scores, of which only the order counts."""

    name: str
    sentences1: tuple[str, ...]
    sentences2: tuple[str, ...]
    scores: Float[np.ndarray, " N"]

    def limit(self, max_queries: int, max_passages: int) -> "SimilaritySet":
        """Returns `max_queries` pairs at even distances; 0 sets no limit."""
        chosen = _spread(range(len(self.scores)), max_queries)
        first, second = (_take(s, chosen) for s in (self.sentences1, self.sentences2))
        return SimilaritySet(self.name, first, second, self.scores[chosen])


class Labelled(NamedTuple):
    """Texts with one label each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClassificationSet:
    """Labelled texts for training and for testing a classifier."""

    name: str
    train: Labelled
    test: Labelled

    def limit(self, max_queries: int, max_passages: int) -> "ClassificationSet":
        """Returns `max_queries` test texts at even distances; 0 sets no limit."""
        chosen = _spread(range(len(self.test.texts)), max_queries)
        test = Labelled(*(_take(column, chosen) for column in self.test))
        return dataclasses.replace(self, test=test)


EvaluationSet = RetrievalSet | SimilaritySet | ClassificationSet


def load(path: str | os.PathLike) -> list[EvaluationSet]:
    """Reads an evaluation set, or a folder of several; "quickstart" is bundled."""
    return [dataset for _, dataset in _load_with_paths(path)]


def load_all(paths: Sequence[str | os.PathLike]) -> Iterator[EvaluationSet]:
    """Yields the sets of several paths, each once, under unique names.

    If a name is taken, the parent folders of the set are prepended to it.
    """
    names: dict[pathlib.Path, str] = {}
    for path in paths:
        for place, dataset in _load_with_paths(path):
            if place not in names:
                names[place] = name = _unique_name(dataset.name, place, names)
                yield dataclasses.replace(dataset, name=name)


def _unique_name(
    name: str, place: pathlib.Path, names: Mapping[pathlib.Path, str]
) -> str:
    # Parent folders cannot distinguish pairs.tsv from pairs.jsonl in the same folder.
    if any((p.parent, _stem(p)) == (place.parent, name) for p in names):
        name = wording.file_name(place.name)
    for part in reversed(place.parts[1:-1]):
        if name not in names.values():
            break
        name = f"{wording.file_name(part)}/{name}"
    return name


def _load_with_paths(
    path: str | os.PathLike,
) -> list[tuple[pathlib.Path, EvaluationSet]]:
    root = pathlib.Path(path)
    if str(path) == "quickstart" and not root.exists():
        root = QUICKSTART
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; check the path")
    if dataset := _load_set(root):
        return [(root.resolve(), dataset)]
    children = sorted(root.iterdir()) if root.is_dir() else []
    several = [(c.resolve(), dataset) for c in children if (dataset := _load_set(c))]
    if not several:
        raise ValueError(
            f"{root}: nothing to evaluate; it must be a folder in the BEIR layout "
            "(corpus.jsonl, queries.jsonl, qrels.jsonl), a similarity file (.tsv or "
            ".jsonl with sentence1, sentence2, score), a classification file (text, "
            "label, split) or folder (train.jsonl, test.jsonl), or a folder of these"
        )
    return several


def _load_set(path: pathlib.Path) -> EvaluationSet | None:
    if path.is_dir():
        if reading.find(path, "corpus.jsonl"):
            return _load_retrieval(path)
        parts = [reading.find(path, f"{s}.jsonl", f"{s}.tsv") for s in _SPLITS]
        return _load_classification(path, parts) if all(parts) else None
    name = path.name.removesuffix(".gz")
    if not name.endswith((".tsv", ".jsonl")):
        return None
    if columns.has(path, _CLASS):
        return _load_classification(path, [path])
    if name.endswith(".tsv") or columns.has(path, _PAIR):
        return _load_similarity(path)
    return None


def _load_retrieval(folder: pathlib.Path) -> RetrievalSet:
    corpus_path = reading.find(folder, "corpus.jsonl")
    queries_path = reading.find(folder, "queries.jsonl")
    qrels_path = reading.find(folder, *_QRELS)
    if corpus_path is None or queries_path is None:
        raise ValueError(
            f"{folder}: no queries.jsonl; a retrieval set needs corpus.jsonl, "
            "queries.jsonl and judgements"
        )
    if qrels_path is None:
        raise ValueError(f"{folder}: no judgements; add one of {', '.join(_QRELS)}")
    records = list(text_files.read_texts(corpus_path, allow_empty=True))
    # Some BEIR corpora have passages without text, which no search can return.
    passages = [record for record in records if record.text.strip()]
    if num_empty := len(records) - len(passages):
        logging.warning("%s: %d passages without text are left out", folder, num_empty)
    if not passages:
        raise ValueError(f"{folder}/corpus.jsonl: empty corpus; it needs passages")
    queries = list(text_files.read_texts(queries_path))
    relevance = _load_relevance(
        qrels_path, {q.id for q in queries}, {p.id for p in passages}
    )
    judged = [q for q in queries if max(relevance.get(q.id, {"": 0}).values()) > 0]
    if not judged:
        raise ValueError(
            f"{qrels_path}: no query has a relevant passage (a score above 0); add one"
        )
    return RetrievalSet(
        name=_stem(folder),
        passage_ids=tuple(passage.id for passage in passages),
        titles=tuple(passage.title for passage in passages),
        texts=tuple(passage.text for passage in passages),
        query_ids=tuple(query.id for query in judged),
        queries=tuple(query.text for query in judged),
        tasks=tuple(query.task for query in judged),
        relevance=relevance,
    )


def _load_relevance(
    path: pathlib.Path, query_ids: set[str], passage_ids: set[str]
) -> dict[str, dict[str, int | float]]:
    relevance: dict[str, dict[str, int | float]] = {}
    num_absent = 0
    for query, judged in qrels.load(path).items():
        for passage, (place, _) in judged.items():
            if query not in query_ids:
                qrels.check_spelling(place, query, query_ids)
                raise ValueError(
                    f"{place}: query {query!r} is not in queries.jsonl; add it there "
                    "or drop the line"
                )
            if passage not in passage_ids:
                qrels.check_spelling(place, passage, passage_ids)
                num_absent += 1
        relevance[query] = {passage: grade for passage, (_, grade) in judged.items()}
    if num_absent:
        logging.warning(
            "%s: %d judged passages are not in the corpus; no ranking can contain them",
            path,
            num_absent,
        )
    return relevance


def _load_similarity(path: pathlib.Path) -> SimilaritySet:
    rows = []
    for place, row in columns.read(path, _PAIR):
        sentences = (inputs.string_field(place, row, name) for name in _PAIR[:2])
        rows.append((*sentences, inputs.number_field(place, row, "score")))
    if len(rows) < 2:
        counted = wording.counted(len(rows), "pair")
        raise ValueError(f"{path}: {counted}; Spearman's correlation needs 2 or more")
    first, second, scores = zip(*rows, strict=True)
    return SimilaritySet(_stem(path), first, second, np.array(scores, np.float64))


def _load_classification(path: pathlib.Path, parts: Sequence[Any]) -> ClassificationSet:
    """Reads one file with a column "split", or one file for each split."""
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in _SPLITS}
    names = _CLASS if len(parts) == 1 else _CLASS[:2]
    for part, split in zip(parts, _SPLITS, strict=False):
        for place, row in columns.read(part, names):
            if len(parts) == 1:
                split = inputs.string_field(place, row, "split")
            if split not in rows:
                raise ValueError(
                    f"{place}: split {split!r} must be one of {', '.join(_SPLITS)}"
                )
            content = inputs.string_field(place, row, "text")
            rows[split].append((content, inputs.id_field(place, row, "label")))
    for split, labelled in rows.items():
        if not labelled:
            raise ValueError(f"{path}: no texts of the split {split}; add some")
    train, test = (Labelled(*zip(*rows[split], strict=True)) for split in _SPLITS)
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"{path}: all training texts have the label {train.labels[0]!r}; add texts "
            "of another label"
        )
    if unknown := sorted(set(test.labels) - set(train.labels)):
        raise ValueError(
            f"{path}: no training text has the test label {unknown[0]!r}; add some, or "
            "drop the test texts of this label"
        )
    return ClassificationSet(_stem(path), train, test)


def _stem(path: pathlib.Path) -> str:
    """Returns the name of a folder, or of a file without its extensions."""
    if path.is_dir():
        return wording.file_name(path.resolve().name)
    return wording.file_name(path.name.removesuffix(".gz").rpartition(".")[0])


def _take(values: Sequence[str], positions: Sequence[int]) -> tuple[str, ...]:
    return tuple(values[position] for position in positions)


def _spread(items: Sequence[int], limit: int) -> list[int]:
    """Returns at most `limit` items at even distances, or all for 0."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[position * len(items) // limit] for position in range(limit)]
