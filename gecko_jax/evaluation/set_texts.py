"""Texts of evaluation sets, for keeping training data free of them."""

import os
from collections.abc import Sequence

from gecko_jax.evaluation import sets
from gecko_jax.text import overlap


def read(folders: Sequence[str | os.PathLike]) -> overlap.Contamination:
    """Reads every query and passage, sentence or text of sets (`sets.load_all`)."""
    known = overlap.Contamination()
    for one in sets.load_all(folders):
        if isinstance(one, sets.RetrievalSet):
            known.add(one.name, "query", zip(one.query_ids, one.queries, strict=True))
            known.add(one.name, "passage", zip(one.passage_ids, one.texts, strict=True))
            continue
        if isinstance(one, sets.SimilaritySet):
            kind, sides = "sentence", (one.sentences1, one.sentences2)
        else:
            kind, sides = "text", (one.train.texts, one.test.texts)
        for texts in sides:
            known.add(one.name, kind, ((str(n), t) for n, t in enumerate(texts, 1)))
    return known
