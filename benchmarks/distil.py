"""Distils a sentence encoder into a table of token vectors: `mini` is made this way.

    python benchmarks/distil.py --text=DIR --teacher=DIR --vocabulary=FILE --output=DIR

The student is a bag of tokens: the vector of a text is the mean of the rows of its
tokens. The steps:

    texts     queries, passages, sentences and random spans of words
    teacher   the teacher's vector of every text, then a PCA to the student's width
    solve     least squares from the tokens of the texts to the teacher's vectors
    train     gradient descent on the teacher's vectors, on the similarities within a
              batch and on pairs of query and passage, at every MRL dim; a text counts
              in another letter case and with other punctuation as well, which hardly
              matters to the teacher
    finish    rare tokens with capitals move towards their lower case, EOS gets little
              weight, and the directions that all queries share become shorter

`--text` is the output of `text.py`. The teacher is a folder with config.json,
tokenizer.json and model.safetensors of a BERT encoder with mean pooling. For the
673,701 texts of the bundled model, the steps took half an hour in all on one core, with
PyTorch and AMX; without these, the teacher alone takes two hours of two cores.

`--output` gets the teacher's vectors (teacher/), the table after each of the last two
steps (solved.safetensors, table.safetensors) and facts about the run (run.json). A
second run continues where the first stopped: it reuses the vectors and every table that
is there. After `--teacher-seconds` the next step starts with the vectors that there
are. `distilled.py` turns the table into a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import time
import typing

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import distil_finish
import distil_solve
import distil_teacher
import distil_texts
import distil_training
import jax
import numpy as np
import sentencepiece
from distil_texts import say
from safetensors import numpy as safetensors

if typing.TYPE_CHECKING:
    from jaxtyping import Float

DIM = 256
_VERSIONED = ("jax", "numpy", "onnxruntime", "scipy", "sentencepiece", "torch")
# Chosen on the dev sets.
RECIPE = distil_training.Recipe(
    steps=8_000,
    rate=5e-3,
    weight_rate=5e-3,
    relate=1.0,
    match=0.5,
    contrast=0.5,
    pairs=0.5,
)


def main():
    """Parses the flags and runs the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--teacher", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--vocabulary", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--teacher-seconds", type=float, default=math.inf)
    parser.add_argument("--spans", type=int, default=1, help="per sentence")
    parser.add_argument("--batch", type=int, default=512, help="texts")
    parser.add_argument("--pair-batch", type=int, default=256, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Runs all steps."""
    done = options.output / "table.safetensors"
    if done.exists():
        return
    begun = time.monotonic()
    rows = distil_texts.load_rows(options.text / "text.jsonl.xz")
    texts = distil_texts.texts_of(rows, options.spans)
    pairs = [(row["q"], row["t"]) for row in rows if row.get("q")]
    vocabulary = sentencepiece.SentencePieceProcessor(
        model_file=str(options.vocabulary)
    )
    count = vocabulary.GetPieceSize()
    pieces = [
        vocabulary.IdToPiece(i).replace("▁", " ").strip() or "." for i in range(count)
    ]
    say(f"{len(texts):,} texts, {len(pairs):,} pairs of {len(rows):,} rows")
    store = distil_teacher.Store(options.output / "teacher")
    until = begun + options.teacher_seconds
    distil_teacher.teach(options.teacher, pieces, store, math.inf)
    distil_teacher.teach(options.teacher, texts, store, until)
    positions, vectors = store.find(texts)
    say(f"the teacher's vectors of {len(positions):,} texts")
    projection = principal(vectors, DIM)
    targets = project(vectors, projection)
    del vectors
    tokens = distil_texts.tokenize(vocabulary, [texts[i] for i in positions])
    first = options.output / "solved.safetensors"
    if not first.exists():
        table = distil_solve.solve(
            tokens, targets, project(store.vectors(pieces), projection)
        )
        safetensors.save_file({"table": table}, first)
    table = safetensors.load_file(first)["table"]
    sides = list(zip(*pairs, strict=True))
    side_tokens = [distil_texts.tokenize(vocabulary, side) for side in sides]
    turn = distil_solve.turn(table, targets, *side_tokens)
    others = {
        place: other
        for place, text in enumerate(texts[i] for i in positions)
        if (other := distil_texts.other_form(text)) != text
    }
    tokens += distil_texts.tokenize(vocabulary, [*others.values()])
    trainer = distil_training.Trainer(
        options,
        tokens,
        targets,
        np.array([*range(len(positions)), *others]),
        side_tokens,
        np.stack([np.unique(side, return_inverse=True)[1] for side in sides], axis=1),
        turn,
    )
    table, trained = trainer.train(
        table @ turn, RECIPE, options.output / "training.npz"
    )
    counts = np.bincount(np.concatenate(tokens), minlength=count)
    queries = distil_finish.sample_queries(rows, options.seed)
    table = distil_finish.finish(table, vocabulary, counts, queries)
    facts = {
        "method": "distillation of a sentence encoder into a table of token vectors",
        "teacher": options.teacher.resolve().name,
        "rows": len(rows),
        "texts": len(positions),
        "other_forms": len(others),
        "pairs": len(pairs),
        "solve": {
            "sif": distil_solve.SIF,
            "ridge": distil_solve.RIDGE,
            "rounds": distil_solve.ROUNDS,
            "steps": distil_solve.STEPS,
            "whitening": distil_solve.WHITENING,
        },
        "train": {
            **dataclasses.asdict(RECIPE),
            **trained,
            "batch": options.batch,
            "pair_batch": options.pair_batch,
            "seed": options.seed,
        },
        "finish": distil_finish.FACTS,
        "device": jax.devices()[0].device_kind,
        "versions": {
            name: importlib.metadata.version(name)
            for name in _VERSIONED
            if importlib.util.find_spec(name)
        },
    }
    (options.output / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    safetensors.save_file({"table": table.astype(np.float16)}, done)


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


if __name__ == "__main__":
    main()
