"""Histograms of text lengths, with the length at which texts are cut."""

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
    """Draws the token counts of each task's texts, and the limits, into a PNG.

    `tasks` has the name and the token counts of queries and passages of each task.
    """
    pyplot, styled = style.start()
    with styled:
        figure, axes = pyplot.subplots(
            len(tasks),
            2,
            figsize=(9.0, 1.0 + 1.2 * len(tasks)),
            squeeze=False,
            sharex="col",
            layout="constrained",
        )
        limits = (query_length, passage_length)
        for row, (name, *sides) in enumerate(tasks):
            for ax, lengths, limit in zip(axes[row], sides, limits, strict=True):
                _draw_lengths(ax, lengths, limit)
            axes[row, 0].set_ylabel(
                style.shorten(name, 18), rotation=0, ha="right", va="center", labelpad=8
            )
        for column, side in enumerate(("queries", "passages")):
            longest = max([limits[column], *(n for t in tasks for n in t[column + 1])])
            axes[0, column].set_title(side)
            axes[0, column].set_xlim(2, 2 * longest)
            axes[-1, column].set_xlabel("tokens, cut at the line")
        return style.save(figure, output)


def _draw_lengths(axes: Any, lengths: Sequence[int], limit: int) -> None:
    """Draws the share of texts in four bins per doubling of the length."""
    axes.hist(
        lengths,
        bins=[2 ** (step / 4) for step in range(4 * 14 + 1)],
        weights=[1 / max(len(lengths), 1)] * len(lengths),
        color=style.DIMS[1],
    )
    axes.axvline(limit, color=style.LINE_TO_BEAT, linewidth=1.5)
    cut = sum(length > limit for length in lengths) / max(len(lengths), 1)
    axes.annotate(
        f"{cut:.1%} cut" if cut else "",
        (0.98, 0.8),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color=style.LINE_TO_BEAT,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks([])
