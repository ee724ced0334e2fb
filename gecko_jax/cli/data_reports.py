"""Reports of `gecko data show`: `--stats` and `--decontaminate`."""

import argparse
import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

# Upper limits of the histogram bins, in tokens. One more bin holds longer texts.
_BINS = (8, 16, 32, 64, 128, 256, 512, 1024)
_BARS = "▁▂▃▄▅▆▇█"

_PARTS = ("query", "positive", "pair")


def report(options: argparse.Namespace) -> None:
    """Prints the requested reports about the tasks of a mixture or a config."""
    if options.stats and not options.config:
        raise ValueError(
            "--stats: needs lengths and a vocabulary; add --config=FILE.py:ARG, such "
            "as configs/finetune.py:base"
        )
    if not (options.mixture or options.config):
        raise ValueError("--decontaminate: needs data; give a MIXTURE or --config")
    from gecko_jax.evaluation import set_texts

    contamination = set_texts.read(options.decontaminate)
    config = flags.load_checked(options, flags.TRAIN) if options.config else None
    tasks, mixture, missing = _resolve(options, config)
    if missing:
        parsing.say(f"Left out, because not prepared: {', '.join(missing)}")
    if options.stats:
        _print_stats(_collect(config, tasks, mixture), options.output)
    if options.decontaminate:
        _print_contamination(tasks, contamination, options.count)


def _resolve(
    options: argparse.Namespace, config: Any
) -> tuple[Sequence[Any], Any, list[str]]:
    """Returns the tasks that have files, their mixture, and the names of the others."""
    from gecko_jax.data import mixtures, selection
    from gecko_jax.text import text_formats

    if config and config.data.files and not options.mixture:
        cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
        tasks, mixture = selection.tasks_of_files(
            config.data.files, text_formats.TextFormat(), cache_dir
        )
        return tasks, mixture, []
    folder = options.prepared_dir
    if config and folder == mixtures.PREPARED:
        folder = config.data.prepared_dir
    name = options.mixture or config.data.mixture
    rows, mixture = mixtures.describe(name)
    tasks = [mixtures.locate(task, folder) for task in rows]
    missing = [task.name for task in tasks if not task.files]
    if len(missing) == len(tasks):
        mixtures.resolve(name, folder)  # Raises the error.
    return [task for task in tasks if task.files], mixture, missing


def _collect(config: Any, tasks: Sequence[Any], mixture: Any) -> Any:
    from gecko_jax.data import features, statistics
    from gecko_jax.training import initialization, loop

    vocabulary = loop.load_vocabulary(config)
    unique_ids = config.data.unique_ids
    names = ("query_length", "passage_length", "num_negatives", "packing")
    return statistics.collect(
        [dataclasses.replace(task, unique_ids=unique_ids) for task in tasks],
        mixture,
        vocabulary=vocabulary,
        text_format=initialization.expected_format(config, vocabulary),
        shape=features.Shape(**{name: config.data[name] for name in names}),
        batch_size=config.data.batch_size,
        one_task_per_batch=config.data.one_task_per_batch,
    )


def _print_stats(stats: Any, output: str | None) -> None:
    from gecko_jax.io import writing
    from gecko_jax.plots import length_histograms

    shape = stats.shape
    total = sum(task.num_examples for task in stats.tasks)
    sampled = sum(task.num_sampled for task in stats.tasks)
    sample = "all lines" if sampled == total else f"a random sample of {sampled:,}"
    parsing.say(
        f"{wording.counted(len(stats.tasks), 'task')}, "
        f"{wording.counted(total, 'line')}; token counts are those of {sample}"
    )
    _print_lengths("queries", stats.tasks, shape.query_length)
    _print_lengths("passages", stats.tasks, shape.passage_length)

    parsing.say(
        f"\nshare of padding in {stats.num_batches} batches of the sample (the config "
        f"sets data.packing={shape.packing}):"
    )
    sides = ("query", "passage", "both")
    rows = [
        [name, *(f"{stats.padding[side, packing]:.1%}" for side in sides)]
        for name, packing in (("one text per row", False), ("packed", True))
    ]
    parsing.print_table(["", *sides], rows)

    parsing.say("\nlines whose text repeats an earlier line of the task:")
    rows = []
    for task in stats.tasks:
        counts = (task.repeated[part] for part in _PARTS)
        cells = (f"{n:,} ({n / task.num_examples:.1%})" for n in counts)
        rows.append([task.name, *cells])
    parsing.print_table(["task", *_PARTS], rows)

    if stats.overlaps:
        parsing.say("\ndistinct texts that two tasks share:")
        rows = [
            [", ".join(names), *(f"{shared[part]:,}" for part in _PARTS)]
            for names, shared in stats.overlaps.items()
        ]
        parsing.print_table(["tasks", *_PARTS], rows)
    else:
        parsing.say("\nno two tasks share a query or a positive")

    for task in stats.tasks:
        if task.descriptions:
            first = list(task.descriptions.items())[:5]
            lines = wording.counted(sum(task.descriptions.values()), "line")
            parsing.say(
                f"\n{task.name}: {lines} with a task description, "
                f"{len(task.descriptions):,} distinct: "
                + ", ".join(f"{name!r} {count:,}" for name, count in first)
            )
    if output:
        lengths = [
            (task.name, task.query_lengths.tolist(), task.passage_lengths.tolist())
            for task in stats.tasks
        ]
        with writing.write_file(output) as temporary:
            length_histograms.plot_lengths(
                lengths, shape.query_length, shape.passage_length, temporary
            )
        parsing.say(f"\n{output}: plot of the lengths")


def _print_lengths(side: str, tasks: Sequence[Any], limit: int) -> None:
    """Prints the token counts of one side, and what the limit cuts off."""
    import numpy as np

    rows = []
    for task in tasks:
        lengths = task.query_lengths if side == "queries" else task.passage_lengths
        rows.append(
            [
                task.name,
                f"{task.num_sampled:,} of {task.num_examples:,}",
                f"{task.rate:.1%}",
                f"{lengths.mean():.0f}",
                *(f"{n:.0f}" for n in np.percentile(lengths, (50, 95, 100))),
                f"{(lengths > limit).mean():.1%}",
                f"{1 - np.minimum(lengths, limit).sum() / lengths.sum():.1%}",
                _histogram(lengths),
            ]
        )
    parsing.say(f"\n{side}, in tokens:")
    header = ["task", "lines", "rate", "mean", "median", "95%", "max"]
    header += [f"cut at {limit}", "tokens lost", f"≤{_BINS[0]} to >{_BINS[-1]}"]
    parsing.print_table(header, rows)


def _histogram(lengths: Any) -> str:
    """Returns one bar per bin; an empty bin is blank."""
    import numpy as np

    counts = np.bincount(np.searchsorted(_BINS, lengths), minlength=len(_BINS) + 1)
    heights = np.round((len(_BARS) - 1) * counts / counts.max()).astype(int)
    bars = np.where(counts, np.array(list(_BARS))[heights], " ")
    return "".join(bars)


def _print_contamination(
    tasks: Sequence[Any], contamination: Any, examples: int
) -> None:
    from gecko_jax.data import decontamination
    from gecko_jax.text import overlap

    parsing.say(
        f"\ntexts of {', '.join(contamination.sets)} in the lines of the tasks: the "
        f"same words, or {overlap.COMMON_WORDS} words in a row (short texts: the whole "
        f"text, from {overlap.LEAST_WORDS} words)"
    )
    reports = decontamination.find(tasks, contamination, examples)
    rows = [
        [
            report.task,
            f"{report.num_lines:,}",
            name,
            f"{shared.lines:,} ({shared.lines / report.num_lines:.2%})",
            f"{shared.same:,}",
            ", ".join(f"{n:,} {side}" for side, n in shared.sides.most_common()),
        ]
        for report in reports
        for name, shared in report.shared.items()
    ]
    if rows:
        parsing.say("\nlines that contain a text of an evaluation set, by its side:")
        header = ["task", "lines", "set", "matches", "same text", "side in the set"]
        parsing.print_table(header, rows)
    for report in reports:
        if not report.shared:
            lines = wording.counted(report.num_lines, "line")
            parsing.say(f"\n{report.task}: no matches in {lines}")
        for hit in report.examples:
            match = hit.match
            kind = "same text" if match.is_same else "words in a row"
            body = textwrap.shorten(match.shared, 200, placeholder=" ...")
            parsing.say(f"\n{report.task}, {hit.place}: the {hit.part} contains")
            parsing.say(f"  {match.side} {match.id} of {match.set}, {kind}:")
            parsing.say(textwrap.indent(textwrap.fill(body, width=84), "    "))
