"""`gecko data`: shows the data, prepares it, trains a vocabulary."""

import argparse
import pathlib
import textwrap
from typing import Any

from gecko_jax.cli import data_cache, data_reports, data_teach, flags, parsing
from gecko_jax.io import wording

_DESCRIPTION = """\
Looks at data and prepares it.

  gecko data show        shows a mixture or a config's examples, or counts them
  gecko data prepare     adds hard negatives to pairs, or fetches a set of the table
  gecko data vocabulary  trains a SentencePiece vocabulary
  gecko data cache       tokenizes on many machines
  gecko data teach       makes the vectors of a teacher"""

_SHOW = """\
Shows the examples of a config as the model sees them: the formatted texts, their
tokens, and how much of a batch is padding. With a mixture's name it shows the table:
rates, sizes, licences, and what has been prepared.

--stats counts instead: tokens, what the config's lengths cut, padding, duplicates, and
what tasks share: in the data of the config, or in a MIXTURE named too. --decontaminate
counts lines that hold texts of evaluation sets: the same text, or 13 words in a row.

examples:
  gecko data show gecko_finetune
  gecko data show --config=configs/finetune.py:local
  gecko data show --config=configs/finetune.py:local --count=5 \\
      --config.data.files=mine.jsonl
  gecko data show --config=configs/finetune.py:base --stats --output=lengths.png
  gecko data show gecko_finetune --decontaminate=beir/nq,beir/scifact,sts.tsv"""


_VOCABULARY = """\
Trains a SentencePiece vocabulary on the texts of JSONL files. Any existing `.model`,
such as T5's, works as well: name it as --config.data.vocabulary.

example:
  gecko data vocabulary pairs.jsonl more.jsonl.gz --output=pairs.model --size=32000"""


_PREPARE = """\
Adds hard negatives to pairs: passages of the same files that BM25, or a model that you
have trained, ranks high for the query and that are not its positive. The result is a
file of triples to fine-tune on. With the name of a set of the table it turns the set's
source into such triples.

examples:
  gecko data prepare snli
  gecko data prepare hotpotqa --source='hotpotqa/distractor/train-*.parquet'
  gecko data prepare pairs.jsonl --output=triples.jsonl --negatives=1
  gecko data prepare pairs.jsonl --output=harder.jsonl --model=runs/prefinetune

Each line of the input is an object with `task`, `query` and `positive` (or `passage`),
and maybe `title` and ids. Passages are those of the same task. Negatives that a line
has are kept and counted: for a second round give the pairs again, not the triples."""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko data`."""
    data = parsing.add_verb(verbs, "gecko data", _DESCRIPTION)
    data_verbs = data.add_subparsers(metavar="VERB", required=True)

    parser = parsing.add_verb(data_verbs, "gecko data show", _SHOW, show)
    parser.add_argument("mixture", nargs="?", metavar="MIXTURE", help="of the table")
    parsing.add_config(parser, required=False)
    parsing.add_prepared_dir(parser)
    parser.add_argument(
        "--count", type=parsing.positive, default=2, help="examples of each task (2)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="lengths, padding, duplicates, overlaps"
    )
    parser.add_argument(
        "--output",
        type=parsing.path,
        metavar="FILE",
        help="the PNG of the lengths to write, with --stats",
    )
    parser.add_argument(
        "--decontaminate",
        type=parsing.words,
        default=(),
        metavar="SET,...",
        help="evaluation sets: folders, files, or quickstart",
    )

    parser = parsing.add_verb(
        data_verbs, "gecko data vocabulary", _VOCABULARY, vocabulary
    )
    parser.add_argument(
        "files", nargs="+", type=parsing.path, metavar="FILE", help="JSONL of pairs"
    )
    parsing.add_output(parser, "FILE", "the .model file to write")
    parser.add_argument(
        "--size", type=parsing.positive, default=32_000, help="number of pieces (32000)"
    )

    parser = parsing.add_verb(data_verbs, "gecko data prepare", _PREPARE, prepare)
    parser.add_argument(
        "files",
        nargs="+",
        type=parsing.path,
        metavar="NAME|FILE",
        help="a set, or JSONL of pairs",
    )
    parser.add_argument(
        "--output",
        type=parsing.path,
        metavar="FILE",
        help="the JSONL of triples to write, for files",
    )
    parser.add_argument(
        "--source", default="", metavar="PATH", help="where the set's files lie"
    )
    parser.add_argument(
        "--accept-licence",
        action="append",
        default=[],
        metavar="NAME",
        help="a set whose restricted licence you have read and accept",
    )
    parser.add_argument(
        "--tfds-data-dir",
        type=parsing.path,
        metavar="DIR",
        help="where TFDS keeps its sets",
    )
    parsing.add_prepared_dir(parser)
    parser.add_argument(
        "--negatives",
        type=parsing.positive,
        default=1,
        help="hard negatives of a pair (1)",
    )
    parser.add_argument(
        "--skip-top",
        type=parsing.count,
        default=0,
        help="best-ranked passages to pass over: the likeliest unmarked answers (0)",
    )
    parser.add_argument(
        "--model",
        type=parsing.path,
        metavar="DIR",
        help="mines for files by this model, not by BM25",
    )

    data_cache.add_parser(data_verbs)
    data_teach.add_parser(data_verbs)


def show(options: argparse.Namespace) -> None:
    """Prints the tasks of a config, and examples as the encoder reads them."""
    if options.output and not options.stats:
        raise ValueError("--output is the picture of --stats: add that")
    if options.stats or options.decontaminate:
        data_reports.report(options)
        return
    if not options.mixture and not options.config:
        options.parser.error("needs MIXTURE, such as gecko_finetune, or --config")
    if options.mixture:
        _print_mixture(options.mixture, options.prepared_dir)
    if not options.config:
        return
    config = flags.load(options.config, options.overrides, flags.TRAIN)
    import gecko_jax.config
    from gecko_jax.training import initialization, loop

    gecko_jax.config.check(config)
    batches = loop.build_batches(
        config, text_format=initialization.text_format(None, config.data.text_format)
    )
    batch = batches.batch(0)
    decode = batches.vocabulary.decode
    parsing.say(
        f"{wording.counted(batches.num_examples, 'example')}, "
        f"{config.data.batch_size:,} a step; mixture {batches.mixture_hash}"
    )
    for index, task in enumerate(batches.tasks):
        parsing.say(
            f"\n{wording.printable(task.name)}: "
            f"{wording.counted(batches.task_sizes[index], 'example')}, "
            f"{batches.rates[index]:.1%} of the mixture; licence "
            f"{wording.printable(task.licence)}"
        )
        if task.touches:
            parsing.say(f"  may hold texts of {', '.join(task.touches)}")
        for example in batches.examples(index, options.count):
            parsing.say()
            for side in ("query", "positive"):
                tokens = getattr(example, side)
                _print_text(side, decode(tokens.tolist()), len(tokens))
            for negative in example.negatives:
                _print_text("negative", decode(negative.tolist()))
    parsing.say("\nThe first batch:")
    for side in ("query", "passage"):
        used = batch[f"{side}_segment_ids"] > 0
        rows, length = used.shape
        parsing.say(
            f"  {side}: {wording.counted(rows, 'row')} of {length} tokens, "
            f"{1 - used.mean():.0%} padding, "
            f"{wording.counted(len(batch[f'{side}_index']), 'text')}"
        )


def _print_mixture(name: str, prepared_dir: str) -> None:
    """Prints the rows of a mixture of the table, prepared or not."""
    from gecko_jax.data import jsonl, mixtures

    tasks, drawn = mixtures.describe(name)
    located = [mixtures.locate(task, prepared_dir) for task in tasks]
    sizes = []
    for task in located:
        counts = [jsonl.count_examples(path) for path in task.files]
        size = sum(count.get(task.source_task, 0) for count in counts)
        sizes.append(size or task.published_size)
    known = [size for size in sizes if size]
    rates = drawn.rates(
        [task.name for task, size in zip(located, sizes, strict=True) if size], known
    )
    share = dict(
        zip(
            [t.name for t, size in zip(located, sizes, strict=True) if size],
            [rate / sum(rates) for rate in rates],
            strict=True,
        )
    )
    parsing.say(
        f"{name}: {wording.counted(len(tasks), 'task')}, temperature "
        f"{drawn.temperature:g}, cap {drawn.cap or 'none'}; rates are ours, "
        "among the tasks of known size"
    )
    for task, size in zip(located, sizes, strict=True):
        state = "" if task.files else "; not prepared"
        count = wording.counted(size, "example") if size else "unknown size"
        rate = f"{share[task.name]:.1%}" if task.name in share else "-"
        parsing.say(f"\n{task.name}: {count}, {rate}; licence {task.licence}{state}")
        form = ", symmetric" if task.symmetric else ""
        parsing.say(f"  {task.source or 'JSONL'}; t = {task.task_description!r}{form}")
        if task.restricted:
            parsing.say(f"  restricted: {task.restricted}")
        if task.touches:
            parsing.say(f"  may hold texts of {', '.join(task.touches)}")


def _print_text(name: str, text: str, tokens: int | None = None) -> None:
    note = f" ({wording.counted(tokens, 'token')})" if tokens is not None else ""
    body = wording.printable(textwrap.shorten(text, 400, placeholder=" ..."))
    parsing.say(
        textwrap.fill(
            f"{name}{note}: {body}",
            width=88,
            initial_indent="  ",
            subsequent_indent="      ",
        )
    )


def vocabulary(options: argparse.Namespace) -> None:
    """Trains a vocabulary and says what it is."""
    from gecko_jax.data import pieces

    trained = pieces.train_vocabulary(options.files, options.output, options.size)
    parsing.say(
        f"{options.output}: {trained.size:,} pieces, fingerprint "
        f"{trained.fingerprint}. Use it with --config.data.vocabulary={options.output}"
    )


def prepare(options: argparse.Namespace) -> None:
    """Prepares a set of the table, or mines hard negatives."""
    from gecko_jax.data import mining, task_table
    from gecko_jax.inference import ranking

    table = {task.name: task for task in task_table.TASKS}
    (name, *others) = options.files
    if not others and name in table and not pathlib.Path(name).exists():
        for given in ("model", "output", "skip_top"):
            if getattr(options, given):
                raise ValueError(
                    f"--{given.replace('_', '-')}={getattr(options, given)}: is for "
                    f"files, and {name} is a set; prepare it, then mine for the files "
                    "that it wrote"
                )
        _prepare_set(table[name], options)
        return
    if not options.output:
        raise ValueError(
            f"{name}: is no set of the table, which `gecko data show gecko_finetune` "
            "lists; to mine hard negatives for files, say where the triples go with "
            "--output=FILE"
        )

    build: mining.Build = ranking.Bm25Retriever
    if options.model:
        from gecko_jax.fret import retrieval
        from gecko_jax.inference import embedding

        build = retrieval.searched_by(embedding.load(options.model))
    summary = mining.mine_negatives(
        options.files,
        options.output,
        options.negatives,
        skip_top=options.skip_top,
        build=build,
    )
    parsing.say(
        f"{options.output}: {wording.counted(summary.examples, 'example')}, "
        f"{wording.counted(summary.mined, 'negative')} mined. Train on them with "
        f"--config.data.files={options.output}"
    )
    if summary.short:
        below = f" below the best {options.skip_top:,}" if options.skip_top else ""
        shares = "" if options.model else " that shares a word with the query"
        parsing.say(
            f"fewer than {options.negatives} for {summary.short:,} of them: their task "
            f"has no other passage left{shares}{below}"
        )
    elif not summary.mined:
        parsing.say(
            f"each has {options.negatives} already, and what a line has is kept; give "
            "the pairs without them, or ask for more with --negatives"
        )


def _prepare_set(task: Any, options: argparse.Namespace) -> None:
    from gecko_jax.data import prepare

    summary = prepare.prepare(
        task,
        options.prepared_dir,
        source=options.source,
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
