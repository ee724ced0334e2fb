"""`gecko data`: shows the data, prepares it, trains a vocabulary."""

import argparse
import json
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

from gecko_jax import flags
from gecko_jax.commands import data_reports, parsing

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
Adds hard negatives to pairs: passages of the same files that BM25 ranks high for the
query and that are not its positive. The result is a file of triples to fine-tune on.
With the name of a set of the table it turns the set's source into such triples.

examples:
  gecko data prepare snli
  gecko data prepare hotpotqa --source='hotpotqa/distractor/train-*.parquet'
  gecko data prepare pairs.jsonl --output=triples.jsonl --negatives=1

Each line of the input is an object with `task`, `query` and `positive` (or `passage`),
and maybe `title` and ids."""


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
  --config.loss.matching_weight=1.0"""


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

    parser = parsing.add_verb(data_verbs, "gecko data teach", _TEACH, teach)
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
    if not options.mixture and not options.config:
        options.parser.error("needs MIXTURE, such as gecko_finetune, or --config")
    if options.mixture:
        _print_mixture(options.mixture, options.prepared_dir)
    if not options.config:
        return
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import initialization
    from gecko_jax import train as training
    from gecko_jax.data import pipeline

    config_lib.check(config)
    batches = training.build_batches(
        config, text_format=initialization.text_format(None, config.data.text_format)
    )
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


def teach(options: argparse.Namespace) -> None:
    """Writes the texts for a teacher, or the folder of its vectors."""
    given = [name for name in ("texts", "model", "vectors") if getattr(options, name)]
    if len(given) != 1:
        options.parser.error("needs one of --model, --vectors, --texts")
    if bool(options.output) == bool(options.texts):
        options.parser.error(
            "--model and --vectors need --output; --texts is an output itself"
        )
    from gecko_jax import files
    from gecko_jax.data import teacher

    texts = list(teacher.list_texts(options.files))
    if options.texts:
        with files.write_file(options.texts) as temporary, temporary.open("w") as file:
            for text in texts:
                file.write(json.dumps(text.to_dict(), ensure_ascii=False) + "\n")
        print(
            f"{options.texts}: {len(texts):,} texts. Embed each line, and give the "
            "vectors to the same command with --vectors"
        )
        return
    if options.model:
        blocks = _embed_with(options.model, texts)
    else:
        blocks = teacher.read_vectors(options.vectors, texts)
    settings = teacher.write(
        options.output,
        [text.key for text in texts],
        blocks,
        made_by=options.model or options.vectors,
        dim=options.dim,
    )
    print(
        f"{options.output}: {settings['num_texts']:,} vectors of {settings['dim']} "
        f"dims. Train towards them with --config.data.teacher={options.output} "
        f"--config.data.teacher_dim={settings['dim']} "
        "--config.loss.matching_weight=1.0"
    )


def _embed_with(source: str, texts: list[Any]) -> Iterator[Any]:
    """Yields the vectors of texts by a model of ours, side and task as each has it."""
    from gecko_jax import embedding, progress

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
            f"{name}: is no set of the table, which `gecko data show gecko_finetune` "
            "lists; to mine hard negatives for files, say where the triples go with "
            "--output=FILE"
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
            f"fewer than {options.negatives} for {summary.short:,} of them: no other "
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
        negatives=options.negatives,
    )
    print(f"{summary.folder}: {summary.examples:,} examples; licence {task.licence}")
    for reason, count in sorted(summary.dropped.items(), key=lambda item: -item[1]):
        print(f"  left out {count:,}: {reason}")
    if task.mine and summary.without_negative:
        print(
            f"  {summary.without_negative:,} have fewer hard negatives than "
            f"{options.negatives}"
        )


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
        text_format=initialization.text_format(start, config.data.text_format),
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
