"""How long the texts of tasks are, and where they are cut."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from gecko_jax.plots import style


def plot_lengths(
    tasks: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    query_length: int,
    passage_length: int,
    output: str | os.PathLike,
) -> pathlib.Path:
    """Draws how many tokens the texts of each task have, and where they are cut.

    Args:
        tasks: Name, tokens of the queries and tokens of the passages of each.
        query_length: Tokens that are kept of a query.
        passage_length: Tokens that are kept of a passage.
        output: The PNG to write.
    """
    longest = [
        2 * max([kept, *(length for task in tasks for length in task[column])])
        for column, kept in ((1, query_length), (2, passage_length))
    ]
    pyplot, drawn = style.start()
    with drawn:
        figure, axes = pyplot.subplots(
            len(tasks),
            2,
            figsize=(9.0, 1.0 + 1.2 * len(tasks)),
            squeeze=False,
            sharex="col",
            layout="constrained",
        )
        for row, (name, *sides) in enumerate(tasks):
            for column, (lengths, kept) in enumerate(
                zip(sides, (query_length, passage_length), strict=True)
            ):
                _draw_lengths(axes[row, column], lengths, kept)
            shown = name if len(name) <= 18 else f"{name[:17]}…"
            axes[row, 0].set_ylabel(
                shown, rotation=0, ha="right", va="center", labelpad=8
            )
        for column, side in enumerate(("queries", "passages")):
            axes[0, column].set_title(side)
            axes[0, column].set_xlim(2, longest[column])
            axes[-1, column].set_xlabel("tokens, cut at the line")
        return style.save(figure, output)


def _draw_lengths(axes: Any, lengths: Sequence[int], kept: int) -> None:
    """Draws the share of texts in four bins for each doubling of the length."""
    edges = [2 ** (step / 4) for step in range(4 * 14 + 1)]
    axes.hist(
        lengths,
        bins=edges,
        weights=[1 / max(len(lengths), 1)] * len(lengths),
        color=style.DIMS[1],
    )
    axes.axvline(kept, color=style.LINE_TO_BEAT, linewidth=1.5)
    over = sum(length > kept for length in lengths) / max(len(lengths), 1)
    axes.annotate(
        f"{over:.1%} cut" if over else "",
        (0.98, 0.8),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color=style.LINE_TO_BEAT,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks([])
