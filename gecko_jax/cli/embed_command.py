"""`gecko embed` and `gecko index`: texts to vectors, and vectors to an index."""

import argparse
from typing import Any

from gecko_jax.cli import parsing
from gecko_jax.io import wording

_EMBED = """\
Embeds a file of texts into a folder of shards; an interrupted run goes on.

The file is JSON lines (`_id`, `text`, maybe `title`) or plain text, a text a line.

examples:
  gecko embed corpus.jsonl --model=runs/finetune --output=vectors
  gecko embed questions.txt --model=runs/finetune --output=vectors --side=query \\
      --task="question answering" --dim=256
  gecko embed corpus.jsonl --model=runs/finetune --output=small --precision=int8

--precision=int8 stores a byte per dim, binary a bit; index and search take either."""


_INDEX = """\
Builds an index from a folder that `gecko embed` made. The search is exact.

example:
  gecko index vectors --output=index"""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko embed` and `gecko index`."""
    parser = parsing.add_verb(verbs, "gecko embed", _EMBED, embed)
    parser.add_argument("file", type=parsing.path, metavar="FILE", help="the texts")
    parsing.add_model(parser)
    parsing.add_output(parser, "DIR", "the folder of shards to write")
    parser.add_argument(
        "--side", choices=("query", "passage"), default="passage", help="(passage)"
    )
    parser.add_argument("--task", help="name or description of the task")
    parser.add_argument(
        "--dim", type=parsing.positive, help="one that was trained (the largest)"
    )

    parser.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="of the vectors (float32)",
    )

    parser = parsing.add_verb(verbs, "gecko index", _INDEX, index)
    parser.add_argument(
        "vectors", type=parsing.path, metavar="DIR", help="what `gecko embed` wrote"
    )
    parsing.add_output(parser, "DIR", "the folder of the index to write")


def embed(options: argparse.Namespace) -> None:
    """Embeds a file of texts into a folder of shards."""
    from gecko_jax.inference import embedding, quantization, vector_files

    model = embedding.load(options.model)
    folder = vector_files.embed_file(
        model,
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
        f"{options.output}: an index of {wording.counted(len(built), 'text')}, "
        f"{built.codes.precision}, "
        f"{wording.counted(built.codes.bytes_per_vector, 'byte')} each"
    )
