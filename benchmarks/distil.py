"""Distils a sentence encoder into a table of token vectors: `mini` is made this way.

    python benchmarks/distil.py --text=DIR --teacher=DIR --vocabulary=FILE --output=DIR

The student is a bag of tokens: the vector of a text is the mean of the rows of its
tokens. The steps:

    texts          passages, their sentences, queries and random spans of words
    teacher        the teacher's vector of every text, then a PCA to the student's width
    start          a row for each token: the teacher's vector of the token as a word,
                   shorter for frequent tokens (SIF)
    relate         the student learns the teacher's vectors and their similarities
                   within a batch, at every MRL dim
    relate_pairs   the same, with a contrastive loss between queries and passages

`--text` is the output of `text.py`. The teacher is a folder with config.json,
tokenizer.json and model.safetensors of a BERT encoder with mean pooling. On a GPU all
of it takes a few minutes, on a CPU many hours, most of them for the teacher.

`--output` gets a table in float16 (NAME.safetensors) after each of the last two steps,
their recipes (figures.json) and facts about the run (run.json). A second run continues
where the first stopped: it reuses the teacher's vectors and every table that is there.
`distilled.py` turns a table into a model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import time
import typing
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import distil_texts
import distil_training
import jax
import numpy as np
import sentencepiece
from distil_texts import say
from distil_training import Recipe
from safetensors import numpy as safetensors

if typing.TYPE_CHECKING:
    from jaxtyping import Float, Int

DIM = 256
# A token of frequency f starts with the weight SIF / (SIF + f).
SIF = 1e-3
# Largest share of the time limit that the teacher may take.
TEACHER_SHARE = 0.45
# The rates and the numbers of updates were chosen on the dev sets.
VARIANTS = {
    "relate": Recipe(share=1.5, relate=1.0, match=0.5, contrast=0.5, steps=6_000),
    "relate_pairs": Recipe(
        start="relate",
        relate=1.0,
        match=0.5,
        contrast=0.5,
        pairs=0.5,
        rate=1e-3,
        weight_rate=1e-3,
        steps=2_100,
    ),
}


def main():
    """Parses the flags and runs the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--teacher", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--vocabulary", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    parser.add_argument("--texts", type=int, default=2_000_000, help="largest number")
    parser.add_argument("--spans", type=int, default=400_000, help="largest number")
    parser.add_argument("--batch", type=int, default=4_096, help="texts")
    parser.add_argument("--pair-batch", type=int, default=2_048, help="pairs")
    parser.add_argument("--chunk", type=int, default=50, help="updates per call")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Runs all steps."""
    say(jax.devices(), jax.__version__)
    begun = time.monotonic()
    rows, texts, pairs = distil_texts.load_texts(
        options.text / "text.jsonl.xz", options.texts, options.spans, options.seed
    )
    vocabulary = sentencepiece.SentencePieceProcessor(
        model_file=str(options.vocabulary)
    )
    count = vocabulary.GetPieceSize()
    pieces = [vocabulary.IdToPiece(i).replace("▁", " ").strip() for i in range(count)]
    everything = [*texts, *(piece or "." for piece in pieces)]
    say(f"{len(texts):,} texts, {len(pairs):,} pairs of {rows:,} rows")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        tokens = pool.submit(distil_texts.tokenize, vocabulary, everything)
        vectors = teacher_vectors(options, everything, count, begun)
        tokens = tokens.result()
    # The texts that the time limit left out are the last: their vectors are zeros.
    left = int(np.count_nonzero(np.abs(vectors[: len(texts)]).max(1)))
    vectors = np.concatenate([vectors[:left], vectors[len(texts) :]])
    tokens = tokens[:left] + tokens[len(texts) :]
    pairs = pairs[(pairs < left).all(1)]
    facts = {
        "method": "distillation of a sentence encoder into a table of token vectors",
        "teacher": options.teacher.resolve().name,
        "rows": rows,
        "texts": left,
        "pairs": len(pairs),
        "batch": options.batch,
        "pair_batch": options.pair_batch,
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": importlib.metadata.version("jax")},
    }
    targets = project(vectors, principal(vectors, DIM))
    counts = np.bincount(np.concatenate(tokens[:left]), minlength=count)
    tables = {"start": start(targets[left:], counts)}
    trainer = distil_training.Trainer(options, tokens, targets, pairs)
    del vectors, tokens
    path = options.output / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    ahead = sum(recipe.share for recipe in VARIANTS.values())
    for name, recipe in VARIANTS.items():
        stored = options.output / f"{name}.safetensors"
        if stored.exists():
            tables[name] = safetensors.load_file(stored)["table"].astype(np.float32)
        else:
            left_seconds = options.limit_seconds - (time.monotonic() - begun)
            seconds = max(1.0, left_seconds * recipe.share / ahead)
            table, trained = trainer.train(tables[recipe.start], recipe, seconds)
            tables[name] = table
            figures[name] = {"recipe": dataclasses.asdict(recipe), **trained}
            facts["seconds"] = round(time.monotonic() - begun)
            path.write_text(json.dumps(figures, indent=1) + "\n")
            (options.output / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
            safetensors.save_file({"table": table.astype(np.float16)}, stored)
        ahead -= recipe.share


def teacher_vectors(
    options: argparse.Namespace, everything: list[str], count: int, begun: float
) -> Float[np.ndarray, "N T"]:
    """Returns the teacher's vectors of the texts and of the pieces, which are last."""
    cache = options.output / "teacher.npy"
    if cache.exists():
        vectors = np.load(cache)
        if len(vectors) != len(everything):
            raise SystemExit(f"{cache}: vectors of other texts; remove the file")
        return vectors
    texts = len(everything) - count
    # The pieces go first, then passages and queries, then sentences and spans.
    order = [*range(texts, len(everything)), *range(texts)]
    until = begun + TEACHER_SHARE * options.limit_seconds
    vectors = distil_texts.teach(options.teacher, everything, order, until)
    np.save(cache, vectors)
    return vectors


def principal(vectors: Float[np.ndarray, "N T"], dim: int) -> Float[np.ndarray, "T D"]:
    """Returns the first principal directions, without centering."""
    chosen = vectors[:: max(1, len(vectors) // 200_000)].astype(np.float32)
    values, directions = np.linalg.eigh(chosen.T @ chosen / len(chosen))
    say(f"PCA keeps {values[-dim:].sum() / values.sum():.3f}")
    return directions[:, ::-1][:, :dim].astype(np.float32)


def project(
    vectors: Float[np.ndarray, "N T"], projection: Float[np.ndarray, "T D"]
) -> Float[np.ndarray, "N D"]:
    """Projects the vectors block by block, which bounds the memory, to float16."""
    projected = np.empty((len(vectors), projection.shape[1]), np.float16)
    for place in range(0, len(vectors), 100_000):
        block = vectors[place : place + 100_000].astype(np.float32)
        projected[place : place + 100_000] = block @ projection
    return projected


def start(
    pieces: Float[np.ndarray, "V D"], counts: Int[np.ndarray, " V"]
) -> Float[np.ndarray, "V D"]:
    """Returns the first table: each piece as a word, shorter where it is frequent."""
    weights = SIF / (SIF + counts / counts.sum())
    table = pieces.astype(np.float32) * weights[:, None].astype(np.float32)
    table[: distil_texts.EOS + 1] = 0
    return table


if __name__ == "__main__":
    main()
