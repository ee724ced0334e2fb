"""`gecko embed` and `gecko index`: texts to embeddings, embeddings to an index."""

import argparse
from typing import Any

from gecko_jax.cli import parsing
from gecko_jax.io import wording

_EMBED = """\
Embeds a file of texts and writes the embeddings in shards. The same command resumes an
interrupted run.

The file is JSON lines with `_id`, `text` and optionally `title`, or plain text with one
text per line.

examples:
  gecko embed corpus.jsonl --model=runs/finetune --output=vectors
  gecko embed questions.txt --model=runs/finetune --output=vectors --side=query \\
      --task="question answering" --dim=256
  gecko embed corpus.jsonl --model=runs/finetune --output=small --precision=int8

--precision=int8 stores one byte per dimension, binary one bit. `gecko index` and
`gecko search` accept all precisions."""


_INDEX = """\
Builds a search index from a folder that `gecko embed` wrote. The search is exact.

example:
  gecko index vectors --output=index"""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko embed` and `gecko index`."""
    parser = parsing.add_verb(verbs, "gecko embed", _EMBED, embed)
    add = parser.option
    add("file", "texts to embed", "FILE")
    parsing.add_model(parser)
    add("--output", "folder for the shards", "DIR", required=True)
    text = "embed the texts as queries or as passages"
    add("--side", text, ("query", "passage"), "passage")
    add("--task", "name or description of the task", str, metavar="TASK")
    text = "dimension, one that the model was trained for (default: the largest)"
    add("--dim", text, parsing.positive)
    text = "precision of the stored embeddings"
    add("--precision", text, ("float32", "int8", "binary"), "float32")

    add = parsing.add_verb(verbs, "gecko index", _INDEX, index).option
    add("vectors", "output of `gecko embed`", "DIR")
    add("--output", "folder for the index", "DIR", required=True)


def embed(options: argparse.Namespace) -> None:
    """Embeds a file of texts into a folder of shards."""
    from gecko_jax.inference import embedding, quantization, vector_files

    folder = vector_files.embed_file(
        embedding.load(options.model),
        options.file,
        options.output,
        side=options.side,
        task=options.task,
        dim=options.dim,
        precision=options.precision,
    )
    settings = vector_files.read_settings(folder)
    size = quantization.bytes_per_vector(options.precision, settings["dim"])
    parsing.say(
        f"{folder}: {wording.counted(settings['num_texts'], 'vector')} of "
        f"{wording.counted(settings['dim'], 'dim')}, "
        f"{options.precision}, {wording.counted(size, 'byte')} each"
    )


def index(options: argparse.Namespace) -> None:
    """Builds an index from a folder of shards."""
    from gecko_jax.inference import vector_index

    built = vector_index.from_embeddings(options.vectors)
    built.save(options.output)
    parsing.say(
        f"{options.output}: index of {wording.counted(len(built), 'text')}, "
        f"{built.codes.precision}, "
        f"{wording.counted(built.codes.bytes_per_vector, 'byte')} each"
    )
