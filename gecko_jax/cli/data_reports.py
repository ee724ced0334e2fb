"""What `gecko data show` counts: `--stats` and `--decontaminate`."""

import argparse
import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

# Upper ends of the bins of a histogram, in tokens; one more holds all longer texts.
_BINS = (8, 16, 32, 64, 128, 256, 512, 1024)
_BARS = "▁▂▃▄▅▆▇█"

# Task descriptions of a task's lines that are shown.
_DESCRIPTIONS = 5


def report(options: argparse.Namespace) -> None:
    """Prints what is asked of the tasks of a mixture or a config."""
    if options.stats and not options.config:
        raise ValueError(
            "--stats needs lengths and a vocabulary: add --config=FILE.py:ARG, such as "
            "configs/finetune.py:base"
        )
    if not (options.mixture or options.config):
        raise ValueError("--decontaminate needs data: give a MIXTURE, or --config")
    known = _read_sets(options.decontaminate)
    config = None
    if options.config:
        import gecko_jax.config

        config = flags.load(options.config, options.overrides, flags.TRAIN)
        gecko_jax.config.check(config)
    tasks, drawn, missing = _resolve(options, config)
    if missing:
        parsing.say(f"Not prepared, and left out: {', '.join(missing)}")
    if options.stats:
        _print_stats(_collect(config, tasks, drawn), options.output)
    if options.decontaminate:
        _print_contamination(tasks, known, options.count)


def _resolve(
    options: argparse.Namespace, config: Any
) -> tuple[Sequence[Any], Any, list[str]]:
    """Returns the tasks that have files, their mixture, and names without files."""
    from gecko_jax.data import mixtures, selection
    from gecko_jax.text import text_formats

    if config and config.data.files and not options.mixture:
        cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
        found = selection.tasks_of_files(
            config.data.files, text_formats.TextFormat(), cache_dir
        )
        return *found, []
    folder = options.prepared_dir
    if config and folder == mixtures.PREPARED:
        folder = config.data.prepared_dir
    name = options.mixture or config.data.mixture
    rows, drawn = mixtures.describe(name)
    tasks = [mixtures.locate(task, folder) for task in rows]
    missing = [task.name for task in tasks if not task.files]
    if len(missing) == len(tasks):
        mixtures.resolve(name, folder)  # Says so.
    return [task for task in tasks if task.files], drawn, missing


def _collect(config: Any, tasks: Sequence[Any], drawn: Any) -> Any:
    from gecko_jax.data import features, statistics
    from gecko_jax.text import text_formats
    from gecko_jax.training import loop

    ids = {"unique_ids": config.data.unique_ids}
    return statistics.collect(
        [dataclasses.replace(task, **ids) for task in tasks],
        drawn,
        vocabulary=loop.load_vocabulary(config),
        text_format=text_formats.TextFormat(),
        shape=features.Shape(
            query_length=config.data.query_length,
            passage_length=config.data.passage_length,
            num_negatives=config.data.num_negatives,
            packing=config.data.packing,
        ),
        batch_size=config.data.batch_size,
        one_task_per_batch=config.data.one_task_per_batch,
    )


def _print_stats(found: Any, output: str | None) -> None:
    import numpy as np

    from gecko_jax.io import writing
    from gecko_jax.plots import length_histograms

    shape = found.shape
    total = sum(task.num_examples for task in found.tasks)
    sampled = sum(task.num_sampled for task in found.tasks)
    whole = "all" if sampled == total else f"a random sample of {sampled:,}"
    parsing.say(
        f"{wording.counted(len(found.tasks), 'task')}, "
        f"{wording.counted(total, 'line')}; tokens are those of {whole}"
    )
    for side, length in (
        ("query", shape.query_length),
        ("passage", shape.passage_length),
    ):
        rows = []
        for task in found.tasks:
            lengths = getattr(task, f"{side}_lengths")
            kept = np.minimum(lengths, length)
            rows.append(
                [
                    task.name,
                    f"{task.num_sampled:,} of {task.num_examples:,}",
                    f"{task.rate:.1%}",
                    f"{lengths.mean():.0f}",
                    *(f"{n:.0f}" for n in np.percentile(lengths, (50, 95, 100))),
                    f"{(lengths > length).mean():.1%}",
                    f"{1 - kept.sum() / lengths.sum():.1%}",
                    _histogram(lengths),
                ]
            )
        header = ["task", "lines", "rate", "mean", "median", "95%", "most"]
        header += [
            f"cut at {length}",
            "tokens lost",
            f"≤{_BINS[0]} to >{_BINS[-1]}",
        ]
        parsing.say(f"\n{'queries' if side == 'query' else 'passages'}, in tokens:")
        _print_table(header, rows)
    parsing.say(
        f"\nshare of padding in {found.num_batches} batches drawn from the sample (the "
        f"config has data.packing={shape.packing}):"
    )
    sides = ("query", "passage", "both")
    _print_table(
        ["", *sides],
        [
            [name, *(f"{found.padding[side, packing]:.1%}" for side in sides)]
            for name, packing in (("one text a row", False), ("packed", True))
        ],
    )
    parsing.say("\nlines whose text stands on an earlier line of the task:")
    header = ["task", "query", "positive", "pair"]
    _print_table(
        header,
        [
            [
                task.name,
                *(
                    f"{task.repeated[part]:,} "
                    f"({task.repeated[part] / task.num_examples:.1%})"
                    for part in header[1:]
                ),
            ]
            for task in found.tasks
        ],
    )
    if found.overlaps:
        parsing.say("\ndifferent texts that two tasks share:")
        _print_table(
            ["tasks", *header[1:]],
            [
                [f"{one}, {two}", *(f"{shared[part]:,}" for part in header[1:])]
                for (one, two), shared in found.overlaps.items()
            ],
        )
    else:
        parsing.say("\nno two tasks share a query or a positive")
    for task in found.tasks:
        if task.descriptions:
            shown = list(task.descriptions.items())[:_DESCRIPTIONS]
            lines = wording.counted(sum(task.descriptions.values()), "line")
            parsing.say(
                f"\n{task.name}: task descriptions of their own on {lines}, "
                f"{len(task.descriptions):,} in all: "
                + ", ".join(f"{name!r} {count:,}" for name, count in shown)
            )
    if output:
        with writing.write_file(output) as temporary:
            length_histograms.plot_lengths(
                [
                    (t.name, t.query_lengths.tolist(), t.passage_lengths.tolist())
                    for t in found.tasks
                ],
                shape.query_length,
                shape.passage_length,
                temporary,
            )
        parsing.say(f"\n{output}: the lengths of each task")


def _histogram(lengths: Any) -> str:
    """Returns a bar for each bin; a bin without texts is blank."""
    import numpy as np

    counts = np.bincount(np.searchsorted(_BINS, lengths), minlength=len(_BINS) + 1)
    highest = counts.max()
    return "".join(
        _BARS[round((len(_BARS) - 1) * count / highest)] if count else " "
        for count in counts
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns of equal width: the first to the left, numbers to the right."""
    rows = [[wording.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        parsing.say("  ".join(["", *cells]).rstrip())


def _read_sets(names: Sequence[str]) -> Any:
    from gecko_jax.evaluation import set_texts

    return set_texts.read(names)


def _print_contamination(tasks: Sequence[Any], known: Any, count: int) -> None:
    from gecko_jax.data import decontamination
    from gecko_jax.text import overlap

    parsing.say(
        f"\ntexts of {', '.join(known.sets)} in the tasks' lines: the same words, "
        f"or {overlap.COMMON_WORDS} in a row (a whole text from "
        f"{overlap.LEAST_WORDS} on)"
    )
    reports = decontamination.find(tasks, known, count)
    rows = [
        [
            report.task,
            f"{report.num_lines:,}",
            name,
            f"{found.lines:,} ({found.lines / report.num_lines:.2%})",
            f"{found.same:,}",
            ", ".join(f"{n:,} {side}" for side, n in found.sides.most_common()),
        ]
        for report in reports
        for name, found in report.shared.items()
    ]
    if rows:
        parsing.say("\nlines that hold a text of a set, and what that is there:")
        header = ["task", "lines", "set", "with a hit", "same text", "a text that is"]
        _print_table(header, rows)
    for report in reports:
        if not report.shared:
            parsing.say(
                f"\n{report.task}: none in {wording.counted(report.num_lines, 'line')}"
            )
        for hit in report.examples:
            how = "the same text" if hit.match.is_same else "words in a row"
            body = textwrap.shorten(hit.match.shared, 200, placeholder=" ...")
            parsing.say(f"\n{report.task}, {hit.place}: the {hit.part} holds")
            parsing.say(f"  {hit.match.side} {hit.match.id} of {hit.match.set}, {how}:")
            parsing.say(textwrap.indent(textwrap.fill(body, width=84), "    "))
