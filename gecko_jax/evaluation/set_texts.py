"""Texts of evaluation sets, for keeping training data free of them."""

import os
from collections.abc import Sequence

from gecko_jax.evaluation import sets
from gecko_jax.text import overlap


def read(folders: Sequence[str | os.PathLike]) -> overlap.Contamination:
    """Reads every query and passage, sentence or text of sets (`sets.load_all`)."""
    known = overlap.Contamination()
    for dataset in sets.load_all(folders):
        if isinstance(dataset, sets.RetrievalSet):
            queries = zip(dataset.query_ids, dataset.queries, strict=True)
            known.add(dataset.name, "query", queries)
            passages = zip(dataset.passage_ids, dataset.texts, strict=True)
            known.add(dataset.name, "passage", passages)
            continue
        if isinstance(dataset, sets.SimilaritySet):
            kind, sides = "sentence", (dataset.sentences1, dataset.sentences2)
        else:
            kind, sides = "text", (dataset.train.texts, dataset.test.texts)
        for texts in sides:
            known.add(dataset.name, kind, ((str(n), t) for n, t in enumerate(texts, 1)))
    return known
