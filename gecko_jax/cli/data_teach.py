"""`gecko data teach`: the vectors of a teacher."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from gecko_jax.cli import parsing
from gecko_jax.io import wording

_TEACH = """\
Makes the vectors of a teacher that embedding matching trains towards: one for each
query, positive and hard negative of JSONL files.

example with a teacher that gecko can load (a Gecko, or what `gecko import` reads):
  gecko data teach triples.jsonl --model=runs/xl --output=teacher --dim=768

examples with any other: write the texts, embed them, and hand over the vectors, as
an .npy with a row for each line or as JSON lines with `_id` and `vector`:
  gecko data teach triples.jsonl --texts=texts.jsonl
  gecko data teach triples.jsonl --vectors=vectors.npy --output=teacher --dim=256

Each line of the texts has `side` (query or passage), `task`, `text` and `title`: what
the teacher must be told. --dim projects to the dims that keep the vectors' inner
products best; a student cannot follow more dims than it has. Then train with
  --config.data.teacher=teacher --config.data.teacher_dim=256 \\
  --config.loss.matching_weight=10.0"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko data teach`."""
    parser = parsing.add_verb(verbs, "gecko data teach", _TEACH, teach)
    parser.add_argument(
        "files", nargs="+", type=parsing.path, metavar="FILE", help="JSONL to train on"
    )
    parser.add_argument(
        "--output", type=parsing.path, metavar="DIR", help="the folder to write"
    )
    parser.add_argument("--model", type=parsing.path, metavar="DIR", help="the teacher")
    parser.add_argument(
        "--vectors", type=parsing.path, metavar="FILE", help=".npy or .jsonl"
    )
    parser.add_argument(
        "--texts", type=parsing.path, metavar="FILE", help="write the texts there"
    )
    parser.add_argument(
        "--dim", type=parsing.count, default=0, help="project to so many dims (all)"
    )


def teach(options: argparse.Namespace) -> None:
    """Writes the texts for a teacher, or the folder of its vectors."""
    given = [name for name in ("texts", "model", "vectors") if getattr(options, name)]
    if len(given) != 1:
        options.parser.error("needs one of --model, --vectors, --texts")
    if bool(options.output) == bool(options.texts):
        options.parser.error(
            "--model and --vectors need --output; --texts is an output itself"
        )
    from gecko_jax.data import teacher_vectors
    from gecko_jax.io import writing

    texts = list(teacher_vectors.list_texts(options.files))
    if options.texts:
        with (
            writing.write_file(options.texts) as temporary,
            temporary.open("w") as file,
        ):
            for text in texts:
                file.write(json.dumps(text.to_dict(), ensure_ascii=False) + "\n")
        parsing.say(
            f"{options.texts}: {wording.counted(len(texts), 'text')}. Embed each line, "
            "and give the vectors to the same command with --vectors"
        )
        return
    if options.model:
        blocks = _embed_with(options.model, texts)
    else:
        blocks = teacher_vectors.read_vectors(options.vectors, texts)
    settings = teacher_vectors.write(
        options.output,
        [text.key for text in texts],
        blocks,
        made_by=options.model or options.vectors,
        dim=options.dim,
    )
    parsing.say(
        f"{options.output}: {wording.counted(settings['num_texts'], 'vector')} of "
        f"{wording.counted(settings['dim'], 'dim')}. Train towards them with "
        f"--config.data.teacher={options.output} "
        f"--config.data.teacher_dim={settings['dim']} "
        "--config.loss.matching_weight=10.0"
    )


def _embed_with(source: str, texts: list[Any]) -> Iterator[Any]:
    """Yields the vectors of texts by a model of ours, side and task as each has it."""
    from gecko_jax.inference import embedding
    from gecko_jax.io import progress

    model = embedding.load(source)
    blocks = [texts[first : first + 1024] for first in range(0, len(texts), 1024)]
    for block in progress.track(blocks, "Embedding by the teacher", len(blocks)):
        vectors: list[Any] = [None] * len(block)
        for side in ("query", "passage"):
            rows = [row for row, text in enumerate(block) if text.side == side]
            if not rows:
                continue
            found = model.encode(
                [block[row].text for row in rows],
                side=side,
                task=[block[row].task for row in rows],
                titles=None
                if side == "query"
                else [block[row].title or None for row in rows],
            )
            for row, vector in zip(rows, found, strict=True):
                vectors[row] = vector
        yield vectors
