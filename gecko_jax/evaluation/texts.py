"""The texts of evaluation sets, as training data is kept clear of them."""

import os
import pathlib
from collections.abc import Sequence

from gecko_jax import contamination
from gecko_jax.evaluation import sets


def read(folders: Sequence[str | os.PathLike]) -> contamination.Contamination:
    """Reads every query and passage, sentence or text of the sets.

    Args:
        folders: What `sets.load` takes. Sets of equal names are told apart by folder.

    Raises:
        ValueError: Nothing to evaluate there, or a bad line.
    """
    known = contamination.Contamination()
    for folder in folders:
        for one in sets.load(folder):
            name = _distinct(one.name, folder, known.sets)
            if isinstance(one, sets.RetrievalSet):
                known.add(name, "query", zip(one.query_ids, one.queries, strict=True))
                passages = zip(one.passage_ids, one.texts, strict=True)
                known.add(name, "passage", passages)
            elif isinstance(one, sets.SimilaritySet):
                known.add(name, "sentence", _numbered(one.sentences1))
                known.add(name, "sentence", _numbered(one.sentences2))
            else:
                known.add(name, "text", _numbered(one.train.texts))
                known.add(name, "text", _numbered(one.test.texts))
    return known


def _distinct(name: str, folder: str | os.PathLike, taken: Sequence[str]) -> str:
    """Puts folders before a name until no other set has it."""
    path = pathlib.Path(folder).resolve()
    has_name = path.is_file() or path.name == name
    parts = path.parts[1:-1] if has_name else path.parts[1:]
    shown = name
    for part in reversed(parts):
        if shown not in taken:
            break
        shown = f"{part}/{shown}"
    return shown


def _numbered(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(str(number), content) for number, content in enumerate(texts, start=1)]
