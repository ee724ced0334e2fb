"""Plot of a table: the scores of each row over its seeds."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

from gecko_jax.plots import style


def plot(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    output: pathlib.Path,
    has_base: bool,
) -> None:
    """Draws a panel for each measure, with a line for each row.

    A line spans the values of the seeds, which are small dots. The large dot is the
    mean.

    Args:
        panels: Measure -> row -> the values of its seeds, with rows in the same order.
        output: PNG file to write.
        has_base: Whether the first row is the baseline of the others. A dashed line
            marks its mean.
    """
    rows = list(next(iter(panels.values())))
    pyplot, drawn = style.start()
    with drawn:
        figure, axes = pyplot.subplots(
            1,
            len(panels),
            figsize=(3.4 + 3.2 * len(panels), 1.2 + 0.36 * len(rows)),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for column, (measure, panel) in zip(axes[0], panels.items(), strict=True):
            for place, row in enumerate(rows):
                values = panel[row]
                if not values:
                    continue
                mean = sum(values) / len(values)
                is_base = has_base and place == 0
                color = style.LINE_TO_BEAT if is_base else style.DIMS[2]
                if is_base:
                    column.axvline(mean, color=color, ls="--", lw=1.3)
                column.hlines(place, min(values), max(values), color, lw=2, alpha=0.5)
                column.plot(
                    values, [place] * len(values), "o", color=color, ms=3.5, alpha=0.6
                )
                column.plot([mean], [place], "o", color=color, ms=7)
            column.set_title(measure, fontsize=10)
            column.grid(visible=False, axis="y")
            column.margins(x=0.08)
            column.locator_params(axis="x", nbins=5)
        labels = [textwrap.fill(row, 44) for row in rows]
        axes[0, 0].set_yticks(range(len(rows)), labels, fontsize=8)
        axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
        style.save(figure, output)
