"""What all plots share: colours, the names of metrics, opening and saving."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

INK, MUTED, GRID = "#22313f", "#7b8794", "#e4e8ec"
LINE_TO_BEAT, BAG = "#d1603d", "#a9b2bc"
# Other models, in the order in which they are named.
OTHERS = ("#8c5fa8", "#c2933b", "#4f7fb8")
# Dims, from the smallest to the largest: one hue, growing darker.
DIMS = ("#7cc6b3", "#3fa796", "#1f7a73", "#135457", "#0b3540")

# Metric -> its name on an axis, the one to draw first.
LABELS = {"ndcg_at_10": "nDCG@10", "spearman": "Spearman", "accuracy": "accuracy"}

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
}


def start() -> tuple[Any, Any]:
    """Returns pyplot without a screen, and the style as a context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot, matplotlib.rc_context(_STYLE)


def save(figure: Any, output: str | os.PathLike) -> pathlib.Path:
    """Writes the figure as a PNG, closes it, and returns where it lies."""
    from matplotlib import pyplot

    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")
    pyplot.close(figure)
    return output


def first_metric(names: Iterable[str]) -> str | None:
    """Returns the metric to draw: the first of `LABELS` that is there."""
    names = set(names)
    return next((metric for metric in LABELS if metric in names), None)


def shades(count: int) -> list[str]:
    """Returns the colours of so many dims, darker for each."""
    if count == 1:
        return [DIMS[2]]
    return [DIMS[round(i * (len(DIMS) - 1) / max(count - 1, 1))] for i in range(count)]
