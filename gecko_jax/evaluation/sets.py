"""Evaluation sets: judged retrieval in the BEIR layout, similarity, classification.

A retrieval set is a folder:

    corpus.jsonl    {"_id": "p1", "title": "", "text": "..."}
    queries.jsonl   {"_id": "q1", "text": "...", "task": "docs"}     task is optional
    qrels.jsonl     {"query-id": "q1", "corpus-id": "p1", "score": 1}
                    or qrels/test.tsv or qrels.tsv (`qrels`)

A similarity set is a file, `.jsonl` or `.tsv`, with the columns sentence1, sentence2
and score.

A classification set is a file, `.jsonl` or `.tsv`, that names the columns text, label
and split ("train" or "test"); or a folder with `train.jsonl` and `test.jsonl` (or
`.tsv`), which need no split.

Any of the files may end in `.gz`; `columns` says how they are read.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

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
    """Queries with a relevant passage, and the corpus they are searched in.

    Attributes:
        name: Of the folder.
        passage_ids: One per passage.
        titles: One per passage, "" for none.
        texts: One per passage.
        query_ids: One per query; queries without a relevant passage are left out.
        queries: One per query.
        tasks: The field `task` of each query, "" for none.
        relevance: Query id -> passage id -> grade.
    """

    name: str
    passage_ids: tuple[str, ...]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    tasks: tuple[str, ...]
    relevance: Mapping[str, Mapping[str, int | float]]

    def limit(self, max_queries: int, max_passages: int) -> "RetrievalSet":
        """Returns a smaller set for a quick look; 0 sets no limit.

        Queries are taken at even distances. Passages judged for them all stay, and
        others, at even distances too, fill up to `max_passages`. The scores are higher
        than those of the whole set: compare them among themselves alone.
        """
        chosen = _spread(range(len(self.queries)), max_queries)
        judged = {p for q in chosen for p in self.relevance[self.query_ids[q]]}
        kept = [r for r, p in enumerate(self.passage_ids) if p in judged]
        others = [r for r, p in enumerate(self.passage_ids) if p not in judged]
        room = max(max_passages - len(kept), 0)
        if not max_passages:
            kept += others
        elif room:
            kept += _spread(others, room)
        kept.sort()
        return dataclasses.replace(
            self,
            passage_ids=tuple(self.passage_ids[r] for r in kept),
            titles=tuple(self.titles[r] for r in kept),
            texts=tuple(self.texts[r] for r in kept),
            query_ids=tuple(self.query_ids[q] for q in chosen),
            queries=tuple(self.queries[q] for q in chosen),
            tasks=tuple(self.tasks[q] for q in chosen),
        )


@dataclasses.dataclass(frozen=True)
class SimilaritySet:
    """Pairs of sentences with a gold score; only the order of the scores counts."""

    name: str
    sentences1: tuple[str, ...]
    sentences2: tuple[str, ...]
    scores: Float[np.ndarray, " N"]

    def limit(self, max_queries: int, max_passages: int) -> "SimilaritySet":
        """Returns `max_queries` pairs at even distances; 0 sets no limit."""
        del max_passages
        chosen = _spread(range(len(self.scores)), max_queries)
        return dataclasses.replace(
            self,
            sentences1=tuple(self.sentences1[p] for p in chosen),
            sentences2=tuple(self.sentences2[p] for p in chosen),
            scores=self.scores[chosen],
        )


class Labelled(NamedTuple):
    """Texts, and the label of each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClassificationSet:
    """Labelled texts to learn from, and others to be judged by."""

    name: str
    train: Labelled
    test: Labelled

    def limit(self, max_queries: int, max_passages: int) -> "ClassificationSet":
        """Returns `max_queries` test texts at even distances; 0 sets no limit."""
        del max_passages
        chosen = _spread(range(len(self.test.texts)), max_queries)
        test = Labelled(*(tuple(part[t] for t in chosen) for part in self.test))
        return dataclasses.replace(self, test=test)


EvaluationSet = RetrievalSet | SimilaritySet | ClassificationSet


def load(path: str | os.PathLike) -> list[EvaluationSet]:
    """Reads an evaluation set, or a folder of several.

    Args:
        path: Where it lies; "quickstart" is the bundled retrieval set.

    Raises:
        ValueError: Nothing to evaluate there, or a bad line (named).
    """
    return [found for _, found in _load_placed(path)]


def load_all(paths: Sequence[str | os.PathLike]) -> Iterator[EvaluationSet]:
    """Yields the sets of several paths, each once, under names that differ.

    A set whose name another has already gets its folders before the name.
    """
    places: dict[pathlib.Path, str] = {}
    for path in paths:
        for place, found in _load_placed(path):
            if place not in places:
                places[place] = name = _distinct(found.name, place, places)
                yield dataclasses.replace(found, name=name)


def _distinct(name: str, place: pathlib.Path, taken: Mapping[pathlib.Path, str]) -> str:
    names = set(taken.values())
    # Folders do not tell pairs.tsv from pairs.jsonl beside it.
    if any((other.parent, _stem(other)) == (place.parent, name) for other in taken):
        name = wording.file_name(place.name)
    for part in reversed(place.parts[1:-1]):
        if name not in names:
            break
        name = f"{wording.file_name(part)}/{name}"
    return name


def _load_placed(
    path: str | os.PathLike,
) -> list[tuple[pathlib.Path, EvaluationSet]]:
    root = pathlib.Path(path)
    if str(path) == "quickstart" and not root.exists():
        root = QUICKSTART
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; check the path")
    found = _load_one(root)
    if found:
        return [(root.resolve(), found)]
    children = sorted(root.iterdir()) if root.is_dir() else []
    several = [(child.resolve(), _load_one(child)) for child in children]
    several = [(place, found) for place, found in several if found]
    if not several:
        raise ValueError(
            f"{root}: nothing to evaluate; it must be a folder in the BEIR layout "
            "(corpus.jsonl, queries.jsonl, qrels.jsonl), a similarity file (.tsv or "
            ".jsonl with sentence1, sentence2, score), a classification file (text, "
            "label, split) or folder (train.jsonl, test.jsonl), or a folder of these"
        )
    return several


def _load_one(path: pathlib.Path) -> EvaluationSet | None:
    if path.is_dir():
        if reading.find(path, "corpus.jsonl"):
            return _load_retrieval(path)
        parts = [_find_table(path, split) for split in _SPLITS]
        if all(parts):
            return _load_classification(path, [part for part in parts if part])
        return None
    name = path.name.removesuffix(".gz")
    if not name.endswith((".tsv", ".jsonl")):
        return None
    if columns.has(path, _CLASS):
        return _load_classification(path, [path])
    if name.endswith(".tsv") or columns.has(path, _PAIR):
        return _load_similarity(path)
    return None


def _load_retrieval(folder: pathlib.Path) -> RetrievalSet:
    passages = []
    num_empty = 0
    for record in text_files.read_texts(
        _need(folder, "corpus.jsonl"), allow_empty=True
    ):
        if record.text.strip():
            passages.append(record)
        else:  # Some BEIR corpora have passages of nothing; none can be found.
            num_empty += 1
    if num_empty:
        logging.warning("%s: %d passages without text are left out", folder, num_empty)
    if not passages:
        raise ValueError(f"{folder}/corpus.jsonl: an empty corpus; it needs passages")
    queries = list(text_files.read_texts(_need(folder, "queries.jsonl")))
    known = {query.id for query in queries}
    in_corpus = {passage.id for passage in passages}
    judged_path = reading.find(folder, *_QRELS)
    if judged_path is None:
        raise ValueError(
            f"{folder}: no judgements; it needs one of {', '.join(_QRELS)}"
        )
    relevance: dict[str, dict[str, int | float]] = {}
    num_absent = 0
    for query, judged in qrels.load(judged_path).items():
        for passage, (place, _) in judged.items():
            if query not in known:
                qrels.check_spelling(place, query, known)
                raise ValueError(
                    f"{place}: query {query!r} is not in queries.jsonl; add it there "
                    "or drop the line"
                )
            if passage not in in_corpus:
                qrels.check_spelling(place, passage, in_corpus)
                num_absent += 1
        relevance[query] = {passage: grade for passage, (_, grade) in judged.items()}
    if num_absent:
        logging.warning(
            "%s: %d judged passages are not in the corpus and count as never found",
            judged_path,
            num_absent,
        )
    judged = [
        q for q in queries if any(g > 0 for g in relevance.get(q.id, {}).values())
    ]
    if not judged:
        raise ValueError(
            f"{judged_path}: no query has a relevant passage (score above 0)"
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


def _load_similarity(path: pathlib.Path) -> SimilaritySet:
    rows = [
        (
            inputs.string_field(place, row, "sentence1"),
            inputs.string_field(place, row, "sentence2"),
            inputs.number_field(place, row, "score"),
        )
        for place, row in columns.read(path, _PAIR)
    ]
    if len(rows) < 2:
        raise ValueError(
            f"{path}: {wording.counted(len(rows), 'pair')}; Spearman needs at least 2"
        )
    first, second, scores = zip(*rows, strict=True)
    return SimilaritySet(_stem(path), first, second, np.array(scores, np.float64))


def _load_classification(
    path: pathlib.Path, parts: Sequence[pathlib.Path]
) -> ClassificationSet:
    """Reads one file with the column split, or one file for each split."""
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in _SPLITS}
    for part, known in zip(parts, _SPLITS, strict=False):
        split = known if len(parts) > 1 else None
        for place, text, label, named in _read_labelled(part, split):
            if named not in rows:
                raise ValueError(
                    f"{place}: split {named!r} must be one of {', '.join(_SPLITS)}"
                )
            rows[named].append((text, label))
    for split, labelled in rows.items():
        if not labelled:
            raise ValueError(f"{path}: no texts of the split {split}; add some")
    train, test = (
        Labelled(*(tuple(column) for column in zip(*rows[split], strict=True)))
        for split in _SPLITS
    )
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"{path}: the training texts have one label, {train.labels[0]!r}; "
            "classification needs two"
        )
    unknown = sorted(set(test.labels) - set(train.labels))
    if unknown:
        raise ValueError(
            f"{path}: no training text has the label {unknown[0]!r} of the test; add "
            "some, or drop its test texts"
        )
    return ClassificationSet(_stem(path), train, test)


def _read_labelled(
    path: pathlib.Path, split: str | None
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (place, text, label, split); a `split` given stands for a column."""
    names = _CLASS if split is None else _CLASS[:2]
    for place, row in columns.read(path, names):
        text = inputs.string_field(place, row, "text")
        label = inputs.id_field(place, row, "label")
        named = inputs.string_field(place, row, "split") if split is None else split
        yield place, text, label, named


def _need(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = reading.find(folder, name)
    if path is None:
        raise ValueError(
            f"{folder}: no {name}; a retrieval set needs corpus.jsonl, queries.jsonl "
            "and judgements"
        )
    return path


def _find_table(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    return reading.find(folder, f"{stem}.jsonl", f"{stem}.tsv")


def _stem(path: pathlib.Path) -> str:
    """Returns the name of a set: its file's without endings, or its folder's."""
    if path.is_dir():
        return wording.file_name(path.resolve().name)
    return wording.file_name(path.name.removesuffix(".gz").rpartition(".")[0])


def _spread(items: Sequence[int], limit: int) -> list[int]:
    """Returns at most `limit` items at even distances, or all for 0."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[position * len(items) // limit] for position in range(limit)]
