"""The data of `quality.py`, and the files made from it before training.

A data folder has `train.jsonl.gz` and `eval/SPLIT/TASK/`, where SPLIT is dev or test.
TASK is a folder in the BEIR layout or, for labelled texts, one with `train.jsonl` and
`test.jsonl`. `quickstart` is the bundled corpus.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import measured

from gecko_jax.evaluation import sets
from gecko_jax.io import reading
from gecko_jax.text import overlap

QUICKSTART = measured.ROOT / "gecko_jax" / "quickstart"
CLASSES = ("mask", "text")
CLASS_DRAWS = 5


@dataclasses.dataclass(frozen=True)
class Data:
    """Paths of the data.

    Attributes:
        name: Name in tables and files.
        train: File of training pairs.
        evals: Retrieval folders by split and task.
        classes: Folder of labelled texts, if there is one.
        subset: Number of pairs to train on; 0 for all.
    """

    name: str
    train: pathlib.Path
    evals: Mapping[str, Mapping[str, pathlib.Path]]
    classes: pathlib.Path | None = None
    subset: int = 0


def find(name: str, subset: int = 0, split: str = "") -> Data:
    """Finds the files of a data folder.

    Args:
        name: Folder, or "quickstart", which is small and never reduced to a subset.
        subset: Number of pairs to train on; 0 for all.
        split: Split to evaluate on, if the folder has both; "" for both.
    """
    if name == "quickstart":
        return Data(name, QUICKSTART / "train.jsonl", {"test": {name: QUICKSTART}})
    tag = f"{f'-{subset}' if subset else ''}{f'-{split}' if split else ''}"
    root = pathlib.Path(name)
    train = [root / "train.jsonl.gz", root / "train.jsonl"]
    train = [path for path in train if path.is_file()]
    evals = {
        split: {
            path.parent.name: path.parent
            for path in sorted((root / "eval" / split).glob("*/corpus.jsonl"))
        }
        for split in ("dev", "test")
    }
    evals = {split: folders for split, folders in evals.items() if folders}
    if not train or not evals:
        raise SystemExit(f"{root}: needs train.jsonl(.gz) and eval/test/TASK/ folders")
    if split in evals:
        evals = {split: evals[split]}
    labelled = sorted(root.glob("eval/*/*/train.jsonl"))
    classes = labelled[0].parent if labelled else None
    return Data(f"{root.name}{tag}", train[0], evals, classes, subset)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Files that training reads.

    Attributes:
        vocabulary: SentencePiece model.
        pairs: JSONL of pairs.
        triples: JSONL of the pairs with three hard negatives each.
        classes: Triples of labelled texts, by the way that false negatives are avoided.
        teacher: Embeddings of the texts of all pairs by the pretrained model. They
            include the texts of a subset and the hard negatives.
    """

    vocabulary: pathlib.Path
    pairs: pathlib.Path
    triples: pathlib.Path
    classes: Mapping[str, pathlib.Path]
    teacher: pathlib.Path


def prepared(data: Data, output: pathlib.Path, vocabulary_size: int) -> Prepared:
    """Returns the paths of the files that `prepare` makes."""
    folder = output / "prepared"
    # The files depend on the pairs only, not on the split.
    stem = data.train.parent.name + (f"-{data.subset}" if data.subset else "")
    kinds = CLASSES if data.classes else ()
    return Prepared(
        QUICKSTART / "vocabulary.model"
        if data.train.parent == QUICKSTART
        else folder / f"{data.train.parent.name}-{vocabulary_size}.model",
        folder / f"{stem}.jsonl.gz" if data.subset else data.train,
        folder / f"{stem}-triples.jsonl.gz",
        {kind: folder / f"{stem}-classes-{kind}.jsonl.gz" for kind in kinds},
        folder / f"{data.train.parent.name}-teacher",
    )


def prepare(data: Data, output: pathlib.Path, vocabulary_size: int) -> None:
    """Makes the missing files, once for all rows; not counted as training time."""
    import bm25s

    from gecko_jax.data import mining, pieces

    logging.getLogger(bm25s.__name__).setLevel(logging.WARNING)
    files = prepared(data, output, vocabulary_size)
    if not files.vocabulary.exists():
        pieces.train_vocabulary(
            [str(data.train)], str(files.vocabulary), vocabulary_size
        )
    if not files.pairs.exists():
        mining.write_lines(files.pairs, choose(data))
    if not files.triples.exists():
        mining.mine_negatives([files.pairs], files.triples, 3)
    for kind, path in files.classes.items():
        if not path.exists():
            mining.write_lines(path, class_triples(data, kind))


def choose(data: Data) -> list[dict[str, Any]]:
    """Returns the lines of a subset, the same in every run, stratified by task."""

    def draw(record: dict[str, Any]) -> bytes:
        return hashlib.blake2b(json.dumps(record, sort_keys=True).encode()).digest()

    records = [record for _, record in reading.read_records(data.train)]
    if data.subset > len(records):
        raise SystemExit(
            f"--subset={data.subset}: {data.train} has {len(records):,} pairs; "
            "--subset=0 takes all"
        )
    smallest = set(sorted(map(draw, records))[: data.subset])
    chosen = (record for record in records if draw(record) in smallest)
    return list(itertools.islice(chosen, data.subset))


def class_triples(data: Data, kind: str) -> Iterator[dict[str, Any]]:
    """Yields triples of labelled texts that are in no retrieval set.

    Each text is in several triples with different partners, because labelled texts are
    few compared with the pairs.
    """
    from gecko_jax.data import classification, preprocessors

    assert data.classes is not None
    known = held_out(judged_folders(data.train.parent))
    records = [
        record
        for _, record in reading.read_records(data.classes / "train.jsonl")
        if not known.holds(record["text"])
    ]
    group = 0
    for seed in range(CLASS_DRAWS):
        for line in classification.triples(records, seed=seed):
            if isinstance(line, preprocessors.Drop):
                continue
            if kind == "text":
                number = line.pop("negative_group") - 1
                line = {
                    "query": f"{line['query']} {number}",
                    "positive": f"{line['positive']} {number}",
                    "negatives": [f"{text} {number}" for text in line["negatives"]],
                }
            else:
                group += 1
                line["negative_group"] = group
            yield {"task": "classification", **line}


def judged_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns all evaluation folders of a data folder, such as "test/code"."""
    folders = sorted(path for path in root.glob("eval/*/*") if path.is_dir())
    return {f"{path.parent.name}/{path.name}": path for path in folders}


def held_out(folders: Mapping[str, pathlib.Path]) -> overlap.Contamination:
    """Returns the queries, judged passages and test texts that training must not see.

    The other passages are distractors, and training texts may be among them.
    """
    known = overlap.Contamination()
    for name, folder in folders.items():
        for dataset in sets.load(folder):
            if isinstance(dataset, sets.ClassificationSet):
                texts = enumerate(dataset.test.texts)
                known.add(name, "text", ((str(n), text) for n, text in texts))
            if not isinstance(dataset, sets.RetrievalSet):
                continue
            known.add(
                name, "query", zip(dataset.query_ids, dataset.queries, strict=True)
            )
            judged = {
                passage
                for passages in dataset.relevance.values()
                for passage, grade in passages.items()
                if grade > 0
            }
            passages = zip(dataset.passage_ids, dataset.texts, strict=True)
            known.add(name, "passage", (p for p in passages if p[0] in judged))
    return known
