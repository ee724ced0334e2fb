"""The texts of evaluation sets, as training data is kept clear of them."""

import os
from collections.abc import Sequence

from gecko_jax.evaluation import sets
from gecko_jax.text import overlap


def read(folders: Sequence[str | os.PathLike]) -> overlap.Contamination:
    """Reads every query and passage, sentence or text of the sets.

    Args:
        folders: What `sets.load_all` takes, which tells sets of equal names apart.

    Raises:
        ValueError: Nothing to evaluate there, or a bad line.
    """
    known = overlap.Contamination()
    for one in sets.load_all(folders):
        if isinstance(one, sets.RetrievalSet):
            queries = zip(one.query_ids, one.queries, strict=True)
            passages = zip(one.passage_ids, one.texts, strict=True)
            known.add(one.name, "query", queries)
            known.add(one.name, "passage", passages)
        elif isinstance(one, sets.SimilaritySet):
            known.add(one.name, "sentence", _numbered(one.sentences1))
            known.add(one.name, "sentence", _numbered(one.sentences2))
        else:
            known.add(one.name, "text", _numbered(one.train.texts))
            known.add(one.name, "text", _numbered(one.test.texts))
    return known


def _numbered(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(str(number), content) for number, content in enumerate(texts, start=1)]
