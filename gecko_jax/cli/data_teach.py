"""`gecko data teach`: stores a teacher's embeddings for distillation."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from gecko_jax.cli import parsing
from gecko_jax.io import wording

_TEACH = """\
Stores the embeddings of a teacher model for distillation: one for each query, positive
and hard negative of JSONL files.

example with a teacher that gecko_jax can load:
  gecko data teach triples.jsonl --model=runs/xl --output=teacher --dim=768

example with any other teacher: write the texts, embed them, and pass the embeddings as
an .npy file with one row per line, or as JSON lines with `_id` and `vector`:
  gecko data teach triples.jsonl --texts=texts.jsonl
  gecko data teach triples.jsonl --vectors=vectors.npy --output=teacher --dim=256

Each line of the texts has `side` (query or passage), `task`, `text` and `title`.
--dim projects the embeddings to the directions that best preserve their inner products;
choose at most the student's dimension. Then train with
  --config.data.teacher=teacher --config.data.teacher_dim=256 \\
  --config.loss.matching_weight=10.0"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko data teach`."""
    add = parsing.add_verb(verbs, "gecko data teach", _TEACH, teach).option
    add("files", "JSONL files of training data", "FILE", nargs="+")
    add("--output", "folder for the embeddings", "DIR")
    add("--model", "teacher: any model that gecko_jax can load", "DIR")
    add("--vectors", "embeddings of the texts, .npy or .jsonl", "FILE")
    add("--texts", "write the texts to this file", "FILE")
    text = "project to this many dimensions (default: no projection)"
    add("--dim", text, parsing.count, 0)


def teach(options: argparse.Namespace) -> None:
    """Writes the texts for a teacher, or the folder of its embeddings."""
    if bool(options.texts) + bool(options.model) + bool(options.vectors) != 1:
        options.parser.error("give exactly one of --model, --vectors and --texts")
    if bool(options.output) == bool(options.texts):
        options.parser.error("--model and --vectors need --output, --texts takes none")
    from gecko_jax.data import teacher_vectors
    from gecko_jax.io import writing

    texts = list(teacher_vectors.list_texts(options.files))
    if options.texts:
        with writing.write_file(options.texts) as path, path.open("w") as file:
            for text in texts:
                file.write(json.dumps(text.to_dict(), ensure_ascii=False) + "\n")
        parsing.say(
            f"{options.texts}: {wording.counted(len(texts), 'text')}. Embed each line, "
            "then run the same command with --vectors"
        )
        return
    source = options.model or options.vectors
    read = _embed_with if options.model else teacher_vectors.read_vectors
    keys = [text.key for text in texts]
    settings = teacher_vectors.write(
        options.output, keys, read(source, texts), made_by=source, dim=options.dim
    )
    parsing.say(
        f"{options.output}: {wording.counted(settings['num_texts'], 'vector')} of "
        f"{wording.counted(settings['dim'], 'dim')}. Train with "
        f"--config.data.teacher={options.output} "
        f"--config.data.teacher_dim={settings['dim']} "
        "--config.loss.matching_weight=10.0"
    )


def _embed_with(source: str, texts: list[Any]) -> Iterator[Any]:
    """Yields the embeddings of texts in blocks, each text with its side and task."""
    from gecko_jax.inference import embedding
    from gecko_jax.io import progress

    model = embedding.load(source)
    blocks = [texts[first : first + 1024] for first in range(0, len(texts), 1024)]
    for block in progress.track(blocks, "Embedding with the teacher", len(blocks)):
        vectors: list[Any] = [None] * len(block)
        for side in ("query", "passage"):
            rows = [row for row, text in enumerate(block) if text.side == side]
            if not rows:
                continue
            titles = [block[row].title or None for row in rows]
            embeddings = model.encode(
                [block[row].text for row in rows],
                side=side,
                task=[block[row].task for row in rows],
                titles=titles if side == "passage" else None,
            )
            for row, vector in zip(rows, embeddings, strict=True):
                vectors[row] = vector
        yield vectors
