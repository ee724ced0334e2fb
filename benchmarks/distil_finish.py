"""Changes of a trained table of token vectors that need no teacher, for `distil.py`.

- Letter case: a token with capitals that came in few texts moves towards its lower
  case, because the teacher does not distinguish them.
- EOS: every text ends with it, so it gets little weight.
- Spectrum: the directions that all queries share ("what is", "how to", the name of a
  manual) become shorter.
"""

from __future__ import annotations

import typing

import distil_solve
import distil_texts
import numpy as np
import quality_data

from gecko_jax.io import reading

if typing.TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from jaxtyping import Float, Int

# A token that came so many times keeps half of its own vector.
CASE = 50
# Factor of the row of EOS. It is above 0, so that an empty text has a direction, too.
EOS_WEIGHT = 0.01
# Power of the standard deviation by which each principal direction is divided.
SPECTRUM = 0.3
# Most queries of a source that count.
PER_SOURCE = 800
# Each query counts once as it is, and once as a question or a request.
QUESTIONS = (
    *("What is {}?", "what is {}", "What does {} mean?", "{} meaning"),
    *("What is the {}?", "Which {}?", "Where is {}?", "Why is {}?"),
    *("How do I {}?", "how to {}"),
)


FACTS = {
    "case": CASE,
    "eos_weight": EOS_WEIGHT,
    "spectrum": SPECTRUM,
    "per_source": PER_SOURCE,
}


def finish(
    table: Float[np.ndarray, "V D"],
    vocabulary: Any,
    counts: Int[np.ndarray, " V"],
    queries: Sequence[str],
) -> Float[np.ndarray, "V D"]:
    """Returns the table after all changes.

    Args:
        table: Rows, each times its weight.
        vocabulary: SentencePiece processor.
        counts: How many times each token came in the texts of the training.
        queries: Result of `sample_queries`.
    """
    shared = share_case(table, vocabulary, counts)
    shared[distil_texts.EOS] *= EOS_WEIGHT
    return flatten_spectrum(shared, distil_texts.tokenize(vocabulary, queries))


def share_case(
    table: Float[np.ndarray, "V D"], vocabulary: Any, counts: Int[np.ndarray, " V"]
) -> Float[np.ndarray, "V D"]:
    """Mixes the row of each token with capitals and that of its lower case."""
    shared = table.copy()
    for token in range(len(table)):
        piece = vocabulary.IdToPiece(token)
        if vocabulary.IsControl(token) or piece == piece.lower():
            continue
        if piece.startswith("▁"):
            lower = vocabulary.EncodeAsIds(piece[1:].lower())
        else:  # The middle of a word: only a token of its own has the same context.
            lower = [vocabulary.PieceToId(piece.lower())]
        if lower and vocabulary.unk_id() not in lower:
            share = CASE / (CASE + counts[token])
            shared[token] += share * (table[lower].sum(0) - table[token])
    return shared


def sample_queries(rows: Sequence[Mapping[str, str]], seed: int) -> list[str]:
    """Returns queries of every source, as they are and as questions.

    The training queries of the bundled corpus follow, whose tasks have a form of their
    own ("What is X?", "PostgreSQL: ...").
    """
    by_source: dict[str, list[str]] = {}
    for row in rows:
        if row.get("q"):
            name = row["s"] if row["s"].startswith("@") else row["s"].partition("/")[0]
            by_source.setdefault(name, []).append(row["q"])
    random = np.random.default_rng(seed)
    chosen = []
    for _, queries in sorted(by_source.items()):
        for place in random.permutation(len(queries))[:PER_SOURCE]:
            form = QUESTIONS[random.integers(len(QUESTIONS))]
            chosen += [queries[place], form.format(queries[place])]
    bundled = reading.read_records(quality_data.QUICKSTART / "train.jsonl")
    return [*chosen, *(row["query"] for _, row in bundled)]


def flatten_spectrum(
    table: Float[np.ndarray, "V D"], queries: Sequence[Int[np.ndarray, " L"]]
) -> Float[np.ndarray, "V D"]:
    """Shortens the principal directions of the queries' vectors.

    The matrix is symmetric, so the first dimensions stay the first.
    """
    vectors = distil_solve.bags(queries, len(table)) @ table
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    variances, directions = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    scales = variances ** (-SPECTRUM / 2)
    return table @ ((directions * scales) @ directions.T).astype(np.float32)
