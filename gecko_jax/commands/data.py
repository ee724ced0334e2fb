"""`gecko data`: shows the data, prepares it, trains a vocabulary."""

import argparse
import pathlib
import textwrap
from typing import Any

from gecko_jax import flags
from gecko_jax.commands import data_reports, parsing

_SHOW = """\
Shows the examples of a config as the model sees them: the formatted texts, their
tokens, and how much of a batch is padding. With a mixture's name it shows the table:
rates, sizes, licences, and what has been prepared.

--stats counts instead: tokens, what the config's lengths cut, padding, duplicates, and
what tasks share; with MIXTURE, of that one in place of the config's. --decontaminate
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
Adds hard negatives to pairs: passages of the same files that BM25 ranks high for the
query and that are not its positive. The result is a file of triples to fine-tune on.
With the name of a set of the table it turns the set's source into such triples.

examples:
  gecko data prepare snli
  gecko data prepare hotpotqa --source='hotpotqa/distractor/train-*.parquet'
  gecko data prepare pairs.jsonl --output=triples.jsonl --negatives=1

Each line of the input is an object with `task`, `query` and `positive` (or `passage`),
and maybe `title` and ids."""


_CACHE = """\
Tokenizes the data of a config with seqio's Apache Beam job, whose workers share the
files: for sets that are too large for one machine. Training takes the caches over when
its data.cache_dir is the folder, and draws the same batches as without them; it needs
no Beam. Without this verb training tokenizes by itself.

Apache Beam wants an environment of its own: pip install "gecko-jax[beam]"

examples:
  gecko data cache --config=configs/finetune.py:base --output=/mnt/bucket/cache \\
      --config.data.mixture=gecko_academic
  gecko data cache --config=configs/finetune.py:local --output=cache \\
      --pipeline-options=--direct_num_workers=4,--direct_running_mode=multi_processing"""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko data`."""
    data = parsing.add_verb(verbs, "gecko data", "Looks at data and prepares it.")
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

    parser = parsing.add_verb(data_verbs, "gecko data cache", _CACHE, cache)
    parsing.add_config(parser)
    parsing.add_output(parser, "DIR", "the data.cache_dir of the runs to come")
    parser.add_argument(
        "--pipeline-options",
        type=parsing.words,
        default=(),
        metavar="OPTION,...",
        help="of Apache Beam, such as --runner=DataflowRunner",
    )


def show(options: argparse.Namespace) -> None:
    """Prints the tasks of a config, and examples as the encoder reads them."""
    if options.output and not options.stats:
        raise ValueError("--output is the picture of --stats: add that")
    if options.stats or options.decontaminate:
        data_reports.report(options)
        return
    if options.mixture:
        _print_mixture(options.mixture, options.prepared_dir)
    if not options.config:
        return
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import text
    from gecko_jax import train as training
    from gecko_jax.data import pipeline

    config_lib.check(config)
    batches = training.build_batches(config, text_format=text.TextFormat())
    summary = pipeline.summarize(batches, options.count)
    batch = batches.batch(0)
    print(
        f"{summary['num_examples']:,} examples, {config.data.batch_size:,} a step; "
        f"mixture {summary['mixture_hash']}"
    )
    for task in summary["tasks"]:
        print(
            f"\n{task['name']}: {task['num_examples']:,} examples, "
            f"{task['rate']:.1%} of the mixture; licence {task['licence']}"
        )
        if task["touches"]:
            print(f"  may hold texts of {', '.join(task['touches'])}")
        for example in task["examples"]:
            print()
            _print_text("query", example["query"], len(example["query_tokens"]))
            _print_text(
                "positive", example["positive"], len(example["positive_tokens"])
            )
            for negative in example["negatives"]:
                _print_text("negative", negative)
    print("\nThe first batch:")
    for side in ("query", "passage"):
        used = batch[f"{side}_segment_ids"] > 0
        rows, length = used.shape
        print(
            f"  {side}: {rows} rows of {length} tokens, {1 - used.mean():.0%} padding, "
            f"{len(batch[f'{side}_index']):,} texts"
        )


def _print_mixture(name: str, prepared_dir: str) -> None:
    """Prints the rows of a mixture of the table, prepared or not."""
    from gecko_jax.data import jsonl, mixtures

    tasks, drawn = mixtures.describe(name)
    located = [mixtures.locate(task, prepared_dir) for task in tasks]
    sizes = []
    for task in located:
        counts = [jsonl.summarize(path).examples for path in task.files]
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
    print(
        f"{name}: {len(tasks)} tasks, temperature {drawn.temperature:g}, cap "
        f"{drawn.cap or 'none'}; rates are ours, among the tasks of known size"
    )
    for task, size in zip(located, sizes, strict=True):
        state = "" if task.files else "; not prepared"
        count = f"{size:,} examples" if size else "unknown size"
        rate = f"{share[task.name]:.1%}" if task.name in share else "-"
        print(f"\n{task.name}: {count}, {rate}; licence {task.licence}{state}")
        form = ", symmetric" if task.symmetric else ""
        print(f"  {task.source or 'JSONL'}; t = {task.task_description!r}{form}")
        if task.restricted:
            print(f"  restricted: {task.restricted}")
        if task.touches:
            print(f"  may hold texts of {', '.join(task.touches)}")


def _print_text(name: str, text: str, tokens: int | None = None) -> None:
    note = f" ({tokens} tokens)" if tokens is not None else ""
    body = textwrap.shorten(text, 400, placeholder=" ...")
    print(
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
    print(
        f"{options.output}: {trained.size:,} pieces, fingerprint "
        f"{trained.fingerprint}. Use it with --config.data.vocabulary={options.output}"
    )


def prepare(options: argparse.Namespace) -> None:
    """Prepares a set of the table, or mines hard negatives by BM25."""
    from gecko_jax.data import mining, tasks

    table = {task.name: task for task in tasks.TASKS}
    (name, *others) = options.files
    if not others and name in table and not pathlib.Path(name).exists():
        _prepare_set(table[name], options)
        return
    if not options.output:
        raise ValueError(
            f"{name}: is no set of the table; to mine hard negatives for files, say "
            "where the triples go with --output=FILE"
        )

    summary = mining.mine_negatives(
        options.files, options.output, options.negatives, skip_top=options.skip_top
    )
    print(
        f"{options.output}: {summary.examples:,} examples, {summary.mined:,} negatives "
        f"mined. Train on them with --config.data.files={options.output}"
    )
    if summary.short:
        print(
            f"{summary.short:,} examples have fewer than {options.negatives}: no other "
            "passage shares a word with their query"
        )


def _prepare_set(task: Any, options: argparse.Namespace) -> None:
    from gecko_jax.data import prepare

    summary = prepare.prepare(
        task,
        options.prepared_dir,
        source=options.source,
        accepted_licences=tuple(options.accept_licence),
        tfds_data_dir=options.tfds_data_dir,
    )
    print(f"{summary.folder}: {summary.examples:,} examples; licence {task.licence}")
    for reason, count in sorted(summary.dropped.items(), key=lambda item: -item[1]):
        print(f"  left out {count:,}: {reason}")
    if task.mine and summary.without_negative:
        print(f"  {summary.without_negative:,} have no hard negative")


def cache(options: argparse.Namespace) -> None:
    """Fills the caches of a config with Apache Beam, and says what they hold."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import initialization
    from gecko_jax import train as training
    from gecko_jax.data import selection, seqio_cache, tasks

    config_lib.check(config)
    seqio_cache.load_beam()
    pieces = training.load_vocabulary(config)
    # How texts are written comes from the checkpoint that training will start from.
    start = initialization.load_start(config)
    output = pathlib.Path(options.output)
    chosen = selection.select(
        mixture=config.data.mixture,
        files=config.data.files,
        vocabulary=pieces,
        text_format=initialization.text_format(start),
        cache_dir=output,
        prepared_dir=config.data.prepared_dir,
    )
    job = seqio_cache.Job(
        chosen.text_format,
        tasks.vocabulary_path(config.data.vocabulary),
        pieces.extra_ids,
        options.pipeline_options,
    )
    for task, key in zip(chosen.tasks, chosen.keys, strict=True):
        folder, stats = seqio_cache.write(task, key, job, output)
        tokens = sum(
            n
            for name, n in stats.items()
            if name.endswith("_tokens") and not name.endswith("_max_tokens")
        )
        print(f"{folder}: {stats['examples']:,} examples, {tokens:,} tokens")
    print(f"Train on them with --config.data.cache_dir={options.output}")
