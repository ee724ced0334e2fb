"""`gecko data show`: the tasks and examples of a mixture or a config."""

import argparse
import textwrap
from typing import Any

from gecko_jax.cli import data_reports, flags, parsing
from gecko_jax.io import wording

_SHOW = """\
Shows the examples of a config as the model reads them: formatted texts, token counts,
and the share of padding in a batch. With a MIXTURE, shows its tasks: rates, sizes,
licences, and which are prepared.

--stats prints statistics: token counts, truncation at the config's lengths, padding,
duplicates, and texts that tasks share. It needs --config; with a MIXTURE as well, it
reads that mixture instead of the config's data. --decontaminate finds lines that
contain texts of evaluation sets: the same text, or 13 words in a row.

examples:
  gecko data show gecko_finetune
  gecko data show --config=configs/finetune.py:local
  gecko data show --config=configs/finetune.py:local --count=5 \\
      --config.data.files=mine.jsonl
  gecko data show --config=configs/finetune.py:base --stats --output=lengths.png
  gecko data show gecko_finetune --decontaminate=beir/nq,beir/scifact,sts.tsv"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko data show`."""
    parser = parsing.add_verb(verbs, "gecko data show", _SHOW, show)
    add = parser.option
    add("mixture", "name of a mixture or a task", "MIXTURE", nargs="?")
    parsing.add_config(parser, required=False)
    parsing.add_prepared_dir(parser)
    add("--count", "examples per task", parsing.positive, 2)
    add("--stats", "print statistics", bool)
    add("--output", "PNG file for the lengths, with --stats", "FILE")
    text = "evaluation sets: folders, files, or quickstart"
    add("--decontaminate", text, parsing.words, (), metavar="SET,...")


def show(options: argparse.Namespace) -> None:
    """Prints a mixture, the examples of a config, or a report."""
    if options.output and not options.stats:
        raise ValueError("--output: is the plot of --stats; add --stats")
    if options.stats or options.decontaminate:
        data_reports.report(options)
        return
    if not options.mixture and not options.config:
        options.parser.error("give a MIXTURE, such as gecko_finetune, or --config")
    if options.mixture:
        _print_mixture(options.mixture, options.prepared_dir)
    if options.config:
        _print_examples(options)


def _print_examples(options: argparse.Namespace) -> None:
    """Prints examples of each task, and the padding of the first batch."""
    config = flags.load_checked(options, flags.TRAIN)
    from gecko_jax.training import initialization, loop

    text_format = initialization.expected_format(config, loop.load_vocabulary(config))
    batches = loop.build_batches(config, text_format=text_format)
    batch = batches.batch(0)
    decode = batches.vocabulary.decode
    parsing.say(
        f"{wording.counted(batches.num_examples, 'example')}, "
        f"{config.data.batch_size:,} per step; mixture {batches.mixture_hash}"
    )
    for index, task in enumerate(batches.tasks):
        parsing.say(
            f"\n{wording.printable(task.name)}: "
            f"{wording.counted(batches.task_sizes[index], 'example')}, "
            f"{batches.rates[index]:.1%} of the mixture; licence "
            f"{wording.printable(task.licence)}"
        )
        if task.touches:
            parsing.say(f"  may contain texts of {', '.join(task.touches)}")
        for example in batches.examples(index, options.count):
            parsing.say()
            for part in ("query", "positive"):
                tokens = getattr(example, part)
                _print_text(part, decode(tokens.tolist()), len(tokens))
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
    """Prints the tasks of a mixture."""
    from gecko_jax.data import jsonl, mixtures

    rows, mixture = mixtures.describe(name)
    tasks = [mixtures.locate(task, prepared_dir) for task in rows]
    sizes = {}
    for task in tasks:
        counts = [jsonl.count_examples(path) for path in task.files]
        size = sum(count.get(task.source_task, 0) for count in counts)
        sizes[task.name] = size or task.published_size
    known = {name: size for name, size in sizes.items() if size}
    rates = mixture.rates(list(known), list(known.values()))
    shares = {name: rate / sum(rates) for name, rate in zip(known, rates, strict=True)}
    parsing.say(
        f"{name}: {wording.counted(len(tasks), 'task')}, temperature "
        f"{mixture.temperature:g}, cap {mixture.cap or 'none'}; rates are gecko_jax's, "
        "relative to the tasks of known size"
    )
    for task in tasks:
        size = sizes[task.name]
        count = wording.counted(size, "example") if size else "unknown size"
        rate = f"{shares[task.name]:.1%}" if task.name in shares else "-"
        state = "" if task.files else "; not prepared"
        parsing.say(f"\n{task.name}: {count}, {rate}; licence {task.licence}{state}")
        form = ", symmetric" if task.symmetric else ""
        parsing.say(f"  {task.source or 'JSONL'}; t = {task.task_description!r}{form}")
        if task.restricted:
            parsing.say(f"  restricted: {task.restricted}")
        if task.touches:
            parsing.say(f"  may contain texts of {', '.join(task.touches)}")


def _print_text(name: str, text: str, tokens: int | None = None) -> None:
    note = f" ({wording.counted(tokens, 'token')})" if tokens is not None else ""
    body = wording.printable(textwrap.shorten(text, 400, placeholder=" ..."))
    indented = textwrap.fill(f"{name}{note}: {body}", 86, subsequent_indent="    ")
    parsing.say(textwrap.indent(indented, "  "))
