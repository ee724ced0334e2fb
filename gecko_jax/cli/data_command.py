"""`gecko data`: the parsers of its verbs; mines hard negatives, trains vocabularies."""

import argparse
import functools
import pathlib
from typing import Any

from gecko_jax.cli import data_cache, data_show, data_teach, parsing
from gecko_jax.io import wording

_DESCRIPTION = """\
Inspects and prepares training data.

  gecko data show        show or count the examples of a mixture or a config
  gecko data prepare     add hard negatives to pairs, or convert a known data set
  gecko data vocabulary  train a SentencePiece vocabulary
  gecko data cache       tokenize on many machines
  gecko data teach       store a teacher's embeddings for distillation"""

_VOCABULARY = """\
Trains a SentencePiece vocabulary on the texts of JSONL files. Any existing `.model`
file, such as T5's, works as well: pass it as --config.data.vocabulary.

example:
  gecko data vocabulary pairs.jsonl more.jsonl.gz --output=pairs.model --size=32000"""


_PREPARE = """\
Mines hard negatives for files of pairs: passages of the same task that BM25, or a model
that you have trained, ranks high for the query and that are not its positive. Writes a
file of triples for fine-tuning. Given the name of a known data set, converts its source
into such triples; `gecko data show gecko_finetune` lists the names.

examples:
  gecko data prepare snli
  gecko data prepare hotpotqa --source='hotpotqa/distractor/train-*.parquet'
  gecko data prepare pairs.jsonl --output=triples.jsonl --negatives=1
  gecko data prepare pairs.jsonl --output=harder.jsonl --model=runs/prefinetune \\
      --max-negative-share=0.95

Each line of a file is an object with `task`, `query` and `positive` (or `passage`), and
optionally `title` and ids. Existing negatives of a line are kept and count towards
--negatives. For a second round of mining, pass the pairs again, not the triples."""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko data`."""
    data = parsing.add_verb(verbs, "gecko data", _DESCRIPTION)
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    data_show.add_parser(data_verbs)

    name = "gecko data vocabulary"
    add = parsing.add_verb(data_verbs, name, _VOCABULARY, vocabulary).option
    add("files", "JSONL files of pairs", "FILE", nargs="+")
    add("--output", "the .model file to write", "FILE", required=True)
    add("--size", "number of pieces", parsing.positive, 32_000)

    parser = parsing.add_verb(data_verbs, "gecko data prepare", _PREPARE, prepare)
    add = parser.option
    add("files", "data set, or JSONL files of pairs", "NAME|FILE", nargs="+")
    add("--output", "JSONL file for the triples of FILE", "FILE")
    add("--source", "source files of the data set", "PATH")
    text = "data set whose restricted licence you have read and accept"
    add("--accept-licence", text, "NAME", [], action="append")
    add("--tfds-data-dir", "data folder of TensorFlow Datasets", "DIR")
    parsing.add_prepared_dir(parser)
    add("--negatives", "hard negatives per pair", parsing.positive, 1)
    text = "number of top-ranked passages to skip: these may be unmarked answers"
    add("--skip-top", text, parsing.count, 0)
    add("--model", "mine with this model instead of BM25", "DIR")
    text = "with --model, keep negatives whose cosine is below this share of the "
    text += "positive's; 0 for all (NV-Retriever, TopK-PercPos: 0.95)"
    add("--max-negative-share", text, float, 0.0)

    data_cache.add_parser(data_verbs)
    data_teach.add_parser(data_verbs)


def vocabulary(options: argparse.Namespace) -> None:
    """Trains a vocabulary and prints its size and fingerprint."""
    from gecko_jax.data import pieces

    trained = pieces.train_vocabulary(options.files, options.output, options.size)
    parsing.say(
        f"{options.output}: {trained.size:,} pieces, fingerprint "
        f"{trained.fingerprint}. Use it with --config.data.vocabulary={options.output}"
    )


def prepare(options: argparse.Namespace) -> None:
    """Converts a known data set, or mines hard negatives for files."""
    from gecko_jax.data import task_table

    table = {task.name: task for task in task_table.TASKS}
    (name, *others) = options.files
    if others or name not in table or pathlib.Path(name).exists():
        _mine(options)
        return
    for option in ("model", "output", "skip_top", "max_negative_share"):
        if getattr(options, option):
            raise ValueError(
                f"--{option.replace('_', '-')}={getattr(options, option)}: applies to "
                f"files, and {name} is a data set; prepare it, then mine negatives for "
                "the files that it writes"
            )
    _prepare_set(table[name], options)


def _mine(options: argparse.Namespace) -> None:
    from gecko_jax.data import mining
    from gecko_jax.inference import ranking

    if not options.output:
        raise ValueError(
            f"{options.files[0]}: not a known data set; run `gecko data show "
            "gecko_finetune` to list them, or add --output=FILE to mine hard negatives "
            "for files"
        )
    build: mining.Build = ranking.Bm25Retriever
    retriever = "bm25"
    if options.model:
        from gecko_jax.fret import retrieval
        from gecko_jax.inference import embedding

        model = embedding.load(options.model)
        build = functools.partial(retrieval.index, model)
        retriever = f"{options.model}, revision {model.revision}"
    summary = mining.mine_negatives(
        options.files,
        options.output,
        options.negatives,
        skip_top=options.skip_top,
        max_negative_share=options.max_negative_share,
        build=build,
        retriever=retriever,
    )
    parsing.say(
        f"{options.output}: {wording.counted(summary.examples, 'example')}, "
        f"{wording.counted(summary.mined, 'negative')} mined. Train on them with "
        f"--config.data.files={options.output}"
    )
    if summary.short:
        shared = "" if options.model else " that shares a word with the query"
        below = f" below the top {options.skip_top:,}" if options.skip_top else ""
        if options.max_negative_share:
            below += f" below {options.max_negative_share} of the positive's cosine"
        parsing.say(
            f"{summary.short:,} of them have fewer than {options.negatives}: their "
            f"task has no other passage{shared}{below}"
        )
    elif not summary.mined:
        parsing.say(
            f"Each example already has {options.negatives}. To mine others, pass the "
            "pairs without negatives, or increase --negatives"
        )


def _prepare_set(task: Any, options: argparse.Namespace) -> None:
    from gecko_jax.data import prepare

    summary = prepare.prepare(
        task,
        options.prepared_dir,
        source=options.source or "",
        accepted_licences=tuple(options.accept_licence),
        tfds_data_dir=options.tfds_data_dir,
        negatives=options.negatives,
    )
    parsing.say(
        f"{summary.folder}: {wording.counted(summary.examples, 'example')}; licence "
        f"{task.licence}"
    )
    for reason, count in sorted(summary.dropped.items(), key=lambda item: -item[1]):
        parsing.say(f"  left out {count:,}: {reason}")
    if task.mine and summary.without_negative:
        parsing.say(
            f"  {summary.without_negative:,} have fewer hard negatives than "
            f"{options.negatives}"
        )
